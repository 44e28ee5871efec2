"""Runtimes for a prepared network: backends to compute with here, and file formats for other programs."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..distributed import has_bf16
from ..errors import ConfigError, MissingExtraError
from .hardware import Runner, has_int8_products, no_reports, on_gpu, quiet
from .network import Prepared

ExportFormatName = Literal["onnx", "openvino", "torch-export"]

_INPUT = "pixel_values"  # of ONNX and OpenVINO files: transformers.js and Optimum feed it; files are run by position
METADATA_KEY = "deit_models"
"""Key of our JSON in a file's own metadata."""
_BATCH = {0: "batch"}
_MAX_ONNX_BYTES = 2**31 - 2**24  # a protobuf message ends at 2 GiB; the graph needs some of it


@contextmanager
def extra_needed(purpose: str) -> Iterator[None]:
    """Import an optional library inside. Raises: MissingExtraError: it is not installed."""
    try:
        with quiet():
            yield
    except ImportError as error:
        raise MissingExtraError(f"{purpose} needs {error.name or error}; pip install 'deit-models[export]'") from error


class ExportFormat(NamedTuple):
    """Suffix of a file format, functions to write a file with a batch of 2, open it, and read its metadata (JSON)."""

    suffix: str
    write: Callable[[Prepared, Tensor, Path, str], None]
    open: Callable[[Path], Runner]
    read: Callable[[Path], str | None]


def format_of(path: Path) -> ExportFormatName:
    """The format of a file, by its suffix. Raises: ConfigError: an unknown suffix."""
    names = {kind.suffix: name for name, kind in EXPORT_FORMATS.items()}
    if path.suffix not in names:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in names.items())
        raise ConfigError(f"{path}: unknown kind of file; expected {known}, or format='transformers.js' for a folder")
    return names[path.suffix]


def open_exported(path: Path) -> Runner:
    """A runner for an exported file. Raises: ConfigError: unknown suffix. MissingExtraError: its runtime is missing."""
    return EXPORT_FORMATS[format_of(path)].open(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """The record that `export` wrote: model, class names, transform, whether it takes pixels, input size.

    Raises: ConfigError: a file that `export` did not write. MissingExtraError: its library is not installed.
    """
    text = EXPORT_FORMATS[format_of(path)].read(path)
    if not text:
        raise ConfigError(f"{path} holds no metadata of deit-models; was it written by another program?")
    return dict(json.loads(text))


def _traced(prepared: Prepared, example: Tensor, *, fixed: bool = False) -> torch.export.ExportedProgram:
    """The network as a graph for any batch size; the example has 2 images: a size of 1 would become fixed.

    `fixed`: for batches of the example's size alone, which takes half the time.
    """
    sizes = None if fixed else {"x": {0: torch.export.Dim("batch")}}
    with quiet():
        return torch.export.export(prepared, (example,), dynamic_shapes=sizes)


def write_onnx(
    prepared: Prepared, example: Tensor, path: Path, metadata: str, *, free: Mapping[int, str] = _BATCH
) -> None:
    """Write a network as an ONNX file; `free` names the dimensions of the input that may have any size.

    Raises: ConfigError: too large for the format. MissingExtraError: a library is not installed.
    """
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
            input_names=[_INPUT],
            output_names=["logits"],
            dynamic_shapes={"x": {dim: torch.export.Dim(name) for dim, name in free.items()}},
        )
        if program is None:
            raise ConfigError("torch gave no ONNX program")
        program.model.metadata_props[METADATA_KEY] = metadata
        program.save(str(path), external_data=False)


def open_onnx(file: Path | bytes) -> Runner:
    """A runner for an ONNX file, or its bytes. Raises: MissingExtraError: ONNX Runtime is not installed."""
    with extra_needed("running ONNX"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    source = file if isinstance(file, bytes) else str(file)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])


def _read_onnx(path: Path) -> str | None:
    with extra_needed("reading ONNX"):
        import onnx
    # other programs may store the weights in a second file; they are not needed here
    model = onnx.load(str(path), load_external_data=False)
    return next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)


@functools.cache
def _openvino_core() -> Any:
    """OpenVINO, once in a process. Raises: MissingExtraError: it is not installed.

    Its CPU plugin gives the thread a stack for signals, and takes it back when the core is deleted. Of two cores, the
    second would give back the stack of the first, which may be freed by then: the next signal ends the process.
    """
    with extra_needed("OpenVINO"):
        import openvino
    return openvino.Core()


def _openvino_model(prepared: Prepared, example: Tensor, *, fixed: bool = False) -> Any:
    """The network as an `openvino.Model`, see `_traced`. Raises: MissingExtraError: OpenVINO is not installed."""
    with extra_needed("OpenVINO"):
        import openvino
    with quiet(), no_reports():
        model = openvino.convert_model(_traced(prepared, example, fixed=fixed))
    model.inputs[0].get_tensor().set_names({_INPUT})
    model.outputs[0].get_tensor().set_names({"logits"})
    return model


def _write_openvino(prepared: Prepared, example: Tensor, path: Path, metadata: str) -> None:
    model = _openvino_model(prepared, example)
    import openvino

    model.set_rt_info(metadata, [METADATA_KEY])
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _open_openvino(path: Path) -> Runner:
    # by default OpenVINO takes the fastest precision of the processor, which may be half precision
    compiled = _openvino_core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.contiguous().numpy())[0].copy())


def _read_openvino(path: Path) -> str | None:
    model = _openvino_core().read_model(str(path))
    return str(model.get_rt_info(METADATA_KEY).astype(str)) if model.has_rt_info(METADATA_KEY) else None


def _write_torch(prepared: Prepared, example: Tensor, path: Path, metadata: str) -> None:
    with quiet():
        torch.export.save(_traced(prepared, example), path, extra_files={METADATA_KEY: metadata})


def _open_torch(path: Path) -> Runner:
    with quiet():
        module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images)

    return run


def _read_torch(path: Path) -> str | None:
    found: dict[str, Any] = {METADATA_KEY: ""}
    with quiet():
        torch.export.load(path, extra_files=found)
    text = found[METADATA_KEY]
    return text.decode() if isinstance(text, bytes) else text


EXPORT_FORMATS: dict[ExportFormatName, ExportFormat] = {
    "onnx": ExportFormat(".onnx", write_onnx, open_onnx, _read_onnx),
    "openvino": ExportFormat(".xml", _write_openvino, _open_openvino, _read_openvino),
    "torch-export": ExportFormat(".pt2", _write_torch, _open_torch, _read_torch),
}

BackendName = Literal["eager", "inductor", "openvino", "onnxruntime"]
InferencePrecision = Literal["float32", "bf16", "int8"]

# Images that a CPU computes at once: with more, the output of a layer leaves the caches before the next layer reads it.
# Best of 2 to 32 on two cores with AVX2, for DeiT-Ti and DeiT-S; a stream of OpenVINO has one core, and half as many
_PIECE, _STREAM_PIECE = 8, 4
# freezing packs the weights once for the matrix products of the processor
_COMPILER_OPTIONS: dict[str, Any] = {"freezing": True}


class Way(NamedTuple):
    """A backend and the precision it computes in."""

    backend: BackendName
    precision: InferencePrecision

    def __str__(self) -> str:
        return f"{self.backend} in {self.precision}"


class Job(NamedTuple):
    """Inputs of a backend.

    Attributes:
        prepared: the network.
        example: a typical batch on its device.
        precision: to compute in.
        calibration: images shaped like the example, to find the ranges of an int8 network with.
        kept: `KeepableRunner.to_bytes` of an earlier run; the network is not converted anew.
        shared: converted networks by the size of their batch; the precisions of one network have them in common.
    """

    prepared: Prepared
    example: Tensor
    precision: InferencePrecision
    calibration: Tensor | None = None
    kept: bytes | None = None
    shared: dict[int, Any] | None = None


class KeepableRunner(Protocol):
    """A runner whose compiled network can be kept for a later process."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """See `Runner`."""
        ...

    def to_bytes(self) -> bytes:
        """The compiled network, for `Job.kept` on the same machine with the same libraries."""
        ...


class Backend(NamedTuple):
    """A library that computes networks.

    Attributes:
        build: makes a runner, and may raise any error of the library.
        precisions: those it supports on some machine.
        devices: its device types.
        takes_bf16: whether the network itself is in bfloat16 for bf16; other libraries cast on their own.
        keeps: whether `build` makes a `KeepableRunner`.
        reach: on a CPU, its highest speed over torch itself in the same precision, for batches that take long: the most
            that was measured (benchmarks/results/inference.md), and some more. A backend that cannot win is not built.
        behind: by precision, ways that were faster in every cell of benchmarks/results/choices.md, on processors as in
            `backends_are_ranked`; where one of them works, this backend is not built.
    """

    build: Callable[[Job], Runner]
    precisions: tuple[InferencePrecision, ...]
    devices: tuple[str, ...] = ("cpu",)
    takes_bf16: bool = False
    keeps: bool = False
    reach: float = math.inf
    behind: Mapping[InferencePrecision, tuple[Way, ...]] = {}  # read only

    def dtype(self, precision: InferencePrecision) -> torch.dtype:
        """Network dtype."""
        return torch.bfloat16 if self.takes_bf16 and precision == "bf16" else torch.float32


def ways_on(
    device: torch.device,
    *,
    backends: Mapping[BackendName, Backend],
    precision: InferencePrecision | None = None,
    native_bf16: Callable[[torch.device], bool] = has_bf16,
) -> list[Way]:
    """Pairs of backend and precision for a device; without `precision`, float32 and native bf16, but not int8."""
    wanted = (precision,) if precision else ("float32", "bf16") if native_bf16(device) else ("float32",)
    return [
        Way(name, kind)
        for name, backend in backends.items()
        if device.type in backend.devices
        for kind in backend.precisions
        if kind in wanted
    ]


def _in_pieces(run: Runner) -> Runner:
    """Small batches one after the other, for a CPU."""
    return lambda images: torch.cat([run(piece) for piece in torch.split(images, _PIECE)])


def _eager(job: Job) -> Runner:
    if job.example.device.type == "cuda":
        return on_gpu(job.prepared, job.example, plain=job.prepared, exact=job.precision == "float32")
    return _in_pieces(job.prepared) if job.example.device.type == "cpu" else job.prepared


def _inductor(job: Job) -> Runner:
    if job.example.device.type == "cuda":
        return _inductor_on_gpu(job)
    compiled = torch.compile(job.prepared, options=_COMPILER_OPTIONS)
    alone = len(job.example) == 1

    def run(images: Tensor) -> Tensor:
        # always the same modes and an ordinary copy, since torch compiles again for other ones
        with torch.inference_mode(False), torch.no_grad():
            batch = images.clone(memory_format=torch.contiguous_format)
            if alone:  # compiled for one image: several go one by one
                return torch.cat([compiled(image) for image in torch.split(batch, 1)])
            # torch compiles one image separately, which would take another minute
            batch = batch if len(images) > 1 else batch.repeat(2, 1, 1, 1)
            # torch's documented way to mark a dynamic size; it has no public name, and dynamic=True frees all sizes
            torch._dynamo.mark_dynamic(batch, 0)
            return compiled(batch)[: len(images)]

    return run if alone else _in_pieces(run)


def _inductor_on_gpu(job: Job, *, compiler: Any = torch.compile, cuda: Any = torch.cuda) -> Runner:
    """A CUDA graph of the network compiled for the example's shape; other batches are computed without compiling."""
    compiled = compiler(job.prepared, dynamic=False, options=_COMPILER_OPTIONS)

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # always the same modes, since torch compiles again
            return compiled(images)

    return on_gpu(run, job.example, plain=job.prepared, exact=job.precision == "float32", cuda=cuda)


class _OpenVINORunner:
    """Pieces of a batch, each computed by a core of its own, so that none waits for another within a layer.

    All cores share a single image. Fewer images than a piece go through a network for one image, which is made when it
    is first needed.
    """

    def __init__(self, job: Job) -> None:
        """Convert and compile, or take `job.kept`."""
        self._job, self._core = job, _openvino_core()
        native_bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if job.precision == "bf16" and not native_bf16:
            raise ConfigError("this processor has no bfloat16 of its own")
        threads = torch.get_num_threads()
        self._streams = min(len(job.example), threads)
        self._options = {
            # int8 keeps norms and softmax in floats; between 8-bit products, half precision is enough for them
            "INFERENCE_PRECISION_HINT": "bf16" if native_bf16 and job.precision != "float32" else "f32",
            "NUM_STREAMS": str(self._streams),
            "INFERENCE_NUM_THREADS": threads,
        }
        self._size = min(-(-len(job.example) // self._streams), _STREAM_PIECE)
        if job.kept is None:
            self._compiled = self._compile(self._size)
        else:
            self._compiled = self._core.import_model(io.BytesIO(job.kept), "CPU", self._options)
        self._queue = self._queue_of(self._compiled)
        self._job = job._replace(kept=None, shared=None)  # large, and not needed any more

    def _compile(self, size: int) -> Any:
        return self._core.compile_model(self._converted(size), "CPU", self._options)

    def _converted(self, size: int) -> Any:
        """The network for `size` images at once."""
        job = self._job
        if job.precision == "int8":
            model = self._in_int8.clone()
            model.reshape([size, *job.example.shape[1:]])
            return model
        shared = {} if job.shared is None else job.shared
        if size not in shared:
            shared[size] = _openvino_model(job.prepared, _first(job.example, size), fixed=True)
        return shared[size]

    @functools.cached_property
    def _in_int8(self) -> Any:
        """For any number of images: ranges are found image by image."""
        return _quantized(_openvino_model(self._job.prepared, _first(self._job.example, 2)), self._job.calibration)

    @functools.cached_property
    def _single(self) -> Any:
        return self._queue_of(self._compile(1))

    def _queue_of(self, compiled: Any) -> Any:
        import openvino

        return openvino.AsyncInferQueue(compiled, self._streams)

    def to_bytes(self) -> bytes:
        return bytes(self._compiled.export_model().getvalue())

    def __call__(self, images: Tensor) -> Tensor:
        queue, size = (self._queue, self._size) if len(images) >= self._size else (self._single, 1)
        found: dict[int, Tensor] = {}

        def collect(request: Any, index: int) -> None:
            # a copy, since OpenVINO writes the next output into the same memory
            found[index] = torch.from_numpy(request.get_output_tensor().data.copy())

        queue.set_callback(collect)
        for index, piece in enumerate(torch.split(images.contiguous(), size)):
            missing = size - len(piece)
            queue.start_async((torch.cat([piece, images[:missing]]) if missing else piece).numpy(), index)
        queue.wait_all()
        return torch.cat([found[index] for index in range(len(found))])[: len(images)]


def _first(example: Tensor, size: int) -> Tensor:
    """Its first image as a batch of `size`, to trace with."""
    return example[:1].expand(size, -1, -1, -1).contiguous()


def _quantized(model: Any, calibration: Tensor | None) -> Any:
    """Quantise weights and activations of an OpenVINO model to 8 bits, except where NNCF's transformer rules forbid it.

    Differs from NNCF's defaults, which change more than twice as many predictions:

    - Weights use half their range on processors without 8-bit dot products: those add two products in 16 bits, which
      overflows.
    - Ranges of activations are symmetric.
    - Convolutions, which turn pixels into the first tokens, stay in float32.
    """
    if calibration is None:
        raise ConfigError("int8 needs calibration images: pass calibration=, a few hundred of those to come")
    with extra_needed("int8"):
        import nncf
    logging.getLogger("nncf").setLevel(logging.ERROR)
    batches = nncf.Dataset([image.contiguous().numpy() for image in torch.split(calibration, 1)])
    overflow = nncf.OverflowFix.DISABLE if has_int8_products() else nncf.OverflowFix.ENABLE
    # NNCF draws progress bars on the standard output
    with quiet(), contextlib.redirect_stdout(io.StringIO()), no_reports():
        return nncf.quantize(
            model,
            batches,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
            ignored_scope=nncf.IgnoredScope(types=["Convolution"], validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
        )


class _ONNXRunner:
    """A session of ONNX Runtime, and the file that it was made from."""

    def __init__(self, job: Job) -> None:
        """Write the network as ONNX, or take `job.kept`."""
        self._file = job.kept or self._written(job)
        self._run = _in_pieces(open_onnx(self._file))

    @staticmethod
    def _written(job: Job) -> bytes:
        with TemporaryDirectory() as folder:
            path = Path(folder, "network.onnx")
            write_onnx(job.prepared, _first(job.example, 2), path, "")
            return path.read_bytes()

    def to_bytes(self) -> bytes:
        return self._file

    def __call__(self, images: Tensor) -> Tensor:
        return self._run(images)


_OPENVINO_BF16, _OPENVINO_FLOAT32 = Way("openvino", "bf16"), Way("openvino", "float32")
_TORCH: dict[str, Any] = {
    "precisions": ("bf16", "float32"),
    "takes_bf16": True,
    "behind": {"bf16": (_OPENVINO_BF16,), "float32": (_OPENVINO_BF16, _OPENVINO_FLOAT32)},
}
_BF16_WINS: dict[InferencePrecision, tuple[Way, ...]] = {"float32": (_OPENVINO_BF16,)}

# the likeliest to win first, so that others need not be built
BACKENDS: dict[BackendName, Backend] = {
    "openvino": Backend(_OpenVINORunner, ("bf16", "float32", "int8"), keeps=True, behind=_BF16_WINS),
    "eager": Backend(_eager, devices=("cpu", "cuda", "mps"), reach=1.0, **_TORCH),
    "onnxruntime": Backend(_ONNXRunner, ("float32",), keeps=True, reach=1.4, behind=_BF16_WINS),
    "inductor": Backend(_inductor, devices=("cpu", "cuda"), reach=1.3, **_TORCH),
}
