"""The machine: its description, timed calls, exact float32 on torch's own switches, CUDA graphs on an imitation."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_gpu import GPU, fake_gpu
from imitated_cuda import ImitatedCuda
from small_models import TINY, build, normalised, pixels
from torch import Tensor

from deit_models.deploy import hardware
from deit_models.deploy.hardware import GraphRunner, Runner, exact_float32, on_gpu
from deit_models.deploy.network import merging_plan, prepare

SWITCHES = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
)
CUDA = torch.device("cuda")


@pytest.fixture
def graphs() -> ImitatedCuda:
    return ImitatedCuda()


def runner(graphs: ImitatedCuda, kind: str = "deit", count: int = 4) -> Runner:
    """A small model by a graph for this many images, as the eager backend makes it."""
    prepared = prepare(build(kind), pixels=True)
    return on_gpu(prepared, pixels(count), plain=prepared, exact=True, cuda=graphs)


# The machine


@pytest.mark.parametrize(("known", "found"), [({"avx2": True, "avx512_vnni": True}, True), ({"avx2": True}, False)])
def test_products_of_8_bits_are_known_from_the_processor(
    known: dict[str, bool], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert hardware.has_int8_products() is found


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

    assert len(hardware.call_times(launch, torch.zeros(1), seconds=0, warm_up=3)) == 2
    assert running == []


def test_the_machine_is_described_by_processor_threads_and_versions() -> None:
    found = hardware.machine(torch.device("cpu"))
    assert found["device"] == hardware.processor_name()
    assert found["threads"] == torch.get_num_threads()
    assert str(found["torch"]).partition("+")[0] == torch.__version__.partition("+")[0]


# CUDA graphs


@pytest.mark.parametrize("kind", TINY)
def test_batches_like_the_example_are_replayed_and_others_are_not(kind: str, graphs: ImitatedCuda) -> None:
    run, model = runner(graphs, kind, 4), build(kind)
    for count, replays in ((4, 1), (4, 2), (3, 2), (8, 2), (1, 2)):
        with torch.inference_mode():
            expected = model(normalised(model, pixels(count)))
            torch.testing.assert_close(run(pixels(count)), expected, atol=1e-4, rtol=1e-4)
        assert graphs.replays == replays


@pytest.mark.parametrize("count", [1, 8])
def test_an_answer_is_not_overwritten_by_the_next(count: int, graphs: ImitatedCuda) -> None:
    run = runner(graphs, count=count)
    first = run(pixels(count))
    kept, other = first.clone(), run(255 - pixels(count))
    assert torch.equal(first, kept)
    assert not torch.equal(first, other)
    assert not first.is_inference()


def test_threads_take_turns(graphs: ImitatedCuda) -> None:
    run, batches = runner(graphs), [pixels(4).roll(shift, 0) for shift in range(4)]
    expected = [run(batch) for batch in batches]

    def classify(number: int) -> bool:
        with torch.inference_mode():
            return torch.equal(run(batches[number % 4]), expected[number % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(classify, range(40)))


def test_other_types_and_layouts_of_images(graphs: ImitatedCuda) -> None:
    model = build("deit")
    prepared = prepare(model)
    x = normalised(model, pixels(2))
    run = on_gpu(prepared, x, plain=prepared, exact=True, cuda=graphs)
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
    if token_merging and kind in ("levit", "vit_resnas", "token head", "cait", "resmlp"):
        pytest.skip("merges no tokens")
    model = build(kind)
    prepared = prepare(model, pixels=True, dtype=torch.bfloat16, plan=merging_plan(model, token_merging))
    with fake_gpu(monkeypatch) as gpu, torch.no_grad():
        prepared.to(GPU)
        gpu.waits.clear()
        images = torch.empty(4, 3, 64, 64, dtype=torch.uint8, device=GPU)
        assert prepared(images).device.type == "cuda"
    assert (gpu.waits, gpu.read_backs) == ([], 0)


def test_what_cannot_be_recorded_is_launched_one_by_one_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    graphs, model = ImitatedCuda(fails=True), build("deit")
    with caplog.at_level(logging.WARNING, logger="deit_models"):
        run = runner(graphs, count=2)
        for count in (2, 3):
            expected = model(normalised(model, pixels(count))).detach()
            torch.testing.assert_close(run(pixels(count)), expected, atol=1e-4, rtol=1e-4)
    reason = "operation not permitted when stream is capturing"
    assert caplog.messages == [f"no CUDA graph, kernels are launched one by one: {reason}"]


def test_a_network_that_fails_by_itself_is_no_matter_of_graphs(
    graphs: ImitatedCuda, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        on_gpu(broken, pixels(), plain=broken, exact=True, cuda=graphs)
    assert caplog.messages == []
    assert graphs.replays == 0


def test_a_graph_fits_batches_of_its_shape_and_type(graphs: ImitatedCuda) -> None:
    graph = GraphRunner(prepare(build("deit"), pixels=True), pixels(2), graphs)
    assert graph.fits(255 - pixels(2))
    assert not graph.fits(pixels(3))
    assert not graph.fits(pixels(2).float())


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


@pytest.mark.parametrize(("exact", "found"), [(True, "ieee"), (False, "tf32")])
def test_float32_is_exact_and_half_precision_is_not_bothered(exact: bool, found: str, graphs: ImitatedCuda) -> None:
    seen: list[str] = []
    prepared = prepare(build("deit"), pixels=True)
    prepared.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision))
    run = on_gpu(prepared, pixels(2), plain=prepared, exact=exact, cuda=graphs)
    run(pixels(2))
    run(pixels(3))
    assert set(seen) == {found}
    assert graphs.replays == 1
