"""Fixtures that several test files need."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from tempfile import TemporaryDirectory

import pytest
import torch

from deit_models import registry
from deit_models.checkpoint import load_manifest

# Models in tests are small, and two threads that share their cores with other work wait for each other: one is faster.
torch.set_num_threads(1)

# Where the library of Hugging Face keeps copies of Parquet files; it is read when that is imported.
COPIES = TemporaryDirectory(prefix="datasets")
os.environ["HF_DATASETS_CACHE"] = COPIES.name


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test registers is forgotten after it."""
    for name in load_manifest():
        registry.model_spec(name)  # a family registers once, on import: it must not land in the copy alone
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(room):` no file grows beyond `room` bytes; the system refuses the write, as on a full disk."""
    resource = pytest.importorskip("resource", reason="the system has no limit on file sizes")

    @contextmanager
    def limited(room: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-docs", action="store_true", help="write the tables of models into the documents")
    parser.addoption("--update-notebooks", action="store_true", help="run the notebooks and keep what comes out")
    parser.addoption(
        "--gpu-device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse tests/gpu where there is no GPU"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("online") and not _hub_reachable():
        pytest.skip("needs the internet: huggingface.co cannot be reached")
    if item.get_closest_marker("gpu") and not (torch.cuda.is_available() or _is_rehearsed(item)):
        pytest.skip("needs a GPU")


def _is_rehearsed(item: pytest.Item) -> bool:
    return item.config.getoption("--gpu-device") == "cpu" and item.path.parent.name == "gpu"


def _hub_reachable() -> bool:
    if os.environ.get("HF_HUB_OFFLINE"):
        return False
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True
