"""What can compute a prepared network: torch as it is, torch compiled, OpenVINO, ONNX Runtime."""
# MERGED """The files a model can be taken elsewhere in: how each is written, opened and run, and what it says of itself."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from .gpu import exactly, launched_at_once
from .network import Prepared
from .timing import Runner, extra_needed, has_bf16, has_int8_products, quiet

FormatName = Literal["onnx", "openvino", "torch-export"]

METADATA_KEY = "deit_models"
"""Where in a file's own metadata our JSON stands."""
_MAX_ONNX_BYTES = 2**31 - 2**24  # a protobuf message ends at 2 GiB; the graph needs some of it


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        suffix: how its name ends.
        write: prepared network, example batch of 2, path, metadata as JSON.
        open: a written file, ready to run.
        read: the metadata of a written file.
        companion: suffix of a second file that belongs to it, or "".
    """

    suffix: str
    write: Callable[[Prepared, Tensor, Path, str], None]
    open: Callable[[Path], Runner]
    read: Callable[[Path], str | None]
    companion: str = ""


def format_of(path: Path) -> FormatName:
    """The format a file is in, by its suffix. Raises: ConfigError: none that is known."""
    for name, kind in FORMATS.items():
        if path.suffix == kind.suffix:
            return name
    known = ", ".join(f"{kind.suffix} ({name})" for name, kind in FORMATS.items())
    raise ConfigError(f"{path}: unknown kind of file; expected {known}")


def open_exported(path: Path) -> Runner:
    """Run an exported file. Raises: ConfigError: of an unknown kind. MissingExtraError: its runtime is missing."""
    return FORMATS[format_of(path)].open(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """What `export` recorded: model, class names, transform, whether it takes pixels, input size.

    Raises: ConfigError: a file that `export` did not write. MissingExtraError: its library is missing.
    """
    text = FORMATS[format_of(path)].read(path)
    if not text:
        raise ConfigError(f"{path} holds no metadata of deit-models; was it written by another program?")
    found: dict[str, Any] = json.loads(text)
    return found


def traced(prepared: Prepared, example: Tensor) -> torch.export.ExportedProgram:
    """The network as a graph for any batch size; the example has 2 images, since 1 would be taken for a constant."""
    with quiet():
        return torch.export.export(prepared, (example,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})


# ONNX


def _write_onnx(prepared: Prepared, example: Tensor, path: Path, metadata: str) -> None:
    size = sum(parameter.nbytes for parameter in prepared.parameters())
    if size > _MAX_ONNX_BYTES:
        raise ConfigError(f"{size / 1e9:.1f} GB of weights, an ONNX file holds 2.1; use 'openvino' or 'torch-export'")
    with extra_needed("writing ONNX"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    with quiet():
        program = torch.onnx.export(
            prepared,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        )
        if program is None:
            raise ConfigError("torch gave no ONNX program")
        program.model.metadata_props[METADATA_KEY] = metadata
        program.save(str(path), external_data=False)


def _open_onnx(path: Path) -> Runner:
    with extra_needed("running ONNX"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])

    return run


def _read_onnx(path: Path) -> str | None:
    with extra_needed("reading ONNX"):
        import onnx
    # a file from elsewhere may keep its weights beside it; they are not needed here
    model = onnx.load(str(path), load_external_data=False)
    return next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)


# OpenVINO


def _write_openvino(prepared: Prepared, example: Tensor, path: Path, metadata: str) -> None:
    model = openvino_model(prepared, example)
    model.set_rt_info(metadata, [METADATA_KEY])
    with extra_needed("writing OpenVINO"):
        import openvino
    openvino.save_model(model, str(path), compress_to_fp16=False)


def openvino_model(prepared: Prepared, example: Tensor) -> Any:
    """The network as an `openvino.Model`. Raises: MissingExtraError: OpenVINO is not installed."""
    with extra_needed("OpenVINO"):
        import openvino
    with quiet():
        model = openvino.convert_model(traced(prepared, example))
    model.inputs[0].get_tensor().set_names({"images"})
    model.outputs[0].get_tensor().set_names({"logits"})
    return model


def _open_openvino(path: Path) -> Runner:
    with extra_needed("running OpenVINO"):
        import openvino
    core = openvino.Core()
    # the default is whatever the processor is fastest in, which may be half precision
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.contiguous().numpy())[0].copy())

    return run


def _read_openvino(path: Path) -> str | None:
    with extra_needed("reading OpenVINO"):
        import openvino
    model = openvino.Core().read_model(str(path))
    return str(model.get_rt_info(METADATA_KEY).astype(str)) if model.has_rt_info(METADATA_KEY) else None


# torch.export


def _write_torch(prepared: Prepared, example: Tensor, path: Path, metadata: str) -> None:
    with quiet():
        torch.export.save(traced(prepared, example), path, extra_files={METADATA_KEY: metadata})


def _open_torch(path: Path) -> Runner:
    with quiet():
        module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = module(images)
            return logits

    return run


def _read_torch(path: Path) -> str | None:
    found: dict[str, Any] = {METADATA_KEY: ""}
    with quiet():
        torch.export.load(path, extra_files=found)
    text = found[METADATA_KEY]
    return text.decode() if isinstance(text, bytes) else text


FORMATS: dict[FormatName, Format] = {
    "onnx": Format(".onnx", _write_onnx, _open_onnx, _read_onnx),
    "openvino": Format(".xml", _write_openvino, _open_openvino, _read_openvino, companion=".bin"),
    "torch-export": Format(".pt2", _write_torch, _open_torch, _read_torch),
}

BackendName = Literal["eager", "inductor", "openvino", "onnxruntime"]
Precision = Literal["float32", "bf16", "int8"]

# Images a CPU computes at once: with more, a layer's output has left the caches before the next layer reads it. Found
# best of 2 to 32 on two cores with AVX2, for DeiT-Ti and DeiT-S; a stream has one core, and half as many
_PIECE, _STREAM_PIECE = 8, 4


class Job(NamedTuple):
    """What a backend is asked for.

    Attributes:
        prepared: the network, in bfloat16 where a torch backend is to compute in it and in float32 otherwise.
        example: a batch like those to come, on the network's device.
        precision: what to compute in.
        calibration: images by which an int8 network's ranges are found, shaped like the example.
    """

    prepared: Prepared
    example: Tensor
    precision: Precision
    calibration: Tensor | None = None


class Backend(NamedTuple):
    """One way to compute.

    Attributes:
        build: makes a runner; may fail with whatever its library raises.
        precisions: what it can compute in, on some machine.
        devices: types of device it runs on.
    """

    build: Callable[[Job], Runner]
    precisions: tuple[Precision, ...]
    devices: tuple[str, ...] = ("cpu",)


def _in_pieces(run: Runner, job: Job) -> Runner:
    """The same in small batches on a CPU, one after the other; a GPU takes all at once."""
    if job.example.device.type != "cpu":
        return run

    def run_pieces(images: Tensor) -> Tensor:
        if len(images) <= _PIECE:
            return run(images)
        return torch.cat([run(piece) for piece in torch.split(images, _PIECE)])

    return run_pieces


def _eager(job: Job) -> Runner:
    def run(images: Tensor) -> Tensor:
        logits: Tensor = job.prepared(images)
        return logits

    return _on_gpu(run, job) if job.example.device.type == "cuda" else _in_pieces(run, job)


def _on_gpu(run: Runner, job: Job) -> Runner:
    """A CUDA graph for batches like the example, since kernels are too short to be launched one by one.

    Other batches are computed by torch as it is. In float32 both are exact.
    """
    plain: Runner = job.prepared
    if job.precision == "float32":
        run, plain = exactly(run, job.example.device), exactly(plain, job.example.device)
    return launched_at_once(run, job.example, plain=plain)


def _inductor(job: Job) -> Runner:
    # freezing packs the weights once, for the processor's matrix products
    options: dict[str, Any] = {"freezing": True}
    if job.example.device.type == "cuda":
        return _on_gpu(_ordinary(torch.compile(job.prepared, dynamic=False, options=options)), job)
    compiled = torch.compile(job.prepared, options=options)
    alone = len(job.example) == 1

    def run(images: Tensor) -> Tensor:
        # always in the same mode and on an ordinary copy, or what was compiled would be compiled anew
        with torch.inference_mode(False), torch.no_grad():
            batch = images.clone(memory_format=torch.contiguous_format)
            if alone:  # compiled for one image: more go one by one
                return torch.cat([compiled(image) for image in torch.split(batch, 1)])
            # the compiler makes a case of its own of one image, and would take another minute for it
            batch = batch if len(images) > 1 else batch.repeat(2, 1, 1, 1)
            torch._dynamo.mark_dynamic(batch, 0)
            logits: Tensor = compiled(batch)
            return logits[: len(images)]

    return run if alone else _in_pieces(run, job)


def _ordinary(compiled: Runner) -> Runner:
    """A compiled network in the same mode whoever calls it, or it would be compiled anew."""

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return compiled(images)

    return run


def _openvino(job: Job) -> Runner:
    with extra_needed("OpenVINO"):
        import openvino
    core = openvino.Core()
    native_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if job.precision == "bf16" and not native_bf16:
        raise ConfigError("this processor has no bfloat16 of its own")
    model = openvino_model(job.prepared, job.example[:1].expand(2, -1, -1, -1).contiguous())
    if job.precision == "int8":
        model = _quantized(model, job)
    # Each core takes images of its own, so that none waits for another within a layer; one image is shared by all
    threads = torch.get_num_threads()
    streams = min(len(job.example), threads)
    options = {
        # int8 leaves norms and softmax to floats, of which half the bits are enough between 8-bit products
        "INFERENCE_PRECISION_HINT": "bf16" if native_bf16 and job.precision != "float32" else "f32",
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": threads,
    }

    @functools.cache
    def compiled(size: int) -> Any:
        """For that many images at once, which is faster, or with -1 for any number."""
        shaped = model.clone()
        shaped.reshape([size, *job.example.shape[1:]])
        return openvino.AsyncInferQueue(core.compile_model(shaped, "CPU", options), streams)

    def piece_size(count: int) -> int:
        return min(-(-count // streams), _STREAM_PIECE)

    usual = piece_size(len(job.example))

    def run(images: Tensor) -> Tensor:
        fits = len(images) % usual == 0
        queue, size = (compiled(usual), usual) if fits else (compiled(-1), piece_size(len(images)))
        found: dict[int, Tensor] = {}

        def collect(request: Any, index: int) -> None:
            # a copy, since OpenVINO writes the next answer into the same memory
            found[index] = torch.from_numpy(request.get_output_tensor().data.copy())

        queue.set_callback(collect)
        for index, piece in enumerate(torch.split(images.contiguous(), size)):
            queue.start_async(piece.numpy(), index)
        queue.wait_all()
        return torch.cat([found[index] for index in range(len(found))])

    return run


def _quantized(model: Any, job: Job) -> Any:
    """The network with weights and activations in 8 bits where NNCF finds that a transformer bears it.

    Differs from NNCF's defaults, with which more than twice as many answers change:

    - Weights use half their range where a processor has no 8-bit dot products: it sums two of them in 16 bits, which
      overflow.
    - Ranges of activations are symmetric.
    - Convolutions, which turn pixels into the first tokens, stay in float32.
    """
    if job.calibration is None:
        raise ConfigError("int8 needs calibration images: pass calibration=, a few hundred of those to come")
    with extra_needed("int8"):
        import nncf
    logging.getLogger("nncf").setLevel(logging.ERROR)
    batches = nncf.Dataset([image.contiguous().numpy() for image in torch.split(job.calibration, 1)])
    overflow = nncf.OverflowFix.DISABLE if has_int8_products() else nncf.OverflowFix.ENABLE
    # it draws progress bars on the standard output
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        return nncf.quantize(
            model,
            batches,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(job.calibration),
            ignored_scope=nncf.IgnoredScope(types=["Convolution"], validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
        )


def _onnxruntime(job: Job) -> Runner:
    kind = FORMATS["onnx"]
    with TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        kind.write(job.prepared, job.example[:1].expand(2, -1, -1, -1).contiguous(), path, "")
        return _in_pieces(kind.open(path), job)


BACKENDS: dict[BackendName, Backend] = {
    "eager": Backend(_eager, ("float32", "bf16"), ("cpu", "cuda", "mps")),
    "inductor": Backend(_inductor, ("float32", "bf16"), ("cpu", "cuda")),
    "openvino": Backend(_openvino, ("float32", "bf16", "int8")),
    "onnxruntime": Backend(_onnxruntime, ("float32",)),
}


def precisions_here(device: torch.device) -> tuple[Precision, ...]:
    """What a device computes in by itself, apart from int8, which needs images."""
    return ("float32", "bf16") if has_bf16(device) else ("float32",)


def network_dtype(backend: BackendName, precision: Precision) -> torch.dtype:
    """What a network is cast to before a backend gets it: torch's own take it as it is, the others cast themselves."""
    in_torch = backend in ("eager", "inductor") and precision == "bf16"
    return torch.bfloat16 if in_torch else torch.float32
