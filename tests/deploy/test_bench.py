"""`bench`: the figures of one process, and the table of them."""

import os

import pytest
import torch

from deit_models import ConfigError, UnknownModelError
from deit_models.deploy import bench as benching
from deit_models.deploy import hardware
from deit_models.deploy.bench import Case, Measurement, PeakMemory, bench, measure, table
from deit_models.deploy.hardware import Runner
from deit_models.deploy.runtimes import BACKENDS, Job

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


class Memory(PeakMemory):
    """Notes when a peak is forgotten and read."""

    def __init__(self, steps: list[object]) -> None:
        super().__init__(torch.device("cpu"))
        self.steps = steps

    def forget(self) -> None:
        self.steps.append("forget")

    def mb(self) -> float:
        self.steps.append("read")
        return 99.0


def test_rates_and_quantiles_come_from_the_timed_calls() -> None:
    times = [0.1] * 95 + [0.5] * 5
    row = measure(case(batch_size=4), memory=Memory([]), timer=lambda *_, **__: times)
    assert row.images_per_second == pytest.approx(4 * 100 / 12)
    assert row.p50_ms == pytest.approx(100)
    assert 100 <= row.p95_ms <= 500
    assert row.peak_mb == 99


def test_building_and_warming_up_do_not_count_as_peak_of_a_gpu() -> None:
    steps: list[object] = []

    def timer(*_: object, seconds: float, warm_up: int) -> list[float]:
        steps.append((seconds, warm_up))
        return [1, 1]

    measure(case(), memory=Memory(steps), timer=timer)
    assert steps == [(0, 3), "forget", (0.01, 0), "read"]

    class Cuda:
        def empty_cache(self) -> None:
            called.append("empty_cache")

        def reset_peak_memory_stats(self, _: torch.device) -> None:
            called.append("reset_peak_memory_stats")

        def max_memory_reserved(self, _: torch.device) -> int:
            return 3 * 2**20

    called: list[str] = []
    PeakMemory(torch.device("cpu"), Cuda()).forget()
    assert called == []
    memory = PeakMemory(torch.device("cuda"), Cuda())
    memory.forget()
    assert called == ["empty_cache", "reset_peak_memory_stats"]
    assert memory.mb() == 3


def test_each_case_has_a_process_of_its_own() -> None:
    (row,) = bench(MICRO, batch_sizes=(1,), backends=("model",), precision="float32", seconds=0.01)
    assert (row.backend, row.batch_size, row.error) == ("model", 1, None)
    assert row.images_per_second > 0


@pytest.mark.parametrize("native", [False, True])
def test_all_ways_are_measured_and_bf16_only_where_it_is_native(native: bool) -> None:
    options = {"device": "cpu", "seconds": 0.01}
    cases = benching._cases(MICRO, (1, 8), ("model", *BACKENDS), None, native_bf16=lambda _: native, **options)
    assert {c.batch_size for c in cases} == {1, 8}
    assert {c.backend for c in cases} == {"model", *BACKENDS}
    assert ("bf16" in {c.precision for c in cases}) == native
    assert "int8" not in {c.precision for c in cases}
    (only,) = benching._cases(MICRO, (1,), ("eager",), "bf16", **options)
    assert only == Case(MICRO, "eager", "bf16", 1, "cpu", 0.01)


def test_a_backend_that_fails_is_a_row_with_its_reason() -> None:
    backends = {"inductor": BACKENDS["inductor"]._replace(build=broken)}
    row = measure(case("inductor"), memory=Memory([]), backends=backends)
    assert (row.error, row.images_per_second) == ("no compiler here", 0.0)
    text = table(MICRO, [measure(case()), row, row])
    assert text.count("| inductor | float32 | 2 | - | - | - | - |") == 2
    assert text.count("inductor in float32: no compiler here") == 1


def die(_: Case) -> Measurement:
    os._exit(9)


def test_a_process_that_dies_is_a_row_too() -> None:
    row = benching._in_own_process(case("eager"), die)
    assert row.error == "the process died, most often for want of memory"


def test_the_table_says_what_the_figures_depend_on() -> None:
    row = Measurement(
        backend="eager", precision="float32", batch_size=8, images_per_second=12.34, p50_ms=1.26, p95_ms=2, peak_mb=99.6
    )
    text = table(MICRO, [row])
    assert "| eager | float32 | 8 | 12.3 | 1.3 | 2.0 | 100 |" in text
    assert text.startswith(f"{MICRO}, 32x32 pixels, 0.08 G MACs, random weights, cpu")
    for part in (hardware.processor_name(), f"torch {torch.__version__.partition('+')[0]}", f"cores {os.cpu_count()}"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backends": ["tensorrt"]},
            "backend 'tensorrt'; expected one of model, openvino, eager, onnxruntime, inductor",
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


def test_int8_is_measured_with_random_ranges() -> None:
    pytest.importorskip("nncf")
    row = measure(case("openvino", "int8"))
    assert (row.precision, row.error) == ("int8", None)
    assert row.images_per_second > 0
