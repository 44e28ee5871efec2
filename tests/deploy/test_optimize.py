"""`optimize`: the same answers, the same call, the best backend, kept; and what is refused or falls back."""

import itertools
import json
import logging
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cifar10 import first_images, needs_cifar10
from small_models import TINY, build, needs, normalised, pixels
from torch import Tensor
from tracing import modules_run

import deit_models
from deit_models import AgreementError, ConfigError
from deit_models.deploy import hardware
from deit_models.deploy.network import decreasing, prepare, random_images
from deit_models.deploy.optimize import OptimizedClassifier, _Search, optimize
from deit_models.deploy.runtimes import BACKENDS, Backend, BackendName, InferencePrecision, Job, ways_on
from deit_models.hub.cache import clear_cache
from deit_models.hub.fetch import Access
from deit_models.models.layers import ImageClassifier

CPU = torch.device("cpu")
EAGER = BACKENDS["eager"]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, object]:
    return {"cache_dir": tmp_path, "sample": 2}


def broken(_: Job) -> hardware.Runner:
    raise RuntimeError("no compiler here\nand a long story")


ONLY_TORCH = {name: EAGER if name == "eager" else BACKENDS[name]._replace(build=broken) for name in BACKENDS}
"""No compiler and no runtime: a bare machine."""


def search(
    cache_dir: Path,
    backends: Mapping[BackendName, Backend],
    *,
    model: ImageClassifier | None = None,
    sample: int = 2,
    precision: InferencePrecision | None = None,
    native_bf16: bool = False,
    calibration: Tensor | None = None,
    **changed: Any,
) -> OptimizedClassifier:
    """As `optimize`, but on these backends, rounds of a millisecond, and bf16 as told."""
    options = {"goal": "throughput", "pixels": False, "min_agreement": 0.99, "merging": 0, **changed}
    options.setdefault("timer", partial(hardware.call_times, seconds=0.001))
    found = _Search(model or build("deit"), sample, calibration, backends=backends, **options)
    candidates = ways_on(CPU, backends=backends, precision=precision, native_bf16=lambda _: native_bf16)
    return found.best(candidates, Access(cache_dir=cache_dir))


def own_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("deit_models")]


def shifted(by: float) -> Backend:
    """Torch itself, with every logit but the first lifted: another likeliest class, if by enough."""

    def build_shifted(job: Job) -> hardware.Runner:
        lift, run = torch.zeros(5).index_fill(0, torch.arange(1, 5), by), EAGER.build(job)
        return lambda images: run(images) + lift

    return Backend(build_shifted, ("float32", "bf16", "int8"))


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


def test_the_fastest_backend_is_chosen_and_remembered(tmp_path: Path) -> None:
    seconds = {"eager": 0.3, "inductor": 0.2, "openvino": 0.1, "onnxruntime": 0.4}
    names: dict[hardware.Runner, str] = {}
    measured: list[str] = []

    def named(name: BackendName) -> Backend:
        def build_named(job: Job) -> hardware.Runner:
            run = EAGER.build(job)
            names[run] = name
            return run

        return Backend(build_named, ("float32",))

    def timer(run: hardware.Runner, _: Tensor, **__: object) -> list[float]:
        measured.append(names[run])
        return [seconds[names[run]]]

    backends = {name: named(name) for name in BACKENDS}
    fast = search(tmp_path, backends, timer=timer)
    assert fast.choice.backend == "openvino"
    assert [t.backend for t in fast.choice.timings] == ["openvino", "inductor", "eager", "onnxruntime"]
    assert fast.choice.timings[0].images_per_second == pytest.approx(20)
    assert fast.choice.timings[0].latency_ms == pytest.approx(100)
    assert len(measured) == 4
    assert search(tmp_path, backends, timer=timer).choice == fast.choice
    assert len(measured) == 4, "measured again"
    search(tmp_path, backends, timer=timer, sample=3)
    assert len(measured) == 8, "another batch size is another question"
    for file in tmp_path.rglob("*.json"):
        file.write_text("{ torn")
    assert search(tmp_path, backends, timer=timer).choice.backend == "openvino"
    assert len(measured) == 12


def test_the_goal_decides_between_rate_and_latency(tmp_path: Path) -> None:
    steady: dict[hardware.Runner, bool] = {}

    def build_noted(job: Job) -> hardware.Runner:
        run = EAGER.build(job)
        steady[run] = len(steady) % 2 == 0  # the first of each search
        return run

    def timer(run: hardware.Runner, _: Tensor, **__: object) -> list[float]:
        return [0.2, 0.2, 0.2] if steady[run] else [0.1, 0.1, 0.9]

    backends = {name: Backend(build_noted, ("float32",)) for name in ("eager", "openvino")}
    assert search(tmp_path, backends, timer=timer).choice.backend == "eager"
    assert search(tmp_path, backends, timer=timer, goal="latency").choice.backend == "openvino"


def test_a_kept_choice_that_no_longer_works_falls_back_to_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times = itertools.cycle([0.001, 0.002])  # of the other, then of torch itself
    working = {**ONLY_TORCH, "openvino": Backend(EAGER.build, ("float32",))}
    assert search(tmp_path, working, timer=lambda *_, **__: [next(times)]).choice.backend == "openvino"
    caplog.clear()
    assert search(tmp_path, {**working, "openvino": Backend(broken, ("float32",))}).choice.backend == "eager"
    assert caplog.messages == ["openvino in float32 is not used: no compiler here"]


def test_choice_of_other_weights_that_fails_here_is_measured_anew(tmp_path: Path) -> None:
    """Beside bf16, float32 of the same backend is left out; where bf16 disagrees, it may be the fastest."""
    disagrees = False

    def build_bf16(job: Job) -> hardware.Runner:
        wrong = disagrees and job.precision == "bf16"
        return (lambda images: -EAGER.build(job)(images)) if wrong else EAGER.build(job)

    backends = {
        "openvino": BACKENDS["openvino"]._replace(build=build_bf16, keeps=False),
        "eager": Backend(EAGER.build, ("float32",), reach=1e9),
    }
    options = {"native_bf16": True, "min_agreement": 0.5, "ranked": lambda: True}
    times = itertools.cycle([0.001, 0.009])  # of openvino, then of torch itself
    timer: dict[str, object] = {"timer": lambda *_, **__: [next(times)]}
    first = search(tmp_path, backends, **options, **timer)
    assert [(t.backend, t.precision) for t in first.choice.timings] == [("openvino", "bf16"), ("eager", "float32")]
    disagrees = True
    again = search(tmp_path, backends, **options, **timer)
    assert (again.choice.backend, again.choice.precision) == ("openvino", "float32")


def test_backends_that_cannot_win_are_not_built(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seconds = {"openvino": 1.0, "eager": 1.2, "onnxruntime": 0.1, "inductor": 0.1}
    built: dict[hardware.Runner, str] = {}

    def made(name: BackendName, reach: float) -> Backend:
        def build_noted(job: Job) -> hardware.Runner:
            built[run := EAGER.build(job)] = name
            return run

        return Backend(build_noted, ("float32",), reach=reach)

    def timer(run: hardware.Runner, _: Tensor, **__: object) -> list[float]:
        return [seconds[built[run]]]

    reaches = {"openvino": float("inf"), "eager": 1e9, "onnxruntime": 1.1, "inductor": 1.3}
    backends = {name: made(name, reach) for name, reach in reaches.items()}
    with caplog.at_level(logging.INFO, logger="deit_models"):
        assert search(tmp_path, backends, timer=timer).choice.backend == "inductor"
    assert sorted(built.values()) == ["eager", "inductor", "openvino"]
    assert [line for line in caplog.messages if "left out" in line] == [
        "onnxruntime in float32 is left out: it cannot be faster than what is measured already"
    ]


@pytest.mark.parametrize(
    ("ranked", "fails", "built"),
    [
        (True, False, [("openvino", "bf16")]),
        (False, False, [(name, kind) for name in ("openvino", "eager") for kind in ("bf16", "float32")]),
        (True, True, [("eager", "bf16"), ("eager", "float32")]),
    ],
)
def test_backend_that_was_always_slower_is_not_built_where_the_faster_one_works(
    tmp_path: Path, ranked: bool, fails: bool, built: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    found: list[tuple[str, str]] = []

    def made(name: BackendName, *, works: bool = True) -> Backend:
        def build_noted(job: Job) -> hardware.Runner:
            run = EAGER.build(job) if works else broken(job)
            found.append((name, job.precision))
            return run

        return BACKENDS[name]._replace(build=build_noted, precisions=("bf16", "float32"), keeps=False)

    backends = {"openvino": made("openvino", works=not fails), "eager": made("eager")}
    with caplog.at_level(logging.INFO, logger="deit_models"):
        search(tmp_path, backends, native_bf16=True, min_agreement=0, ranked=lambda: ranked)
    assert found == built
    assert (
        "eager in bf16 is left out: openvino in bf16 was faster wherever both were measured" in caplog.messages
    ) == (ranked and not fails)


def test_third_bf16_is_not_built_where_two_disagree(tmp_path: Path) -> None:
    built: list[str] = []

    def made(name: BackendName) -> Backend:
        def build_noted(job: Job) -> hardware.Runner:
            built.append(name)
            run = EAGER.build(job)
            return (lambda images: -run(images)) if job.precision == "bf16" else run

        return BACKENDS[name]._replace(build=build_noted, precisions=("bf16", "float32"), keeps=False)

    backends = {name: made(name) for name in ("openvino", "eager", "inductor")}
    found = search(tmp_path, backends, native_bf16=True, min_agreement=0.5, ranked=lambda: True)
    assert built == ["openvino", "openvino", "eager"]
    assert (found.choice.backend, found.choice.precision) == ("openvino", "float32")


@pytest.mark.parametrize(("eager_bf16", "built_too"), [(1.2, True), (2.0, False)])
def test_torch_that_disagrees_in_bf16_still_tells_what_its_compiled_form_can_reach(
    tmp_path: Path, eager_bf16: float, built_too: bool
) -> None:
    seconds = {("openvino", "bf16"): 1.0, ("eager", "bf16"): eager_bf16, ("eager", "float32"): 3.0}
    built: dict[hardware.Runner, tuple[str, str]] = {}

    def made(name: BackendName, precisions: tuple[InferencePrecision, ...], reach: float) -> Backend:
        def build_noted(job: Job) -> hardware.Runner:
            exact, wrong = EAGER.build(job), (name, job.precision) == ("eager", "bf16")
            run = (lambda images: -exact(images)) if wrong else (lambda images: exact(images))
            built[run] = name, job.precision
            return run

        return Backend(build_noted, precisions, reach=reach)

    backends = {
        "openvino": made("openvino", ("bf16",), float("inf")),
        "eager": made("eager", ("bf16", "float32"), 1.0),
        "inductor": made("inductor", ("bf16",), 1.3),
    }

    def timer(run: hardware.Runner, *_: object, **__: object) -> list[float]:
        return [seconds.get(built[run], 0.95)]

    found = search(tmp_path, backends, timer=timer, native_bf16=True, min_agreement=0.5)
    assert (("inductor", "bf16") in built.values()) == built_too
    assert found.choice.backend == ("inductor" if built_too else "openvino")


def test_only_close_candidates_are_timed_twice(tmp_path: Path) -> None:
    calls: list[float] = []
    seconds: dict[hardware.Runner, float] = {}
    speeds = iter([0.10, 0.30, 0.11])

    def build_noted(job: Job) -> hardware.Runner:
        seconds[run := EAGER.build(job)] = next(speeds)
        return run

    def timer(run: hardware.Runner, _: Tensor, *, give_up: float = 1e9, **__: object) -> list[float]:
        calls.append(give_up)
        return [seconds[run]]

    backends = {name: Backend(build_noted, ("float32",)) for name in ("openvino", "eager", "onnxruntime")}
    fast = search(tmp_path, backends, timer=timer)
    assert [t.backend for t in fast.choice.timings] == ["openvino", "onnxruntime", "eager"]
    assert calls == [float("inf"), pytest.approx(0.125), pytest.approx(0.125), 1e9, 1e9]


# Kept networks


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("kind", ["deit", "levit"])
@torch.inference_mode()
def test_a_compiled_network_is_taken_from_the_cache(kind: str, name: BackendName, tmp_path: Path) -> None:
    needs(name)
    model = build(kind)
    built: list[bytes | None] = []

    def noted(job: Job) -> hardware.Runner:
        built.append(job.kept)
        return BACKENDS[name].build(job)

    backends = {name: BACKENDS[name]._replace(build=noted)}
    first = search(tmp_path, backends, model=model, sample=5)
    again = search(tmp_path, backends, model=model, sample=5)
    assert [kept is None for kept in built] == [True, False]
    assert again.choice == first.choice
    for count in (1, 3, 5, 8):
        x = normalised(model, pixels(count))
        torch.testing.assert_close(again(x), model(x), atol=1e-4, rtol=0)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    changed = search(tmp_path, backends, model=model, sample=5)
    assert built[2] is None, "other weights need another network"
    torch.testing.assert_close(changed(x), model(x), atol=1e-4, rtol=0)
    assert len(list(tmp_path.rglob("*.network"))) == 2
    assert clear_cache(cache_dir=tmp_path) == []
    assert not list(tmp_path.rglob("*.network"))


@pytest.mark.parametrize("damage", ["bytes", "header", "another network"])
def test_a_damaged_network_is_compiled_anew_with_one_line(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needs("openvino")
    backends = {"openvino": BACKENDS["openvino"]}
    model, other = build("deit"), build("deit")
    with torch.no_grad():
        other.head.bias += torch.arange(5.0)
    search(tmp_path, backends, model=model)
    (file,) = tmp_path.rglob("*.network")
    content = file.read_bytes()
    if damage == "bytes":
        file.write_bytes(content[:-100] + bytes(100))
    elif damage == "header":
        file.write_bytes(b"{" + content)
    else:
        search(tmp_path / "other", backends, model=other)
        file.write_bytes(next((tmp_path / "other").rglob("*.network")).read_bytes())
    caplog.clear()
    assert search(tmp_path, backends, model=model).choice.backend == "openvino"
    (line,) = own_lines(caplog)
    assert line.startswith("the kept network of openvino in float32 is compiled anew: ")
    caplog.clear()
    search(tmp_path, backends, model=model)
    assert own_lines(caplog) == [], "the new network was kept"


def test_half_precision_is_taken_only_where_it_is_faster_and_agrees(tmp_path: Path) -> None:
    slow = {"float32": 0.2, "bf16": 0.1}
    built: dict[hardware.Runner, str] = {}
    odd = 100.0  # marks images that are answered otherwise in half precision

    def noted(job: Job) -> hardware.Runner:
        exact = prepare(build("deit"))

        def run(images: Tensor) -> Tensor:
            wrong = (images[:, 0, 0, 0] == odd) & (job.precision == "bf16")
            return torch.where(wrong[:, None], -exact(images), exact(images))

        built[run] = job.precision
        return run

    images = random_images(build("deit"), 100, pixels=False)
    images[:2, 0, 0, 0] = odd
    options = {
        "calibration": images, "native_bf16": True, "timer": lambda run, _, **__: [slow[built[run]]],
    }  # fmt: skip
    backends = {"eager": EAGER._replace(build=noted)}
    loose = search(tmp_path, backends, min_agreement=0, **options).choice
    assert (loose.precision, loose.agreement.top1, loose.agreement.images) == ("bf16", pytest.approx(0.98), 100)
    assert search(tmp_path / "other", backends, **options).choice.precision == "float32"
    slow["bf16"] = 0.3
    assert search(tmp_path / "third", backends, min_agreement=0, **options).choice.precision == "float32"


def test_a_bare_machine_is_served_by_torch_with_one_line_a_backend(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="deit_models"):
        assert search(tmp_path, ONLY_TORCH).choice.backend == "eager"
    assert own_lines(caplog) == [
        f"{name} in float32 is not used: no compiler here" for name in ("openvino", "onnxruntime", "inductor")
    ]


def test_half_precision_is_not_even_tried_where_the_device_would_imitate_it(tmp_path: Path) -> None:
    def never_in_half(job: Job) -> hardware.Runner:
        assert job.precision == "float32"
        return EAGER.build(job)

    backends = {**ONLY_TORCH, "eager": EAGER._replace(build=never_in_half)}
    assert search(tmp_path, backends, native_bf16=False).choice.precision == "float32"


def test_the_reference_of_the_judge_is_exact(tmp_path: Path) -> None:
    seen: list[str] = []
    model = build("deit")
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision))
    options = {"model": model, "exact": lambda _: hardware.exact_float32(torch.device("cuda"))}
    fast = search(tmp_path, {"eager": EAGER}, **options)
    assert (len(seen), set(seen[:16])) == (32, {"ieee"}), "32 judges, two at a time, then the candidate's"
    assert set(seen[16:]) == {"tf32"}, "on a CPU the candidate has nothing to switch off"
    assert fast.choice.agreement.max_abs_diff <= 1e-4
    seen.clear()
    search(tmp_path, {"eager": EAGER}, merging=1, min_agreement=0, **options)
    assert set(seen[:32]) == {"ieee"}, "the merged network and the model are both compared exactly"


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


def test_wrong_answers_of_a_backend_are_never_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert search(tmp_path, {**ONLY_TORCH, "openvino": shifted(0.001)}).choice.backend == "eager"
    assert "not used: openvino in float32: logits differ by 0.001 on 32 images, 0.0001 is allowed" in caplog.text


# Half precision and int8 that were asked for


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_disagreement_is_refused_with_the_measured_share(precision: InferencePrecision, tmp_path: Path) -> None:
    backends = {**ONLY_TORCH, "openvino": shifted(1e6), "eager": Backend(broken, ("bf16",))}
    model = build("deit")
    with torch.no_grad():
        model.head.bias[0] += 1000  # so that the first class is the model's answer to everything
    images = normalised(model, pixels(8))
    with pytest.raises(AgreementError, match=rf"openvino in {precision}: 0\.0% agree on 8 images, min_agreement=0\.99"):
        search(tmp_path, backends, model=model, precision=precision, calibration=images)


def test_a_machine_on_which_nothing_works_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AgreementError, match="no backend could compute this model, not even torch itself"):
        search(tmp_path, {name: Backend(broken, ("float32",)) for name in BACKENDS})


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


# Merging


def test_the_choice_carries_the_plan_and_the_agreement_with_the_model(tmp_path: Path) -> None:
    model = deit_models.from_pretrained("deit_micro_patch4_32")
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"sample": x, "backend": "eager", "precision": "float32", "cache_dir": tmp_path}
    choice = deit_models.optimize(model, token_merging=decreasing(1, 6), min_agreement=0, **options).choice
    assert choice.token_merging == decreasing(1, 6)
    difference = (prepare(model, plan=decreasing(1, 6))(x) - prepare(model)(x)).abs().max()
    assert choice.merging_agreement.max_abs_diff == pytest.approx(float(difference), abs=1e-4)
    assert choice.merging_agreement.images == 5
    plain = deit_models.optimize(model, **options).choice
    assert (plain.token_merging, plain.merging_agreement) == ((), None)


def test_too_little_agreement_is_refused_with_the_measured_share(tmp_path: Path) -> None:
    model = deit_models.from_pretrained("deit_micro_patch4_32")
    x = random_images(model, 40, pixels=False)
    merged, plain = (prepare(model, plan=plan)(x).argmax(1) for plan in ((8,) * 6, ()))
    share = float((merged == plain).double().mean())
    assert share < 1, "the test needs a model that answers otherwise when merged"
    options = {"sample": x, "backend": "eager", "token_merging": 8, "cache_dir": tmp_path}
    message = (
        rf"token_merging=8,8,8,8,8,8: {100 * share:.1f}% agree with the unmerged model on 40 images, min_agreement=1 is"
    )
    with pytest.raises(AgreementError, match=message):
        deit_models.optimize(model, min_agreement=1, **options)
    assert deit_models.optimize(model, min_agreement=share, precision="float32", **options).choice.backend == "eager"


def test_a_kept_choice_is_kept_for_its_plan(tmp_path: Path) -> None:
    for merging in (0, 2, (2, 2), (4, 0)):
        search(tmp_path, {"eager": EAGER}, native_bf16=True, sample=1, min_agreement=0, merging=merging)
    assert len(list(tmp_path.rglob("*.json"))) == 3


# Refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8'; expected one of auto, float32, bf16, int8"),
        ({"goal": "speed"}, "goal='speed'; expected one of throughput, latency"),
        ({"backend": "tensorrt"}, "backend='tensorrt'; expected one of auto, openvino"),
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
    options |= {"backend": "eager", "precision": "float32"}
    fast = deit_models.optimize(model, **options)
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
    inside = deit_models.optimize(model, preprocessing=True, **options)
    with pytest.raises(ConfigError, match="this model was optimised for uint8 pixels"):
        inside(torch.zeros(1, 3, 64, 64))


def test_a_cache_that_cannot_be_written_costs_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    backends = {**ONLY_TORCH, "openvino": Backend(EAGER.build, ("float32",))}
    assert search(tmp_path / "file", backends, sample=1).choice.backend in ("eager", "openvino")
    assert "the choice is not kept: the cache folder cannot be made" in caplog.text


def test_what_is_kept_is_json_for_readers(tmp_path: Path) -> None:
    search(tmp_path, {"eager": EAGER._replace(reach=1e9)}, native_bf16=True, min_agreement=0)
    (file,) = tmp_path.rglob("*.json")
    rows = json.loads(file.read_text())
    assert {row["precision"] for row in rows} == {"float32", "bf16"}
    assert all(row.keys() == {"backend", "precision", "images_per_second", "latency_ms"} for row in rows)


def test_a_reader_of_one_call_passes_few_modules(tmp_path: Path) -> None:
    model = build("deit")
    for _ in ("measured", "remembered"):
        modules = modules_run(lambda: optimize(model, sample=2, backend="eager", cache_dir=tmp_path))
        assert "deploy.network" in modules
        assert len(modules) <= 11, sorted(modules)
