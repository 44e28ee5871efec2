"""`bench`: what one process measures, and the table that is made of it."""

import os
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from deit_models import ConfigError, UnknownModelError
from deit_models.deploy import bench as benching
from deit_models.deploy import runtimes as backends
from deit_models.deploy import timing
from deit_models.deploy.bench import Case, Measurement, bench, measure, table
from deit_models.deploy.runtimes import BACKENDS, Job
from deit_models.deploy.timing import Runner

MICRO = "deit_micro_patch4_32"


def case(backend: str = "model", precision: str = "float32", batch_size: int = 2) -> Case:
    return Case(MICRO, backend, precision, batch_size, "cpu", 0.01)


def broken(_: Job) -> Runner:
    raise RuntimeError("no compiler here\nand a long story")


@pytest.mark.parametrize(("backend", "precision"), [("model", "float32"), ("eager", "float32"), ("eager", "bf16")])
def test_a_measurement_is_consistent_in_itself(backend: str, precision: str) -> None:
    row = measure(case(backend, precision))
    assert (row.backend, row.precision, row.batch_size, row.error) == (backend, precision, 2, None)
    assert 0 < row.p50_ms <= row.p95_ms
    assert row.images_per_second == pytest.approx(2000 / row.p50_ms, rel=0.9)
    assert 50 < row.peak_mb < 50_000


def test_rates_and_quantiles_come_from_the_timed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0.1] * 95 + [0.5] * 5
    monkeypatch.setattr(benching, "call_times", lambda *_, **__: times)
    row = measure(case(batch_size=4))
    assert row.images_per_second == pytest.approx(4 * 100 / 12)
    assert row.p50_ms == pytest.approx(100)
    assert 100 <= row.p95_ms <= 500


def test_building_and_warming_up_do_not_count_as_peak_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    monkeypatch.setattr(benching, "call_times", lambda *_, seconds, warm_up: steps.append((seconds, warm_up)) or [1, 1])
    monkeypatch.setattr(benching, "_forget_peak", lambda _: steps.append("forget"))
    monkeypatch.setattr(benching, "_peak_mb", lambda _: steps.append("read"))
    measure(case())
    assert steps == [(0, 3), "forget", (0.01, 0), "read"]
    monkeypatch.undo()
    called: list[str] = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: called.append(name))
    benching._forget_peak(torch.device("cpu"))
    assert called == []
    benching._forget_peak(torch.device("cuda"))
    assert called == ["empty_cache", "reset_peak_memory_stats"]


def test_a_call_is_timed_alone_and_to_its_end() -> None:
    class Answer:
        """Still being computed, until somebody waits for it."""

        def cpu(self) -> None:
            running.pop()

    running: list[Answer] = []

    def launch(_: torch.Tensor) -> Answer:
        assert running == [], "the last call is still at work"
        running.append(Answer())
        return running[-1]

    assert len(timing.call_times(launch, torch.zeros(1), seconds=0, warm_up=3)) == 2
    assert running == []


def test_each_case_has_a_process_of_its_own() -> None:
    (row,) = bench(MICRO, batch_sizes=(1,), backends=("model",), precision="float32", seconds=0.01)
    assert (row.backend, row.batch_size, row.error) == ("model", 1, None)
    assert row.images_per_second > 0


def test_all_ways_are_measured_and_bf16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[Case] = []
    monkeypatch.setattr(benching, "_in_own_process", cases.append)
    for native in (False, True):
        monkeypatch.setattr(backends, "has_bf16", lambda _, native=native: native)
        cases.clear()
        list(bench(MICRO, batch_sizes=(1, 8)))
        assert {c.batch_size for c in cases} == {1, 8}
        assert {c.backend for c in cases} == {"model", *BACKENDS}
        assert ("bf16" in {c.precision for c in cases}) == native
        assert "int8" not in {c.precision for c in cases}


def test_a_backend_that_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "inductor", BACKENDS["inductor"]._replace(build=broken))
    row = measure(case("inductor"))
    assert (row.error, row.images_per_second) == ("no compiler here", 0.0)
    text = table(MICRO, [measure(case()), row, row])
    assert text.count("| inductor | float32 | 2 | - | - | - | - |") == 2
    assert text.count("inductor in float32: no compiler here") == 1


def test_a_process_that_dies_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> "Dying":
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: object) -> None:
            raise BrokenProcessPool("killed")

    monkeypatch.setattr(benching, "ProcessPoolExecutor", Dying)
    (row,) = bench(MICRO, batch_sizes=(1,), backends=("eager",), precision="float32")
    assert row.error == "the process died, most often for want of memory"


def test_the_table_says_what_the_figures_depend_on() -> None:
    row = Measurement(
        backend="eager", precision="float32", batch_size=8, images_per_second=12.34, p50_ms=1.26, p95_ms=2, peak_mb=99.6
    )
    text = table(MICRO, [row])
    assert "| eager | float32 | 8 | 12.3 | 1.3 | 2.0 | 100 |" in text
    assert text.startswith(f"{MICRO}, 32x32 pixels, 0.08 G MACs, random weights, cpu")
    for part in (timing.processor_name(), f"torch {torch.__version__.partition('+')[0]}", f"cores {os.cpu_count()}"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backends": ["tensorrt"]},
            "backend 'tensorrt'; expected one of model, eager, inductor, openvino, onnxruntime",
        ),
        ({"batch_sizes": [0]}, r"batch_sizes=\[0\]; expected numbers of images, 1 or more"),
        ({"batch_sizes": []}, r"batch_sizes=\[\]"),
        ({"precision": "fp8"}, "precision='fp8'; expected one of float32, bf16, int8"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(MICRO, **options)
    with pytest.raises(UnknownModelError):
        bench("deit_micro_patch4_33")


@pytest.mark.parametrize(("known", "found"), [({"avx2": True, "avx512_vnni": True}, True), ({"avx2": True}, False)])
def test_products_of_8_bits_are_known_from_the_processor(
    known: dict[str, bool], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert timing.has_int8_products() is found


def test_int8_is_measured_with_random_ranges() -> None:
    pytest.importorskip("nncf")
    row = measure(case("openvino", "int8"))
    assert (row.precision, row.error) == ("int8", None)
    assert row.images_per_second > 0
