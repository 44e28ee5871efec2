"""Inference: `optimize` with its CUDA graphs, `Classifier` on a folder and short of memory, `evaluate`, export."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu_toys
import pytest
import torch
from torch import Tensor, nn

import deit_models
from deit_models import Classifier, evaluate, optimize
from deit_models.deploy.bench import Case, measure
from deit_models.models.layers import ImageClassifier
from deit_models.predict import ImageResult

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-4
WAYS = [
    ("eager", "float32", 1),
    ("eager", "float32", 8),
    ("eager", "bf16", 8),
    ("inductor", "float32", 8),
    ("inductor", "bf16", 1),
    ("inductor", "bf16", 8),
]


def trained(family: str = "distilled") -> tuple[ImageClassifier, Tensor]:
    """A model on the CPU and 32 images for it."""
    model = gpu_toys.small(family)
    images = gpu_toys.random_images(model, 32)
    return gpu_toys.as_trained(model, images), images


def agree(found: Tensor, expected: Tensor, precision: str) -> None:
    if precision == "float32":
        assert float((found.cpu() - expected).abs().max()) <= TOLERANCE
    assert float((found.cpu().argmax(1) == expected.argmax(1)).double().mean()) >= (
        1.0 if precision == "float32" else 0.85
    )


# optimize


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(map(str, way)), scope="module")
def fast(
    request: pytest.FixtureRequest, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Tensor, Tensor]:
    """An optimised model made on the device, images, and the CPU's logits."""
    backend, precision, count = request.param
    if device.type != "cuda" and backend == "inductor":
        pytest.skip("in the rehearsal on the CPU: compiling takes too long")
    model, images = trained()
    with torch.inference_mode():
        expected = model(images)
    before = torch.backends.cudnn.conv.fp32_precision
    made = optimize(
        model.to(device),
        backend=backend,
        precision=precision,
        sample=count,
        calibration=images,
        min_agreement=0.85,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )
    assert (made.choice.backend, made.choice.precision) == (backend, precision)
    assert torch.backends.cudnn.conv.fp32_precision == before
    return made, images, expected


def test_any_number_of_images_gives_the_models_answers(fast: Any, device: torch.device) -> None:
    made, images, expected = fast
    for count in (1, 8, 5, 32):
        agree(made(images[:count].to(device)), expected[:count], made.choice.precision)


def test_answers_that_wait_are_not_overwritten(fast: Any, device: torch.device) -> None:
    made, images, expected = fast
    parts = images.to(device).split(8)
    answers = [made(part) for part in parts]
    agree(torch.cat(answers), expected, made.choice.precision)


def test_two_threads_with_streams_of_their_own(fast: Any, device: torch.device) -> None:
    made, images, expected = fast
    parts = list(zip(images.to(device).split(8), expected.split(8), strict=True)) * 5
    if device.type == "cuda":
        torch.cuda.synchronize()

    def work(offset: int) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()
        with stream:
            for part, wanted in parts[offset::2]:
                for size in (1, 8):
                    agree(made(part[:size]), wanted[:size], made.choice.precision)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


@pytest.mark.parametrize("count", [1, 8])
def test_kernels_are_recorded(
    count: int, cuda: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    model, images = trained()
    with caplog.at_level(logging.WARNING, logger="deit_models"):
        made = optimize(model.to(cuda), backend="eager", precision="float32", sample=count, cache_dir=tmp_path)
        replays.clear()
        for size in (count, count + 1, count):
            made(images[:size].to(cuda))
    assert len(replays) == 2
    assert [record.message for record in caplog.records if record.name.startswith("deit_models")] == []


def test_the_fastest_of_all_agrees_with_the_plain_model(device: torch.device, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if device.type == "cuda" else {"backend": "eager"}
    model, images = trained("deit")
    with torch.inference_mode():
        expected = model(images)
    made = optimize(model.to(device), sample=images[:8], calibration=images, cache_dir=tmp_path, **options)
    assert len(made.choice.timings) >= 1
    agree(made(images.to(device)), expected, made.choice.precision)


@pytest.mark.parametrize("family", gpu_toys.SMALL)
def test_every_family_is_optimised_in_float32_and_takes_pixels(
    family: str, device: torch.device, tmp_path: Path
) -> None:
    model, _ = trained(family)
    levels = (gpu_toys.random_images(model, 8).clamp(-2, 2) * 60 + 128).to(torch.uint8)
    mean, std = (
        torch.tensor(v).view(-1, 1, 1) for v in (model.origin.preprocessing.mean, model.origin.preprocessing.std)
    )
    with torch.inference_mode():
        expected = model((levels / 255 - mean) / std)
    options = {"backend": "eager", "precision": "float32", "sample": 8, "cache_dir": tmp_path}
    made = optimize(model.to(device), preprocessing=True, **options)
    assert float((made(levels.to(device)).cpu() - expected).abs().max()) <= TOLERANCE * float(
        expected.std(0).mean().clamp(min=1)
    )


@pytest.mark.parametrize(("backend", "precision"), [("model", "float32"), ("eager", "bf16")])
def test_a_measurement_is_consistent_in_itself(backend: Any, precision: Any, device: torch.device) -> None:
    row = measure(Case("deit_micro_patch4_32", backend, precision, 8, str(device), 0.05))
    assert row.error is None
    assert 0 < row.p50_ms <= row.p95_ms
    assert row.images_per_second == pytest.approx(8000 / row.p50_ms, rel=0.9)
    assert 1 < row.peak_mb < 50_000


# Classifier and evaluate


@pytest.mark.parametrize("make_fast", [False, True], ids=["plain", "optimised"])
@pytest.mark.parametrize("family", gpu_toys.SMALL)
def test_launching_a_batch_waits_for_nothing(family: str, make_fast: bool, cuda: torch.device, tmp_path: Path) -> None:
    model, _ = trained(family)
    model = model.to(cuda)
    if make_fast:
        options = {"backend": "eager", "precision": "bf16", "min_agreement": 0, "cache_dir": tmp_path}
        model = optimize(model, sample=8, preprocessing=True, **options)
    ours = Classifier(model, batch_size=8)
    levels = torch.randint(0, 256, (8, 3, *model.config.image_hw), dtype=torch.uint8)
    before = ours._predictions(ours._launch(levels, 3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [ours._launch(part, 3) for part in (levels, levels.flip(0), levels)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [ours._predictions(tops) for tops in launched]
    for rows in (found[0], found[1][::-1], found[2]):
        for row, wanted in zip(rows, before, strict=True):
            assert row[0].probability == pytest.approx(wanted[0].probability, abs=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = gpu_toys.save_folders(tmp_path_factory.mktemp("images") / "val", 8)
    (root / "bee" / "99.png").write_text("no picture")
    return root


def classifier(device: torch.device | str, *, make_fast: bool = False, cache: Path | None = None) -> Classifier:
    model, _ = trained()
    model = model.to(device)
    if make_fast:
        options = {"backend": "eager", "precision": "float32", "cache_dir": cache}
        return Classifier(optimize(model, sample=8, preprocessing=True, **options), batch_size=8)
    return Classifier(model, batch_size=8)


def same_results(found: list[ImageResult], expected: list[ImageResult]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.source, one.error is None) == (other.source, other.error is None)
        assert [p.label for p in one.predictions[:1]] == [p.label for p in other.predictions[:1]]
        pairs = zip(sorted(one.predictions, key=_index), sorted(other.predictions, key=_index), strict=True)
        assert all(p.probability == pytest.approx(q.probability, abs=TOLERANCE) for p, q in pairs)


def _index(prediction: Any) -> int:
    return prediction.index


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("make_fast", [False, True], ids=["plain", "optimised"])
@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_folder_is_classified_as_on_the_cpu(
    folder: Path, workers: int | None, make_fast: bool, device: torch.device, tmp_path: Path
) -> None:
    paths = gpu_toys.files(folder)
    expected = list(classifier("cpu").classify_files(paths, top_k=10, workers=0))
    ours = classifier(device, make_fast=make_fast, cache=tmp_path)
    found = list(ours.classify_files(paths, top_k=10, workers=workers))
    assert sum(result.error is not None for result in found) == 1
    same_results(found, expected)
    good = [path for path in paths if path.name != "99.png"]
    same_results(ours([*good], top_k=10), [result for result in expected if result.error is None])


class Room(nn.Module):
    """A model on a device that has room for three images at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self.model(images)


def test_batches_are_halved_where_memory_is_short(
    folder: Path, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    paths = gpu_toys.files(folder)
    plain = list(classifier(device).classify_files(paths))
    ours = classifier(device)
    ours.model = Room(ours.model)
    same_results(list(ours.classify_files(paths)), plain)
    assert ours.batch_size <= 3
    assert "do not fit into memory" in caplog.text


@pytest.fixture
def little_memory(cuda: torch.device) -> Iterator[int]:
    """300 MiB more than is in use."""
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(cuda) + 300 * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(cuda).total_memory, cuda)
    yield allowed
    torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    torch.cuda.empty_cache()


def test_a_gpu_that_runs_out_of_memory_goes_on_with_less(cuda: torch.device, little_memory: int) -> None:
    torch.manual_seed(0)
    model = deit_models.create_model("deit_tiny_patch16_224").to(cuda)
    ours = Classifier(model, batch_size=512)
    images = torch.randint(0, 256, (512, 3, 224, 224), dtype=torch.uint8)
    results = ours(images)
    assert len(results) == 512
    assert 8 <= ours.batch_size < 512
    assert torch.cuda.memory_reserved(cuda) <= little_memory
    again = Classifier(model, batch_size=8)(images[-8:])
    for one, other in zip(results[-8:], again, strict=True):
        assert one.predictions[0].probability == pytest.approx(other.predictions[0].probability, abs=1e-3)


@pytest.mark.usefixtures("exact")
def test_evaluation_counts_as_the_cpu_does(device: torch.device) -> None:
    model = gpu_toys.small("distilled", num_classes=3)
    gpu_toys.as_trained(model, gpu_toys.random_images(model, 16))
    data = gpu_toys.Colours(30)
    expected = evaluate(model, data, device="cpu", workers=0, batch_size=8)
    found = evaluate(model, data, device=device, workers=0, batch_size=8)
    assert (found.top1, found.top5, found.images, found.heads) == (
        expected.top1, expected.top5, expected.images, expected.heads,
    )  # fmt: skip
    assert found.loss == pytest.approx(expected.loss, abs=TOLERANCE)
    half = evaluate(model, data, device=device, workers=2, batch_size=8, precision="bf16")
    assert abs(half.top1 - expected.top1) <= 10


# Elsewhere


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("layout", ["native", "timm", "transformers"])
def test_saved_from_the_device_it_loads_anywhere(layout: Any, device: torch.device, tmp_path: Path) -> None:
    model, images = trained("deit")
    with torch.inference_mode():
        expected = model(images)
        model.to(device).save_pretrained(tmp_path / "saved", layout=layout)
        assert {parameter.device.type for parameter in model.parameters()} == {device.type}
        for where in ("cpu", device):
            loaded = deit_models.from_pretrained(tmp_path / "saved", device=where)
            assert float((loaded(images.to(where)).cpu() - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("preprocessing", [False, True])
@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
def test_exported_from_the_device(name: str, preprocessing: bool, device: torch.device, tmp_path: Path) -> None:
    if name.endswith(".onnx"):
        for library in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(library)
    model, _ = trained()
    kind = "onnx" if name.endswith(".onnx") else "torch-export"
    exported = deit_models.export(model.to(device), tmp_path / name, format=kind, preprocessing=preprocessing)
    assert exported.max_abs_diff <= TOLERANCE
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
