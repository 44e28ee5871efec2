"""A model as one file for another runtime, run and compared with the model before it is handed over."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..config import nearest
from ..data.classes import class_labels
from ..errors import AgreementError, ConfigError
from ..files import atomic_write
from ..models.layers import ImageClassifier
from .network import Prepared, TokenMerging, as_input, merging_plan, prepare
from .runtimes import FORMATS, Format, FormatName, open_exported

TOLERANCE = 1e-4
"""By how much a logit may differ from the model's, in float32."""
_CHECKED_BATCHES = (1, 3)  # neither is the batch the network was traced with


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A file that was written and found to give the model's logits.

    Attributes:
        path: the file; an OpenVINO file has its weights beside it, as `.bin`.
        format: "onnx", "openvino" or "torch-export".
        size_bytes: of all files together.
        max_abs_diff: the largest difference of a logit to the model's, over the images that were compared.
        tolerance: what it was allowed to be.
    """

    path: Path
    format: str
    size_bytes: int
    max_abs_diff: float
    tolerance: float


@torch.no_grad()
def export(
    model: ImageClassifier,
    path: str | os.PathLike[str],
    *,
    format: FormatName = "onnx",  # noqa: A002
    preprocessing: bool = False,
    tolerance: float = TOLERANCE,
    token_merging: TokenMerging = 0,
) -> Exported:
    """Write a model as one file for ONNX Runtime, OpenVINO or `torch.export.load`, for any batch size.

    The file takes a batch (B, 3, H, W) of the model's input size and gives float32 logits (B, num_classes). It is run
    on random images, in batches of 1 and 3, and compared with the model; only then does it appear under its name. Its
    metadata, under the key "deit_models", is JSON with the class names and the transform, see
    `deploy.formats.read_metadata`.

    Args:
        model: on the CPU or elsewhere; left as it is.
        path: ends in .onnx, .xml or .pt2, as the format asks for.
        format: "onnx", "openvino" (an .xml file, its weights beside it as .bin) or "torch-export".
        preprocessing: whether the file normalises: it then takes pixels from 0 to 255 as uint8.
        tolerance: by how much a logit may differ.
        token_merging: as `optimize` takes it. The file is compared with the merged network; how that agrees with the
            model is not measured here, but by `optimize`.

    Raises: ConfigError: an unknown format, a wrong suffix, weights too large for the format, tokens that cannot be
        merged. MissingExtraError: the
        format's library is not installed. AgreementError: the file gives other logits. SaveError: it cannot be
        written.
    """
    kind, path = _kind(format), Path(path)
    if path.suffix != kind.suffix:
        raise ConfigError(f"{path}: expected a name that ends in {kind.suffix} for format={format!r}")
    plan = merging_plan(model, token_merging)
    prepared = prepare(model, pixels=preprocessing, token_merging=plan).cpu()
    example = _images(model, 2, pixels=preprocessing)
    metadata = json.dumps({**describe(model, pixels=preprocessing), "token_merging": plan})
    # the folder is beside the final place, so that moving a complete file there is one step
    with atomic_write(path) as temporary, TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        written = [Path(folder, path.name), *([Path(folder, path.stem + kind.companion)] if kind.companion else [])]
        kind.write(prepared, example, written[0], metadata)
        size_bytes = sum(file.stat().st_size for file in written)
        reference = prepare(model, fold=False, token_merging=plan).cpu()
        difference = _difference(reference, model, written[0], pixels=preprocessing)
        if not difference <= tolerance:  # also if it is no number
            raise AgreementError(
                f"{path}: a logit differs by {difference:.3g} from the model's, {tolerance:g} is allowed; not written"
            )
        for file in written[1:]:
            with atomic_write(path.with_suffix(kind.companion)) as second:
                os.replace(file, second)
        os.replace(written[0], temporary)
    return Exported(path=path, format=format, size_bytes=size_bytes, max_abs_diff=difference, tolerance=tolerance)


def _kind(name: FormatName) -> Format:
    if name not in FORMATS:
        raise ConfigError(f"format={name!r}; expected one of {', '.join(FORMATS)}{nearest(name, FORMATS)}")
    return FORMATS[name]


def describe(model: ImageClassifier, *, pixels: bool) -> dict[str, Any]:
    """What a file says of itself, as plain values."""
    origin = model.origin
    return {
        "model": None if origin is None else origin.name,
        "class_names": list(class_labels(model)),
        "preprocessing": None if origin is None else origin.preprocessing.to_dict(),
        "pixels": pixels,
        "input": [model.config.in_chans, *model.config.image_hw],
        "dataset": None if origin is None else origin.dataset,
        "licence": None if origin is None else origin.licence,
        "source": None if origin is None else origin.source,
    }


def _images(model: ImageClassifier, count: int, *, pixels: bool) -> Tensor:
    """Random images of a model's input size, on the CPU; with the same count, the same ones."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, model.config.in_chans, *model.config.image_hw)
    drawn = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    return as_input(model, drawn, pixels=pixels)


def _difference(reference: Prepared, model: ImageClassifier, file: Path, *, pixels: bool) -> float:
    """The largest difference of a logit to those of the model, as it was before anything was folded."""
    run, worst = open_exported(file), []
    for count in _CHECKED_BATCHES:
        expected = reference(_images(model, count, pixels=False))
        found = run(_images(model, count, pixels=pixels))
        if found.shape != expected.shape:
            return float("nan")
        worst.append((found - expected).abs().max())
    return float(torch.stack(worst).max())  # torch's max gives NaN if one is among them
