"""Several processes learn and count as one: gloo on the CPU, copies (DDP) and divided parameters (FSDP)."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from training import worker

import deit_models
from deit_models import distributed
from deit_models.distributed import join_processes
from deit_models.errors import ConfigError
from deit_models.training.state import read_log

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

GRADIENT_TOLERANCE = 1e-6
"""Seen: 2e-7. Gradients are averages of 8 images' in another order of summation."""
WEIGHT_TOLERANCE = 5e-5
"""Seen: 1e-5 after six steps of AdamW at 0.01, in the biases of keys, whose true gradient is 0."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two processes that ran all scenarios, and the results of each."""
    folder = tmp_path_factory.mktemp("two")
    tiny.start_worker("world", folder, 2, *worker.SCENARIOS)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in one process."""
    folder = tmp_path_factory.mktemp("one")
    worker.replicated(folder)
    worker.replicated_adaptively(folder)
    worker.replicated_by_lamb(folder)
    worker.several(folder)
    worker.labelled_patches(folder)
    return folder


def near(first: Any, second: Any, tolerance: float) -> None:
    assert {name: d for name, d in tiny.differences(first, second) if not d <= tolerance} == {}


def weights(out: Path) -> dict[str, Any]:
    saved = tiny.state(out)
    return {name: saved[name] for name in ("model", "ema_model")}


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a log without the clock."""
    return [{key: row[key] for key in row if key not in ("seconds", "images_per_second")} for row in rows]


# ---- one step


def test_halves_of_a_batch_give_the_gradients_of_the_whole(shared: tuple[Path, list[dict[str, Any]]]) -> None:
    expected = worker.gradients(Path())
    for results in shared[1]:
        near(results["gradients"], expected, GRADIENT_TOLERANCE)
    for name, found in expected.items():
        moved = {key: float(tensor.abs().max()) for key, tensor in found.items() if key != "loss"}
        untaught = {key for key in moved if "head_dist" in key and "taught" not in name}
        assert {key for key, size in moved.items() if size < 100 * GRADIENT_TOLERANCE} == untaught, name
    near(
        [shared[1][0]["gradients"][f"accumulated, {distilled=}"] for distilled in (False, True)],
        [expected[f"plain, {distilled=}"] for distilled in (False, True)],
        GRADIENT_TOLERANCE,
    )


# ---- whole runs


def test_two_processes_train_the_weights_of_one(shared: tuple[Path, list[dict[str, Any]]], alone: Path) -> None:
    folder, results = shared
    near(weights(folder / "ddp"), weights(alone / "ddp"), WEIGHT_TOLERANCE)
    for name in ("ddp agc", "ddp lamb"):
        near(weights(folder / name), weights(alone / name), WEIGHT_TOLERANCE)
    rows = figures(read_log(alone / "ddp" / "log.jsonl"))
    for result in results:
        assert figures(result["replicated"]) == [pytest.approx(row, abs=1e-4) for row in rows]
    assert figures(read_log(folder / "ddp" / "log.jsonl")) == figures(results[0]["replicated"])
    assert (rows[-1]["val_images"], rows[-1]["val_unreadable"]) == (12, 1)


def test_two_processes_learn_several_labels_in_a_balanced_order_as_one(
    shared: tuple[Path, list[dict[str, Any]]], alone: Path
) -> None:
    folder, results = shared
    rows = figures(read_log(alone / "several" / "log.jsonl"))
    assert (rows[-1]["val_images"], rows[-1]["val_unreadable"]) == (12, 1)
    for result in results:
        assert figures(result["several"]) == [pytest.approx(row, abs=1e-3) for row in rows]
    near(weights(folder / "several"), weights(alone / "several"), WEIGHT_TOLERANCE)


def test_two_processes_make_label_maps_and_learn_from_them_as_one(
    shared: tuple[Path, list[dict[str, Any]]], alone: Path
) -> None:
    folder, results = shared
    assert (folder / "maps" / "maps.npy").read_bytes() == (alone / "maps" / "maps.npy").read_bytes()
    rows = figures(read_log(alone / "patches" / "log.jsonl"))
    for result in results:
        assert figures(result["labelled_patches"]) == [pytest.approx(row, abs=1e-4) for row in rows]
    one, two = (tiny.state(place / "patches") for place in (alone, folder))
    names = ("model", "ema_model", "patch_head", "ema_patch_head")
    near({name: two[name] for name in names}, {name: one[name] for name in names}, WEIGHT_TOLERANCE)


def test_divided_parameters_train_as_copies_do_also_after_an_interruption(
    shared: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, results = shared
    near(weights(folder / "fsdp"), weights(folder / "ddp"), WEIGHT_TOLERANCE)
    for how in (" agc", " lamb"):
        near(weights(folder / f"fsdp{how}"), weights(folder / f"ddp{how}"), WEIGHT_TOLERANCE)
    for how in ("", "_adaptively", "_by_lamb"):
        divided, copied = f"divided{how}", f"replicated{how}"
        for result in results:
            assert figures(result[divided]) == [pytest.approx(row, abs=1e-4) for row in figures(result[copied])]
    moments = tiny.state(folder / "fsdp")["optimizer"]["state"]
    copied = tiny.state(folder / "ddp")["optimizer"]["state"]
    names = [name for name, _ in tiny.model(distilled=True).named_parameters() if name in moments]
    assert len(names) >= len(copied) > 0
    assert {int(moments[name]["step"]) for name in names if "head_dist" not in name} == {6}


@pytest.mark.parametrize("folder", ["ddp", "fsdp", "fsdp agc"])
def test_export_of_several_processes_loads_whole(shared: tuple[Path, list[dict[str, Any]]], folder: str) -> None:
    out = shared[0] / folder
    for name, saved in (("model", "model"), ("ema", "ema_model")):
        loaded = deit_models.from_pretrained(out / name)
        tiny.same_bits(dict(loaded.state_dict()), weights(out)[saved])
        assert loaded.origin.class_names == ("kind 0", "kind 1", "kind 2")
    assert deit_models.from_pretrained(out / "best").origin.top1 == max(
        row["top1"] for row in read_log(out / "log.jsonl")
    )


def test_every_process_starts_from_the_weights_of_the_first(shared: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = shared
    first = dict(tiny.model(seed=0).state_dict())
    for result in results:
        for version in ("", "ema_"):
            tiny.same_bits(result["first_weights"][version], first)
    tiny.same_bits(weights(folder / "still")["model"], dict(tiny.model(seed=0, distilled=True).state_dict()))


def test_unreadable_images_of_all_processes_are_counted_once(shared: tuple[Path, list[dict[str, Any]]]) -> None:
    for result in shared[1]:
        assert result["unreadable"] == [4, 4, 4]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("uneven batch", "ConfigError: batch_size=7 cannot be shared evenly by 2 processes"),
        ("uneven accumulation", "ConfigError: batch_size=6 .* 2 processes with 2 accumulation steps"),
        ("not a number in one process", "TrainingError: the loss is no longer a number at step 2 of epoch 0"),
        ("states apart", "TrainingError: the processes find different states in .*apart"),
        ("other sharding", "TrainingError: .* was saved with shard=None .now 'fsdp'.*new folder"),
        ("fewer images than processes", "DataError: 1 images to evaluate on, fewer than the 2 processes"),
    ],
)
def test_all_processes_give_up_together(shared: tuple[Path, list[dict[str, Any]]], case: str, text: str) -> None:
    for result in shared[1]:
        assert result["refusals"][case].count("\n") == 0
        assert re.match(text, result["refusals"][case]), result["refusals"][case]


# ---- evaluation


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("three")
    tiny.start_worker("world", folder, 3, "many")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


def test_shared_evaluation_counts_each_of_10001_images_once(
    shared: tuple[Path, list[dict[str, Any]]], three: list[dict[str, Any]]
) -> None:
    expected = worker.many(Path())
    assert expected["read"] == list(range(10_001))
    assert expected["figures"]["images"] == 10_001
    assert 20 < expected["figures"]["top1"] < 50
    for results in (shared[1], three):
        read = [index for result in results for index in result["many"]["read"]]
        assert sorted(read) == list(range(10_001))
        for result in results:
            counted = result["many"]["figures"]
            assert counted.pop("loss") == pytest.approx(expected["figures"]["loss"], rel=1e-6)
            assert counted == {key: value for key, value in expected["figures"].items() if key != "loss"}


# ---- meeting


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path: Path, alone: Path) -> None:
    tiny.start_worker("torchrun", tmp_path, torchrun=2)
    near(weights(tmp_path / "torchrun"), weights(alone / "ddp"), WEIGHT_TOLERANCE)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The outcome of each attempt of `worker.failures`, in each of two processes."""
    folder = tmp_path_factory.mktemp("failures")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tiny.start_worker("failures", folder, port, limit_s=120)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize(
    ("attempt", "where", "own", "other"),
    [
        ("fails", 1, "RuntimeError: the camera is gone", "TrainingError: process 1 failed: RuntimeError: the camera"),
        ("interrupted", 1, "KeyboardInterrupt: ", "TrainingError: process 1 failed: KeyboardInterrupt"),
        (
            "unreadable",
            1,
            "DataError: at least 4 of the 9",
            "TrainingError: process 1 failed: DataError: at least 4 of the 9",
        ),
        ("no images", 0, "DataError: ", "TrainingError: process 0 failed: DataError: "),
        ("main only", 0, "PermissionError: no permission after epoch 0", "TrainingError: process 0 failed: Permission"),
    ],
)
def test_failure_of_one_process_ends_the_others_with_its_reason(
    told: list[dict[str, str]], attempt: str, where: int, own: str, other: str
) -> None:
    assert told[where][attempt].startswith(own)
    assert told[1 - where][attempt].startswith(other)


def test_processes_meet_again_after_every_failure(told: list[dict[str, str]]) -> None:
    for result in told:
        assert result["both"].startswith("DataError: ")
        assert result["other data"].startswith("TrainingError: the processes were started with different settings")
        assert result["fine"] == "1"


def test_processes_without_torchrun_are_told_to_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"process 0 cannot meet the other 1: .*torchrun"), join_processes("cpu"):
        pass


def test_one_process_needs_no_group() -> None:
    with join_processes("cpu") as process:
        assert (process.rank, process.world, process.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert process.gather("x") == ["x"]
        assert process.total(torch.tensor([2.0])).tolist() == [2.0]
        process.wait_for_all()
        model = nn.Linear(2, 2)
        assert distributed.spread(model, process, "fsdp", unused=False) is model


def test_process_without_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    count = torch.cuda.device_count()
    monkeypatch.setenv("LOCAL_RANK", str(count))
    text = f"process {count} has no GPU {count}: there are {count} here"
    with pytest.raises(ConfigError, match=text), join_processes("cuda"):
        pass


# ---- precision


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (("avx512_bf16",), True),
        (("amx_bf16", "avx2"), True),
        (("avx512_f", "avx512_vnni", "amx_int8", "avx2"), False),
        ((), False),
    ],
)
def test_processor_without_bf16_is_told_by_its_features(features: tuple[str, ...], expected: bool) -> None:
    known = {name: name in features for name in ("avx2", "avx512_f", "avx512_vnni", "amx_int8", *distributed.BF16)}
    assert distributed.cpu_has(*distributed.BF16, known=known) == expected


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_other_devices_compute_in_float32(device: str) -> None:
    assert distributed.has_bf16(torch.device(device)) is False


# ---- units of FSDP


class Lists(nn.Module):
    """A list in a list, which is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.ReLU()]), nn.ModuleList([nn.Linear(4, 4)])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            for layer in stage:
                x = layer(x)
        return x


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", ["deit", "resnet", "sequences", "lists"])
def test_any_architecture_can_be_divided(name: str) -> None:
    import torchvision

    make = {
        "deit": lambda: tiny.model(distilled=True),
        "resnet": lambda: torchvision.models.resnet18(num_classes=3),  # sequences within blocks of sequences
        "sequences": lambda: nn.Sequential(
            nn.Flatten(), nn.Sequential(nn.Linear(192, 4), nn.Sequential(nn.Linear(4, 3)))
        ),
        "lists": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4), Lists()),
    }
    torch.manual_seed(0)
    model = make[name]().eval()
    images = torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    expected = model(images)
    distributed.shard_parameters(model)
    assert {type(parameter).__name__ for parameter in model.parameters()} == {"DTensor"}
    near(model(images), expected, 1e-6)
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
