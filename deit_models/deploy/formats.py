"""The files a model can be taken elsewhere in: how each is written, opened and run, and what it says of itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, MissingExtraError
from .prepared import Prepared

Runner = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) to logits (B, num_classes) in float32, for any B from 1."""

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


@contextmanager
def extra_needed(what: str) -> Iterator[None]:
    """Import an optional library inside. Raises: MissingExtraError: it is not installed."""
    try:
        with quiet():
            yield
    except ImportError as error:
        raise MissingExtraError(f"{what} needs {error.name or error}; pip install 'deit-models[export]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of other libraries from users, who can do nothing about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
