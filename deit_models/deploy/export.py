"""`export`: a model as a file or folder for other programs; it is run and compared with the model before it appears."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from ..config import nearest
from ..errors import AgreementError, ConfigError
from ..files import atomic_write, write_json
from ..formats.layouts import CONFIG_NAME, PROCESSOR_NAME, known_origin, layouts_of
from ..formats.transformers_config import write_labels, write_processor, write_transformers_config
from ..images.decoding import load_image
from ..images.transforms import EvalTransform
from ..models.layers import ImageClassifier
from ..registry import own_model
from ..scoring.evaluation import class_labels
from .hardware import Runner
from .network import Prepared, TokenMerging, TransformLayer, merging_plan, prepare, random_images
from .runtimes import EXPORT_FORMATS, ExportFormat, ExportFormatName, extra_needed, format_of, open_onnx, write_onnx

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of a logit to the model's, in float32."""
MIN_AGREEMENT = 0.9
"""Share of the images on which the quantised network must decide as the model does."""
WEB_FORMAT = "transformers.js"
_WEB_TYPES = ("deit", "vit")
"""Values of `model_type` that its image classification knows; it runs the ONNX file, whatever the type."""
_SIDES = {2: "height", 3: "width"}
_CHECKED_BATCHES = (1, 3)  # the network was traced with 2
_JUDGES, _ONE_LABEL = 64, "single_label_classification"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A written file that gives the model's logits. An OpenVINO file has its weights beside `path`, as `.bin`.

    `size_bytes` counts all files; `max_abs_diff` is the largest difference of a logit to the model's over the compared
    images, `tolerance` the allowed one. For transformers.js, `path` is the folder, `quantised_bytes` is the size of
    model_quantized.onnx, and `agreement` the share of `images` images for which that decides as the model does.
    """

    path: Path
    format: str
    size_bytes: int
    max_abs_diff: float
    tolerance: float
    quantised_bytes: int = 0
    agreement: float | None = None
    images: int = 0


def export(
    model: ImageClassifier,
    path: str | os.PathLike[str],
    *,
    format: ExportFormatName | Literal["transformers.js"] | None = None,  # noqa: A002
    preprocessing: bool | None = None,
    tolerance: float = TOLERANCE,
    token_merging: TokenMerging = 0,
    images: Tensor | Sequence[Any] | None = None,
    min_agreement: float | None = None,
) -> Exported:
    """Write a model as one file for ONNX Runtime, OpenVINO or `torch.export.load`, or as a folder for transformers.js.

    The file takes a batch (B, 3, H, W) of the model's input size, for any B, and gives float32 logits (B, num_classes).
    It is run on random images, in batches of 1 and 3, and compared with the model; only then does it appear under its
    name. Its metadata, under the key "deit_models", is JSON with the class names and the transform, see
    `deploy.runtimes.read_metadata`.

    The folder holds config.json, preprocessor_config.json, onnx/model.onnx and onnx/model_quantized.onnx (weights in
    8 bits). `pipeline("image-classification", ...)` of the npm package @huggingface/transformers loads it.

    Args:
        model: on any device; it stays as it is.
        path: ends in .onnx, .xml (OpenVINO, its weights beside it as .bin) or .pt2 (torch.export); or a folder.
        format: "onnx", "openvino", "torch-export" or "transformers.js"; by default that of the suffix.
        preprocessing: whether the file normalises: it then takes pixels from 0 to 255 as uint8. For transformers.js,
            whether the network also resizes and crops: it then takes RGB pixels of any size, and gives the
            probabilities of this package; images of different sizes must be classified one by one. By default so, where
            a network can compute the transform; otherwise transformers.js resizes by its own filters.
        tolerance: allowed difference of a logit.
        token_merging: see `optimize`. The file is compared with the merged network; the agreement of that with the
            model is measured by `optimize`, not here.
        images: to judge the quantised network by: files and other images, or a batch as the network takes it. By
            default 64 random ones, which say little about photographs.
        min_agreement: share of them on which the quantised network must decide as the model does; default 0.9.

    Raises: ConfigError: an unknown format, a wrong suffix, weights too large for the format, tokens that cannot be
        merged, a model that transformers.js cannot serve. MissingExtraError: the format's library is not installed.
        AgreementError: the file gives other logits. SaveError: it cannot be written.
    """
    path, known = Path(path), (*EXPORT_FORMATS, WEB_FORMAT)
    format = format_of(path) if format is None else format  # noqa: A001
    if format not in known:
        raise ConfigError(f"format={format!r}; expected one of {', '.join(known)}{nearest(format, known)}")
    model = own_model(model)
    plan = merging_plan(model, token_merging)
    if format == WEB_FORMAT:
        given = MIN_AGREEMENT if min_agreement is None else min_agreement
        if not 0 <= given <= 1:
            raise ConfigError(f"min_agreement={given}; expected a share from 0 to 1")
        options: dict[str, Any] = {"plan": plan, "tolerance": tolerance, "images": images, "least": given}
        return _write_web(model, path, preprocessing, **options)
    if images is not None or min_agreement is not None:
        raise ConfigError(f"images and min_agreement are for format={WEB_FORMAT!r}, which quantises; leave them out")
    kind = EXPORT_FORMATS[cast(ExportFormatName, format)]
    if path.suffix != kind.suffix:
        raise ConfigError(f"{path}: expected a name that ends in {kind.suffix} for format={format!r}")
    pixels = bool(preprocessing)
    size_bytes, difference = _write(model, path, kind, pixels=pixels, tolerance=tolerance, plan=plan)
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
        reference = prepare(model, fold=False, plan=plan).cpu()
        pairs = [[random_images(model, count, pixels=flag) for flag in (pixels, False)] for count in _CHECKED_BATCHES]
        difference = _difference(path, kind.open(file), reference, pairs, tolerance)
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


def _difference(
    path: Path, run: Runner, reference: nn.Module, pairs: Sequence[Sequence[Tensor]], tolerance: float
) -> float:
    """Largest difference of a logit to the reference's; each pair is the input of the one and of the other.

    Raises: AgreementError: more than the tolerance, a wrong shape, or no number.
    """
    worst = 0.0
    for images, plain in pairs:
        expected, found = reference(plain), run(images)
        difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("nan")
        if not difference <= tolerance:  # also for NaN
            raise AgreementError(
                f"{path}: a logit differs by {difference:.3g} from the model's, {tolerance:g} is allowed; not written"
            )
        worst = max(worst, difference)
    return worst


# transformers.js


def _write_web(model: ImageClassifier, path: Path, inside: bool | None, **options: Any) -> Exported:
    """Write a folder for transformers.js. Raises: see `export`."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; expected a folder to write to")
    config, spec, transform = _web_config(model), known_origin(model).preprocessing, None
    try:
        transform = TransformLayer(spec) if inside is not False else None
    except ConfigError as error:
        if inside:
            raise
        logger.warning("transformers.js will resize by its own filters: %s", error)
    # in node, filters other than lanczos skip pixels of large images; a browser has its own filter in any case
    steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), False)
    kind = {"image_processor_type": "DeiTImageProcessor"}
    processor = {**kind, **steps} if transform else {**write_processor(spec), "resample": 1}
    with atomic_write(path / CONFIG_NAME) as temporary, TemporaryDirectory(dir=path, prefix=".") as made:
        folder = Path(made)
        figures = _write_networks(model, folder / "onnx", transform, **options)
        write_json(folder / PROCESSOR_NAME, processor)
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in files:
            with atomic_write(path / file.relative_to(folder)) as place:
                os.replace(file, place)
        temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    size_bytes = sum((path / file.relative_to(folder)).stat().st_size for file in (*files, folder / CONFIG_NAME))
    return Exported(path=path, format=WEB_FORMAT, size_bytes=size_bytes, **figures)


def write_hub_networks(model: ImageClassifier, folder: Path) -> None:
    """Write onnx/ for transformers.js into a folder in the layout of transformers. Raises: see `push_to_hub`."""
    kind = write_transformers_config(model, known_origin(model), layouts_of(model.family))["model_type"]
    if kind not in _WEB_TYPES:
        raise ConfigError(f"onnx=True: {WEB_FORMAT} has no {kind!r}; upload what export(format={WEB_FORMAT!r}) writes")
    _web_config(model)
    _write_networks(model, folder / "onnx", None)


def _web_config(model: ImageClassifier) -> dict[str, Any]:
    """The config.json, of type "vit" if transformers.js does not know the model's own.

    Raises: ConfigError: a model that is no classifier of RGB images.
    """
    origin, problem = known_origin(model), _problem(model)
    if problem == "regression" or not model.num_classes or model.config.in_chans != 3:
        given = f"num_classes={model.num_classes}, in_chans={model.config.in_chans}, problem_type={problem!r}"
        raise ConfigError(f"{given}; transformers.js gives probabilities of classes for RGB images; use format='onnx'")
    if problem != _ONE_LABEL:
        logger.warning(
            "the pipeline of transformers.js takes a softmax, which is wrong for problem_type=%r; take the sigmoid of "
            "the logits of AutoModelForImageClassification instead, see docs/deployment.md",
            problem,
        )
    with suppress(ConfigError):  # transformers itself has no such model
        config = write_transformers_config(model, origin, layouts_of(model.family))
        if config["model_type"] in _WEB_TYPES:
            return config
    return {"architectures": ["ViTForImageClassification"], "model_type": "vit", **write_labels(model, origin)}


def _problem(model: ImageClassifier) -> str:
    """The `problem_type` of a model; a single logit is a label that applies or not."""
    default = _ONE_LABEL if model.num_classes > 1 else "multi_label_classification"
    return known_origin(model).problem_type or default


@torch.no_grad()
def _write_networks(
    model: ImageClassifier,
    folder: Path,
    inside: TransformLayer | None,
    *,
    plan: tuple[int, ...] = (),
    tolerance: float = TOLERANCE,
    images: Tensor | Sequence[Any] | None = None,
    least: float = MIN_AGREEMENT,
) -> dict[str, Any]:
    """Write model.onnx and model_quantized.onnx, compared with the model; gives the figures of `Exported`."""
    folder.mkdir(parents=True)
    exact, quantised, pixels = folder / "model.onnx", folder / "model_quantized.onnx", inside is not None
    network, reference = (prepare(model, fold=fold, plan=plan).cpu() for fold in (True, False))
    (height, width), free = model.config.image_hw, {0: "batch"}
    sizes = [(height, width)] * 3
    if inside is not None:
        network, reference = (Prepared(nn.Sequential(inside, part), torch.float32) for part in (network, reference))
        sizes, free = [(height + 13, 2 * width + 1), (2 * height + 7, width - 3), (height, width)], {**free, **_SIDES}
    batches = [
        nn.functional.interpolate(random_images(model, count, pixels=pixels).float(), size, mode="bilinear")
        for count, size in zip((2, *_CHECKED_BATCHES), sizes, strict=True)
    ]
    write_onnx(network, batches[0], exact, _metadata(model, pixels=pixels, plan=plan), free=free)
    difference = _difference(exact, open_onnx(exact), reference, [(x, x) for x in batches[1:]], tolerance)
    _quantise(exact, quantised)
    several, run, same = _problem(model) != _ONE_LABEL, open_onnx(quantised), []
    for image in _judged(model, images, pixels=pixels):
        ours, theirs = (part(image) > 0 if several else part(image).argmax(1) for part in (reference, run))
        same.append((ours == theirs).double().mean())
    if not same:
        raise ConfigError("images is empty; give some to judge the quantised network by, or leave it out")
    agreement = float(torch.stack(same).mean())
    if agreement < least:
        raise AgreementError(
            f"{quantised.name}: {agreement:.1%} agree on {len(same)} images, min_agreement={least:g} is asked for; "
            "judge by images= of yours, or ask for less"
        )
    figures = {"max_abs_diff": difference, "tolerance": tolerance, "agreement": agreement, "images": len(same)}
    return figures | {"quantised_bytes": quantised.stat().st_size}


def _judged(model: ImageClassifier, images: Tensor | Sequence[Any] | None, *, pixels: bool) -> Iterator[Tensor]:
    """Images as the network takes them, one by one, (1, C, H, W). Raises: ImageError: one cannot be decoded."""
    images = random_images(model, _JUDGES, pixels=pixels) if images is None else images
    if isinstance(images, Tensor):
        yield from torch.split(images.cpu().float(), 1)
        return
    transform = EvalTransform(known_origin(model).preprocessing)
    for named in images:
        image = named[1] if isinstance(named, tuple) else named  # of `image_sources`: a name and the bytes
        yield (pil_to_tensor(load_image(image)).float() if pixels else transform(image))[None]


def _quantise(file: Path, smaller: Path) -> None:
    """Weights of linear layers as 8 bits, a scale for each output; activations are quantised as they come."""
    with extra_needed("quantising ONNX"):
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.quantization.shape_inference import quant_pre_process
    inferred = smaller.with_suffix(".inferred")
    quant_pre_process(file, inferred, skip_optimization=True, skip_symbolic_shape=True)
    # convolutions stay as they are: there, 8 bits change predictions; with signs, products overflow on older processors
    kinds = ["MatMul", "Gemm"]
    quantize_dynamic(inferred, smaller, kinds, per_channel=True, weight_type=QuantType.QUInt8)
    inferred.unlink()
