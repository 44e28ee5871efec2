"""Graph runners and exact float32, on an imitation of CUDA graphs and on torch's own switches."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fake_gpu import GPU, fake_gpu
from imitated_cuda import Graph, imitate
from small_models import TINY, build, normalised, pixels
from torch import Tensor, nn

import deit_models
from deit_models.deploy import gpu
from deit_models.deploy import optimize as optimizing
from deit_models.deploy import runtimes as backends
from deit_models.deploy.gpu import exact_float32, launched_at_once
from deit_models.deploy.network import prepare
from deit_models.deploy.runtimes import Job
from deit_models.deploy.timing import Runner

SWITCHES = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
)
CUDA = torch.device("cuda")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    return imitate(monkeypatch)


def runner(kind: str = "deit", count: int = 4) -> Runner:
    """What the eager backend makes of a small model for this many images, graph and all."""
    prepared = prepare(build(kind), pixels=True)
    return backends._on_gpu(lambda x: prepared(x), Job(prepared, pixels(count), "float32"))


# CUDA graphs


@pytest.mark.parametrize("kind", TINY)
def test_batches_like_the_example_are_replayed_and_others_are_not(kind: str, graphs: type[Graph]) -> None:
    run, model = runner(kind, 4), build(kind)
    for count, replays in ((4, 1), (4, 2), (3, 2), (8, 2), (1, 2)):
        with torch.inference_mode():
            expected = model(normalised(model, pixels(count)))
            torch.testing.assert_close(run(pixels(count)), expected, atol=1e-4, rtol=1e-4)
        assert graphs.replays == replays


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.usefixtures("graphs")
def test_an_answer_is_not_overwritten_by_the_next(count: int) -> None:
    run = runner(count=count)
    first = run(pixels(count))
    kept, other = first.clone(), run(255 - pixels(count))
    assert torch.equal(first, kept)
    assert not torch.equal(first, other)
    assert not first.is_inference()


@pytest.mark.usefixtures("graphs")
def test_threads_take_turns() -> None:
    run, batches = runner(), [pixels(4).roll(shift, 0) for shift in range(4)]
    expected = [run(batch) for batch in batches]

    def classify(number: int) -> bool:
        with torch.inference_mode():
            return torch.equal(run(batches[number % 4]), expected[number % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(classify, range(40)))


def test_other_types_and_layouts_of_images(graphs: type[Graph]) -> None:
    model = build("deit")
    prepared = prepare(model)
    x = normalised(model, pixels(2))
    run = launched_at_once(prepared, x, plain=prepared)
    strided = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(run(strided), model(x).detach(), atol=1e-4, rtol=1e-4)
    assert graphs.replays == 1
    run(x.double())
    assert graphs.replays == 1


@pytest.mark.parametrize("token_merging", [0, 2])
@pytest.mark.parametrize("kind", TINY)
def test_prepared_networks_wait_for_nothing_so_that_they_can_be_recorded(
    kind: str, token_merging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token_merging and kind in ("levit", "vit_resnas", "token head"):
        pytest.skip("merges no tokens")
    prepared = prepare(build(kind), pixels=True, dtype=torch.bfloat16, token_merging=token_merging)
    with fake_gpu(monkeypatch) as gpu, torch.no_grad():
        prepared.to(GPU)
        gpu.waits.clear()
        images = torch.empty(4, 3, 64, 64, dtype=torch.uint8, device=GPU)
        assert prepared(images).device.type == "cuda"
    assert (gpu.waits, gpu.read_backs) == ([], 0)


def test_what_cannot_be_recorded_is_launched_one_by_one_with_one_line(
    graphs: type[Graph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "fails", True)
    run, model = runner(count=2), build("deit")
    with caplog.at_level(logging.WARNING, logger="deit_models"):
        for count in (2, 3):
            expected = model(normalised(model, pixels(count))).detach()
            torch.testing.assert_close(run(pixels(count)), expected, atol=1e-4, rtol=1e-4)
    reason = "operation not permitted when stream is capturing"
    assert caplog.messages == [f"no CUDA graph, kernels are launched one by one: {reason}"]


def test_a_network_that_fails_by_itself_is_no_matter_of_graphs(
    graphs: type[Graph], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        launched_at_once(broken, pixels(), plain=broken)
    assert caplog.messages == []
    assert graphs.replays == 0


def test_compiled_network_is_recorded_in_one_shape_and_torch_serves_the_others(
    graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, options = [], {}

    def compile_(network: nn.Module, **given: object) -> Callable[[Tensor], Tensor]:
        options.update(given)

        def compiled(images: Tensor) -> Tensor:
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            shapes.append(len(images))
            return network(images)

        return compiled

    class OnGpu(Tensor):
        device = CUDA

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(backends, "exactly", lambda run, _: run)
    monkeypatch.setattr(
        backends, "launched_at_once", lambda run, x, **k: launched_at_once(run, x.as_subclass(Tensor), **k)
    )
    prepared = prepare(build("deit"), pixels=True)
    with torch.inference_mode():
        run = backends._inductor(Job(prepared, pixels(2).as_subclass(OnGpu), "float32"))
        for count in (2, 5):
            torch.testing.assert_close(run(pixels(count)), prepared(pixels(count)))
    assert set(shapes) == {2}
    assert options["dynamic"] is False
    assert graphs.replays == 1


# Exact float32


def read(*, legacy: bool = True) -> list[object]:
    found: list[object] = [switch.fp32_precision for switch in SWITCHES]
    return [*found, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()] if legacy else found


@pytest.fixture
def switches() -> Iterator[None]:
    """Tests may set what they like."""
    before = read()
    yield
    torch.set_float32_matmul_precision(before[-1])
    torch.backends.cudnn.allow_tf32 = before[-2]
    for switch, value in zip(SWITCHES, before, strict=False):
        switch.fp32_precision = value
    assert read() == before


def by_default() -> None: ...
def by_old_switches() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = False


def by_new_switches() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("user", [by_default, by_old_switches, by_new_switches])
def test_tf32_is_off_inside_and_afterwards_what_it_was(user: Callable[[], None]) -> None:
    user()
    legacy = user is not by_new_switches  # torch refuses to read the old switches then
    before = read(legacy=legacy)

    def fail_inside() -> None:
        with exact_float32(CUDA):
            assert read(legacy=legacy)[:3] == ["ieee"] * 3
            assert not legacy or read()[-2:] == [False, "highest"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert read(legacy=legacy) == before


def test_threads_share_the_switches_until_the_last_is_through() -> None:
    before, inside, go = read(), threading.Event(), threading.Event()

    def work() -> None:
        with exact_float32(CUDA):
            inside.set()
            go.wait(10)

    with exact_float32(CUDA):
        thread = threading.Thread(target=work)
        thread.start()
        inside.wait(10)
        with exact_float32(CUDA):
            pass
        assert read()[:3] == ["ieee"] * 3
    assert read()[:3] == ["ieee"] * 3, "switched on while another thread needs it off"
    go.set()
    thread.join()
    assert read() == before


def test_only_cuda_needs_it() -> None:
    with exact_float32(torch.device("cpu")):
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_float32_is_exact_and_half_precision_is_not_bothered(
    graphs: type[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "exact_float32", lambda _: gpu._exact_float32)  # as if it were a GPU
    seen: list[str] = []
    prepared = prepare(build("deit"), pixels=True)
    prepared.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision))
    for precision, found in (("float32", "ieee"), ("bf16", "tf32")):
        seen.clear()
        run = backends._on_gpu(lambda x: prepared(x), Job(prepared, pixels(2), precision))
        run(pixels(2))
        run(pixels(3))
        assert set(seen) == {found}
    assert graphs.replays == 2


def test_the_reference_of_the_judge_is_exact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(optimizing, "exact_float32", lambda _: gpu._exact_float32)
    seen: list[str] = []
    model = build("deit")
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision))
    options = {"sample": 2, "backend": "eager", "precision": "float32", "cache_dir": tmp_path}
    fast = deit_models.optimize(model, **options)
    assert (len(seen), set(seen[1:17])) == (33, {"ieee"}), "32 judges, two at a time, after one call of the candidate"
    assert set(seen[17:]) == {"tf32"}, "on a CPU the candidate has nothing to switch off"
    assert fast.choice.agreement.max_abs_diff <= 1e-4
    seen.clear()
    deit_models.optimize(model, token_merging=1, min_agreement=0, **options)
    assert set(seen[:32]) == {"ieee"}, "the merged network and the model are both compared exactly"
