"""Backends give the model's logits for any batch size; file formats tell their own files from others."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from imitated_cuda import ImitatedCuda
from small_models import build, needs, normalised, pixels
from torch import Tensor, nn

import deit_models
from deit_models import ConfigError
from deit_models.deploy import runtimes
from deit_models.deploy.hardware import Runner, quiet
from deit_models.deploy.network import merging_plan, prepare
from deit_models.deploy.runtimes import (
    BACKENDS,
    EXPORT_FORMATS,
    BackendName,
    InferencePrecision,
    Job,
    Way,
    open_exported,
    read_metadata,
    ways_on,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_building_reports_nothing_to_the_makers_of_the_runtime(
    precision: InferencePrecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("openvino", "openvino_telemetry", "nncf")
    from nncf.telemetry import wrapper
    from openvino_telemetry.main import Telemetry
    from openvino_telemetry.utils.sender import TelemetrySender

    sent: list[object] = []
    monkeypatch.setattr(TelemetrySender, "send", lambda _, __, message: sent.append(message))
    monkeypatch.setattr(wrapper, "_IS_IN_PYTEST_CONTEXT", False)
    model = build("deit")
    images = normalised(model, pixels(2))
    BACKENDS["openvino"].build(Job(prepare(model), images, precision, calibration=images))
    assert sent == []
    Telemetry().send_event("a", "b", "c", force_send=True)
    assert len(sent) == 1, "the user's own calls report as before"


def test_native_bf16_is_tried_and_int8_only_if_asked_for() -> None:
    native, emulated = (
        ways_on(CPU, backends=BACKENDS, native_bf16=lambda _, native=native: native) for native in (True, False)
    )
    assert {way.precision for way in native} == {"float32", "bf16"}
    assert emulated == [Way(name, "float32") for name in BACKENDS]
    assert ways_on(CPU, backends=BACKENDS, precision="int8") == [Way("openvino", "int8")]
    on_cuda = ways_on(CUDA, backends=BACKENDS, precision="bf16")
    assert [str(way) for way in on_cuda] == ["eager in bf16", "inductor in bf16"]


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


@pytest.mark.parametrize("name", ["eager", "openvino", "onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_every_backend_gives_the_merged_networks_logits(name: BackendName, tmp_path: Path) -> None:
    if name in ("openvino", "onnxruntime"):
        needs(name)
    model = build("distilled")
    fast = deit_models.optimize(
        model, sample=2, backend=name, precision="float32", token_merging=3, min_agreement=0, cache_dir=tmp_path
    )
    assert (fast.choice.backend, fast.choice.token_merging) == (name, (3, 3))
    assert fast.choice.agreement.max_abs_diff <= 1e-4
    merged, x = prepare(model, fold=False, plan=(3, 3)), normalised(model, pixels(5))
    for count in (1, 2, 5):
        torch.testing.assert_close(fast(x[:count]), merged(x[:count]), atol=1e-4, rtol=0)


def test_torch_computes_in_bf16_and_takes_pixels() -> None:
    model = build("deit3")
    dtypes = {name: backend.dtype("bf16") for name, backend in BACKENDS.items()}
    assert [name for name, dtype in dtypes.items() if dtype == torch.bfloat16] == ["eager", "inductor"]
    prepared = prepare(model, pixels=True, dtype=dtypes["eager"], plan=merging_plan(model, 1))
    run = BACKENDS["eager"].build(Job(prepared, pixels(2), "bf16"))
    torch.testing.assert_close(run(pixels(3)), prepared(pixels(3)))


@pytest.mark.parametrize(("precision", "convolutions"), [("float32", "ieee"), ("bf16", "tf32")])
def test_compiled_network_is_recorded_in_one_shape_and_torch_serves_the_others(
    precision: str, convolutions: str
) -> None:
    shapes: list[int] = []
    options: dict[str, object] = {}
    graphs, prepared = ImitatedCuda(), prepare(build("deit"), pixels=True)

    def compiler(network: nn.Module, **given: object) -> Runner:
        options.update(given)

        def compiled(images: Tensor) -> Tensor:
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            assert torch.backends.cudnn.conv.fp32_precision == convolutions
            shapes.append(len(images))
            return network(images)

        return compiled

    with torch.inference_mode():
        run = runtimes._inductor_on_gpu(Job(prepared, pixels(2), precision), compiler=compiler, cuda=graphs)
        for count in (2, 5):
            torch.testing.assert_close(run(pixels(count)), prepared(pixels(count)))
    assert set(shapes) == {2}
    assert options["dynamic"] is False
    assert graphs.replays == 1


# Files


def test_file_of_another_program_is_told_apart(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    with quiet():
        torch.export.save(program, tmp_path / "other.pt2")
    with pytest.raises(ConfigError, match=r"other\.pt2 holds no metadata of deit-models"):
        read_metadata(tmp_path / "other.pt2")
    with pytest.raises(ConfigError, match=r"model\.bin: unknown kind of file; expected \.onnx \(onnx\)"):
        open_exported(tmp_path / "model.bin")


def test_weights_too_large_for_onnx_are_refused(tmp_path: Path) -> None:
    model = deit_models.create_model("deit3_huge_patch14_224", device="meta")
    images = torch.zeros(2, 3, 224, 224, device="meta")
    message = r"2\.5 GB of weights, an ONNX file holds 2\.1; use 'openvino' or 'torch-export'"
    with pytest.raises(ConfigError, match=message):
        EXPORT_FORMATS["onnx"].write(prepare(model), images, tmp_path / "model.onnx", "")


def test_networks_of_openvino_may_go_in_any_order(tmp_path: Path) -> None:
    needs("openvino")
    script = """
import signal, subprocess, sys
import deit_models
signal.signal(signal.SIGCHLD, lambda *_: None)  # as loading processes do
model = deit_models.create_model("deit_micro_patch4_32", depth=1)
made = [deit_models.optimize(model, sample=2, backend="openvino", cache_dir=sys.argv[1]) for _ in range(2)]
del made[0]
made.clear()
for _ in range(5):
    subprocess.run([sys.executable, "-c", ""], check=True)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
