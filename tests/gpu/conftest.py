"""Where the tests of this folder compute: on a GPU, or with `--gpu-device cpu` on the CPU, to rehearse them."""

import os
from collections.abc import Iterator

import pytest
import torch

from deit_models.deploy.hardware import exact_float32

REHEARSAL = "in the rehearsal on the CPU: "


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            # Advice that libraries give on a GPU, which CI never sees, must not cost one of the few runs there
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device under test; beside a GPU, the CPU's references are computed by all cores."""
    threads, found = torch.get_num_threads(), torch.device(request.config.getoption("--gpu-device"))
    if found.type == "cuda":
        found = torch.device("cuda", torch.cuda.current_device())
        torch.set_num_threads(os.cpu_count() or 1)
    yield found
    torch.set_num_threads(threads)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU, for tests that mean nothing elsewhere."""
    if device.type != "cuda":
        pytest.skip(f"{REHEARSAL}this is about CUDA alone")
    return device


@pytest.fixture
def exact(device: torch.device) -> Iterator[None]:
    """Float32 in all its bits, as the CPU has it."""
    with exact_float32(device):
        yield
