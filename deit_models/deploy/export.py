"""`export`: a model as one file for another runtime; the file is run and compared with the model before it appears."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..config import nearest
from ..errors import AgreementError, ConfigError
from ..evaluation import class_labels
from ..files import atomic_write
from ..models.layers import ImageClassifier
from ..registry import own_model
from .hardware import Runner
from .network import TokenMerging, merging_plan, prepare, random_images
from .runtimes import EXPORT_FORMATS, ExportFormat, ExportFormatName, format_of

TOLERANCE = 1e-4
"""Largest difference of a logit to the model's, in float32."""
_CHECKED_BATCHES = (1, 3)  # the network was traced with 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A written file that gives the model's logits. An OpenVINO file has its weights beside `path`, as `.bin`.

    `size_bytes` counts both files; `max_abs_diff` is the largest difference of a logit to the model's over the compared
    images, `tolerance` the allowed one.
    """

    path: Path
    format: str
    size_bytes: int
    max_abs_diff: float
    tolerance: float


def export(
    model: ImageClassifier,
    path: str | os.PathLike[str],
    *,
    format: ExportFormatName | None = None,  # noqa: A002
    preprocessing: bool = False,
    tolerance: float = TOLERANCE,
    token_merging: TokenMerging = 0,
) -> Exported:
    """Write a model as one file for ONNX Runtime, OpenVINO or `torch.export.load`, for any batch size.

    The file takes a batch (B, 3, H, W) of the model's input size and gives float32 logits (B, num_classes). It is run
    on random images, in batches of 1 and 3, and compared with the model; only then does it appear under its name. Its
    metadata, under the key "deit_models", is JSON with the class names and the transform, see
    `deploy.runtimes.read_metadata`.

    Args:
        model: on any device; it stays as it is.
        path: ends in .onnx, .xml (OpenVINO, its weights beside it as .bin) or .pt2 (torch.export).
        format: "onnx", "openvino" or "torch-export"; by default that of the suffix.
        preprocessing: whether the file normalises: it then takes pixels from 0 to 255 as uint8.
        tolerance: allowed difference of a logit.
        token_merging: see `optimize`. The file is compared with the merged network; the agreement of that with the
            model is measured by `optimize`, not here.

    Raises: ConfigError: an unknown format, a wrong suffix, weights too large for the format, tokens that cannot be
        merged. MissingExtraError: the format's library is not installed. AgreementError: the file gives other logits.
        SaveError: it cannot be written.
    """
    path = Path(path)
    format = format_of(path) if format is None else format  # noqa: A001
    if format not in EXPORT_FORMATS:
        known = ", ".join(EXPORT_FORMATS)
        raise ConfigError(f"format={format!r}; expected one of {known}{nearest(format, EXPORT_FORMATS)}")
    kind = EXPORT_FORMATS[format]
    if path.suffix != kind.suffix:
        raise ConfigError(f"{path}: expected a name that ends in {kind.suffix} for format={format!r}")
    model = own_model(model)
    plan = merging_plan(model, token_merging)
    size_bytes, difference = _write(model, path, kind, pixels=preprocessing, tolerance=tolerance, plan=plan)
    return Exported(path=path, format=format, size_bytes=size_bytes, max_abs_diff=difference, tolerance=tolerance)


@torch.no_grad()
def _write(
    model: ImageClassifier, path: Path, kind: ExportFormat, *, pixels: bool, tolerance: float, plan: tuple[int, ...]
) -> tuple[int, float]:
    """Write and compare a file; gives its size in bytes and the largest difference. Raises: see `export`."""
    prepared = prepare(model, pixels=pixels, plan=plan).cpu()
    metadata = _metadata(model, pixels=pixels, plan=plan)
    # the folder is beside the final place, so that a complete file is moved there in one step
    with atomic_write(path) as temporary, TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        file = Path(folder, path.name)
        kind.write(prepared, random_images(model, 2, pixels=pixels), file, metadata)
        written = list(file.parent.iterdir())  # OpenVINO writes two files
        size_bytes = sum(part.stat().st_size for part in written)
        difference = _difference(kind.open(file), model, pixels=pixels, plan=plan)
        if not difference <= tolerance:  # also for NaN
            raise AgreementError(
                f"{path}: a logit differs by {difference:.3g} from the model's, {tolerance:g} is allowed; not written"
            )
        for part in written:
            if part != file:
                with atomic_write(path.with_name(part.name)) as second:
                    os.replace(part, second)
        os.replace(file, temporary)
    return size_bytes, difference


def _metadata(model: ImageClassifier, *, pixels: bool, plan: tuple[int, ...]) -> str:
    origin = model.origin
    record = {
        "model": origin and origin.name,
        "class_names": list(class_labels(model)),
        "problem_type": origin and origin.problem_type,
        "preprocessing": origin and origin.preprocessing.to_dict(),
        "pixels": pixels,
        "input": [model.config.in_chans, *model.config.image_hw],
        "dataset": origin and origin.dataset,
        "licence": origin and origin.licence,
        "source": origin and origin.source,
        "token_merging": plan,
    }
    return json.dumps(record)


def _difference(run: Runner, model: ImageClassifier, *, pixels: bool, plan: tuple[int, ...]) -> float:
    """Largest difference of a logit to the unfolded network's; NaN for a wrong shape or if a logit is NaN."""
    reference, worst = prepare(model, fold=False, plan=plan).cpu(), []
    for count in _CHECKED_BATCHES:
        expected = reference(random_images(model, count, pixels=False))
        found = run(random_images(model, count, pixels=pixels))
        if found.shape != expected.shape:
            return float("nan")
        worst.append((found - expected).abs().max())
    return float(torch.stack(worst).max())  # torch's max gives NaN if one is NaN
