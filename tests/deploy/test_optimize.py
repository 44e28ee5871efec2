"""`optimize`: the same answers, the same call, the best backend, kept; and what is refused or falls back."""

import itertools
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from cifar10 import first_images, needs_cifar10
from small_models import TINY, build, normalised, pixels
from torch import Tensor

import deit_models
from deit_models import AgreementError, ConfigError
from deit_models.deploy import optimize as optimizing
from deit_models.deploy import runtimes as backends
from deit_models.deploy.network import prepare
from deit_models.deploy.optimize import decision_key
from deit_models.deploy.runtimes import BACKENDS, Backend, BackendName, Job
from deit_models.deploy.timing import Runner, quiet
from deit_models.models.layers import ImageClassifier


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizing, "_ROUND_S", 0.001)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, object]:
    return {"cache_dir": tmp_path, "sample": 2}


@pytest.fixture
def only_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler and no runtime: what is left on a bare machine."""
    for name in ("inductor", "openvino", "onnxruntime"):
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(build=broken))


def broken(_: Job) -> Runner:
    raise RuntimeError("no compiler here\nand a long story")


def shifted(by: float) -> Backend:
    """Torch itself, with every logit but the first lifted: another likeliest class, if by enough."""

    def build_shifted(job: Job) -> Runner:
        lift = torch.zeros(5).index_fill(0, torch.arange(1, 5), by)
        return lambda images: prepare_run(job)(images) + lift

    return Backend(build_shifted, ("float32", "bf16", "int8"))


def prepare_run(job: Job) -> Runner:
    return backends._eager(job)


def needs(name: str) -> None:
    with quiet():
        pytest.importorskip(name, reason="needs the extra [export]")


@pytest.mark.parametrize("kind", TINY)
@torch.inference_mode()
def test_float32_gives_the_models_logits_for_any_batch_size(kind: str, options: dict[str, object]) -> None:
    model = build(kind)
    fast = deit_models.optimize(model, backend="eager", precision="float32", **options)
    for count in (1, 2, 5):
        x = normalised(model, pixels(count))
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=0)
    assert fast.choice.agreement.max_abs_diff <= 1e-4


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@torch.inference_mode()
def test_other_runtimes_give_the_models_logits(name: str, options: dict[str, object]) -> None:
    needs(name)
    model = build("distilled")
    fast = deit_models.optimize(model, backend=name, precision="float32", preprocessing=True, **options)
    assert (fast.choice.backend, fast.choice.precision) == (name, "float32")
    first = fast(pixels(2))
    kept = first.clone()
    for count in (1, 4, 5):  # fewer, more and an odd number beside the two it was made for
        expected = model(normalised(model, pixels(count)))
        torch.testing.assert_close(fast(pixels(count)), expected, atol=1e-4, rtol=0)
    assert torch.equal(first, kept), "a later answer was written over an earlier one"


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_compiled_network_serves_every_batch_size_without_compiling_anew(count: int, tmp_path: Path) -> None:
    model = build("deit")
    fast = deit_models.optimize(model, backend="inductor", precision="float32", sample=count, cache_dir=tmp_path)
    assert fast.choice.backend == "inductor"
    with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        for other in (1, 2, 4, 7):
            x = normalised(model, pixels(other))
            torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=0)


def test_it_is_used_like_the_model_it_was_made_from(options: dict[str, object]) -> None:
    model = deit_models.from_pretrained("deit_micro_patch4_32")
    options |= {"backend": "eager", "precision": "float32"}
    fast = deit_models.optimize(model, **options)
    assert (fast.num_classes, fast.origin, fast.config) == (10, model.origin, model.config)
    assert not fast.training
    image = torch.randint(0, 256, (3, 40, 50), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    plain, ours = deit_models.Classifier(model), deit_models.Classifier(fast)
    assert ours.labels == plain.labels
    inside = deit_models.Classifier(deit_models.optimize(model, preprocessing=True, **options))
    assert inside.transform(image).dtype == torch.uint8
    for classifier in (ours, inside):
        for found, expected in zip(classifier(image).predictions, plain(image).predictions, strict=True):
            assert found.label == expected.label
            assert found.probability == pytest.approx(expected.probability, abs=1e-4)


# Choosing


def test_the_fastest_backend_is_chosen_and_remembered(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds = {"eager": 0.3, "inductor": 0.2, "openvino": 0.1, "onnxruntime": 0.4}
    measured: list[str] = []
    for name in BACKENDS:

        def build_named(job: Job, name: str = name) -> Runner:
            inner = backends._eager(job)

            def named(images: Tensor) -> Tensor:
                return inner(images)

            named.__name__ = name
            return named

        monkeypatch.setitem(BACKENDS, name, Backend(build_named, ("float32",)))

    def timed(run: Runner, *_: Tensor, **__: float) -> list[float]:
        measured.append(run.__name__)
        return [seconds.get(run.__name__, 0.5)]

    monkeypatch.setattr(optimizing, "call_times", timed)
    fast = deit_models.optimize(build("deit"), **options)
    assert fast.choice.backend == "openvino"
    assert [t.backend for t in fast.choice.timings] == ["openvino", "inductor", "eager", "onnxruntime"]
    assert fast.choice.timings[0].images_per_second == pytest.approx(20)
    assert fast.choice.timings[0].latency_ms == pytest.approx(100)
    assert len(measured) == 8
    assert deit_models.optimize(build("deit"), **options).choice == fast.choice
    assert len(measured) == 8, "measured again"
    deit_models.optimize(build("deit"), sample=3, cache_dir=tmp_path)
    assert len(measured) == 16, "another batch size is another question"
    for file in tmp_path.rglob("*.json"):
        file.write_text("{ torn")
    assert deit_models.optimize(build("deit"), **options).choice.backend == "openvino"
    assert len(measured) == 24


def test_the_question_holds_what_changes_the_answer() -> None:
    cpu = torch.device("cpu")
    keys = {decision_key({"batch": 1}, cpu), decision_key({"batch": 2}, cpu)}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        keys.add(decision_key({"batch": 1}, cpu))
    finally:
        torch.set_num_threads(threads)
    assert len(keys) == 3


@pytest.mark.usefixtures("only_torch")
def test_a_kept_choice_that_no_longer_works_falls_back_to_the_next(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(BACKENDS, "openvino", Backend(backends._eager, ("float32",)))
    times = itertools.cycle([0.2, 0.1])  # of torch itself, then of the other
    monkeypatch.setattr(optimizing, "call_times", lambda *_, **__: [next(times)])
    assert deit_models.optimize(build("deit"), precision="float32", **options).choice.backend == "openvino"
    monkeypatch.setitem(BACKENDS, "openvino", Backend(broken, ("float32",)))
    assert deit_models.optimize(build("deit"), precision="float32", **options).choice.backend == "eager"
    assert "openvino in float32 is not used: no compiler here" in caplog.text


@pytest.mark.usefixtures("only_torch")
def test_half_precision_is_taken_only_where_it_is_faster_and_agrees(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = {torch.float32: 0.2, torch.bfloat16: 0.1}
    built: dict[Runner, torch.dtype] = {}

    def noted(job: Job) -> Runner:
        run = backends._eager(job)
        built[run] = job.prepared.dtype
        return run

    monkeypatch.setitem(BACKENDS, "eager", Backend(noted, ("float32", "bf16")))
    monkeypatch.setattr(backends, "has_bf16", lambda _: True)
    monkeypatch.setattr(optimizing, "call_times", lambda run, *_, **__: [slow[built[run]]])
    assert deit_models.optimize(build("deit"), min_agreement=0, **options).choice.precision == "bf16"
    strict = {**options, "cache_dir": tmp_path / "other"}
    monkeypatch.setattr(optimizing._Trial, "_judge", lambda *_: optimizing.Agreement(0.98, 0.0, 100))
    assert deit_models.optimize(build("deit"), **strict).choice.precision == "float32"
    slow[torch.bfloat16] = 0.3
    assert deit_models.optimize(build("deit"), min_agreement=0, **strict).choice.precision == "float32"


@pytest.mark.usefixtures("only_torch")
def test_a_bare_machine_is_served_by_torch_with_one_line_a_backend(
    options: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="deit_models"):
        fast = deit_models.optimize(build("deit"), precision="float32", **options)
    assert fast.choice.backend == "eager"
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("deit_models")]
    assert lines == [
        f"{name} in float32 is not used: no compiler here" for name in ("inductor", "openvino", "onnxruntime")
    ]


@pytest.mark.usefixtures("only_torch")
def test_half_precision_is_not_even_tried_where_the_device_would_imitate_it(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never_in_half(job: Job) -> Runner:
        assert job.precision == "float32"
        return backends._eager(job)

    monkeypatch.setitem(BACKENDS, "eager", Backend(never_in_half, ("float32", "bf16")))
    monkeypatch.setattr(backends, "has_bf16", lambda _: False)
    assert deit_models.optimize(build("deit"), **options).choice.precision == "float32"


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_a_large_batch_is_computed_in_pieces_and_comes_back_in_order(name: BackendName) -> None:
    prepared, sizes = prepare(build("deit")), []
    if name == "eager":  # what is traced would take a hook's length for a constant
        prepared.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    else:
        needs(name)
    images = torch.randn(19, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    run = BACKENDS[name].build(Job(prepared, images, "float32"))
    assert torch.allclose(run(images), prepare(build("deit"))(images), atol=1e-4)
    assert name != "eager" or sizes == [8, 8, 3]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_missing_library_costs_one_line_with_what_to_install(
    precision: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    fast = deit_models.optimize(build("deit"), backend="openvino", precision=precision, **options)
    assert (fast.choice.backend, fast.choice.precision) == ("eager", "float32")
    assert (
        f"openvino in {precision} is not used: OpenVINO needs openvino; pip install 'deit-models[export]'"
        in caplog.text
    )


@pytest.mark.usefixtures("only_torch")
def test_wrong_answers_of_a_backend_are_never_used(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(BACKENDS, "openvino", shifted(0.001))
    assert deit_models.optimize(build("deit"), precision="float32", **options).choice.backend == "eager"
    assert "not used: openvino in float32: logits differ by 0.001 on 32 images, 0.0001 is allowed" in caplog.text


# Half precision and int8 that were asked for


@pytest.mark.usefixtures("only_torch")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_disagreement_is_refused_with_the_measured_share(
    precision: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "openvino", shifted(1e6))
    monkeypatch.setitem(BACKENDS, "eager", Backend(broken, ("bf16",)))
    model = build("deit")
    with torch.no_grad():
        model.head.bias[0] += 1000  # so that the first class is the model's answer to everything
    images = normalised(model, pixels(8))
    with pytest.raises(AgreementError, match=rf"openvino in {precision}: 0\.0% agree on 8 images, min_agreement=0\.99"):
        deit_models.optimize(model, precision=precision, calibration=images, **options)


def photograph_crops(model: ImageClassifier) -> torch.Tensor:
    """48 parts of four photographs; on random images the answers are so close that 8 bits change some by chance."""
    data = pytest.importorskip("skimage.data")
    transform, found = deit_models.transform_for(model), []
    for name in ("chelsea", "coffee", "rocket", "astronaut"):
        photo = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)
        for i in range(12):
            top, left = (i // 4) * (photo.shape[1] - 128) // 2, (i % 4) * (photo.shape[2] - 128) // 3
            found.append(transform(photo[:, top : top + 128, left : left + 128]))
    return torch.stack(found)


def test_int8_is_quantised_with_the_images_given_and_agrees(options: dict[str, object], capsys) -> None:
    needs("nncf")
    model = deit_models.from_pretrained("deit_micro_patch4_32")
    images = photograph_crops(model)
    fast = deit_models.optimize(model, precision="int8", calibration=images, min_agreement=0.97, **options)
    assert (fast.choice.backend, fast.choice.precision) == ("openvino", "int8")
    assert fast.choice.agreement.images == 48
    assert fast.choice.agreement.top1 >= 0.97
    assert fast.choice.agreement.max_abs_diff > 1e-4, "nothing was quantised"
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@needs_cifar10
@torch.inference_mode()
def test_int8_keeps_the_answers_on_images_it_has_not_seen(options: dict[str, object]) -> None:
    needs("nncf")
    model = deit_models.from_pretrained("deit_micro_patch4_32")
    known, _ = first_images(model, "train", 30)
    images, labels = first_images(model, "test", 100)
    fast = deit_models.optimize(model, precision="int8", calibration=known, **options)
    found, expected = (torch.cat([m(batch) for batch in images.split(100)]).argmax(1) for m in (fast, model))
    assert (found == expected).double().mean() >= 0.98
    assert (found == labels).double().mean() >= (expected == labels).double().mean() - 0.01


def test_int8_without_its_library_is_float32_with_one_line(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs("openvino")
    monkeypatch.setitem(sys.modules, "nncf", None)
    model = build("deit")
    fast = deit_models.optimize(model, precision="int8", calibration=normalised(model, pixels(4)), **options)
    assert fast.choice.precision == "float32"
    assert "openvino in int8 is not used: int8 needs nncf; pip install 'deit-models[export]'" in caplog.text


def test_calibration_may_be_any_images(options: dict[str, object]) -> None:
    model = deit_models.from_pretrained("deit_micro_patch4_32")
    arrays = [torch.full((3, 40, 40), level / 10) for level in range(6)]
    fast = deit_models.optimize(
        model, backend="eager", precision="bf16", calibration=arrays, min_agreement=0.5, **options
    )
    assert fast.choice.agreement.images == 6


# Refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8'; expected one of auto, float32, bf16, int8"),
        ({"goal": "speed"}, "goal='speed'; expected one of throughput, latency"),
        ({"backend": "tensorrt"}, "backend='tensorrt'; expected one of auto, eager"),
        ({"min_agreement": 99}, "min_agreement=99; expected a share from 0 to 1"),
        ({"precision": "int8"}, "precision='int8' needs calibration images"),
        ({"sample": 0}, "sample=0; expected a batch of images"),
        ({"sample": torch.zeros(2, 3, 32, 32)}, r"sample of shape \(2, 3, 32, 32\); expected \(B, 3, 64, 64\)"),
        ({"calibration": torch.zeros(3, 64, 64)}, r"calibration of shape \(3, 64, 64\)"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, object], message: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=message):
        deit_models.optimize(build("deit"), **{**options, **wrong})


def test_wrong_input_training_and_saving_are_refused(options: dict[str, object], tmp_path: Path) -> None:
    model = build("deit")
    fast = deit_models.optimize(model, backend="eager", **options)
    with pytest.raises(ConfigError, match=r"input of shape \(1, 3, 32, 32\); this model takes \(B, 3, 64, 64\)"):
        fast(torch.zeros(1, 3, 32, 32))
    with pytest.raises(
        ConfigError, match=r"input of type torch\.uint8; this model was optimised for normalised floats"
    ):
        fast(pixels(1))
    with pytest.raises(ConfigError, match="train the model it was made from"):
        fast.train()
    with pytest.raises(ConfigError, match="save the model it was made from, or use export"):
        fast.save_pretrained(tmp_path / "out")
    with pytest.raises(ConfigError, match="optimised already"):
        deit_models.optimize(fast, **options)
    inside = deit_models.optimize(model, backend="eager", preprocessing=True, **options)
    with pytest.raises(ConfigError, match="this model was optimised for uint8 pixels"):
        inside(torch.zeros(1, 3, 64, 64))


@pytest.mark.usefixtures("only_torch")
def test_a_cache_that_cannot_be_written_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setitem(BACKENDS, "openvino", Backend(backends._eager, ("float32",)))
    fast = deit_models.optimize(build("deit"), precision="float32", sample=1, cache_dir=tmp_path / "file")
    assert fast.choice.backend in ("eager", "openvino")
    assert "the choice is not kept: the cache folder cannot be made" in caplog.text


@pytest.mark.usefixtures("only_torch")
def test_what_is_kept_is_json_for_readers(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backends, "has_bf16", lambda _: True)
    deit_models.optimize(build("deit"), backend="eager", min_agreement=0, **options)
    (file,) = tmp_path.rglob("*.json")
    assert {row["precision"] for row in json.loads(file.read_text())} == {"float32", "bf16"}
