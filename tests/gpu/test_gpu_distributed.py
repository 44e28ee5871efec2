"""DDP and FSDP over NCCL (gloo in the rehearsal), in the one process that there is a GPU for, as torchrun starts it."""

from pathlib import Path

import gpu_toys
import pytest
import torch

import deit_models
from deit_models.training.state import read_log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]

WEIGHT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def runs(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    assert gpu_toys.run_worker("distributed", folder, device, torchrun=True) == 0
    return folder


@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_it_learns_and_its_export_loads(runs: Path, shard: str, device: torch.device) -> None:
    losses = [row["loss"] for row in read_log(runs / shard / "log.jsonl")]
    assert len(losses) == 4
    assert all(torch.tensor(losses).isfinite())
    assert losses[-1] < losses[0]
    (saved,) = gpu_toys.weights(runs / shard, "model")
    loaded = deit_models.from_pretrained(runs / shard / "model", device=device)
    gpu_toys.close({name: tensor.cpu() for name, tensor in loaded.state_dict().items()}, saved, 0.0)


def test_divided_parameters_learn_as_copies_do_also_after_a_stop(runs: Path) -> None:
    for found, expected in zip(
        gpu_toys.weights(runs / "fsdp", "model", "ema_model"),
        gpu_toys.weights(runs / "ddp", "model", "ema_model"),
        strict=True,
    ):
        gpu_toys.close(found, expected, WEIGHT_TOLERANCE)
