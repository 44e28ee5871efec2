"""transformers' config.json and preprocessor_config.json, read and written, as far as families are alike."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from ..checkpoint import IMAGENET_MEAN, IMAGENET_STD, ModelLike, Origin, Preprocessing
from ..config import is_finite
from ..errors import ConfigError
from ..files import tuples
from ..registry import default_preprocessing
from .family import Description, FamilyLayouts, nearest_registered, read_class_names, write_class_names

_FILE = "preprocessor_config.json"
# Pillow's resampling filters by the numbers image processors store.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_HALF = (0.5, 0.5, 0.5)
_CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
# Settings that every processor has; None: to be given where it is used.
_SETTINGS = {
    **{"do_resize": True, "size": 224, "default_to_square": True, "resample": 3, "crop_size": None},
    **{"do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
    # the last is of our own files: the transform of the weights, which transformers follows to half a pixel
    **{"image_mean": _HALF, "image_std": _HALF, "rounding": None},
}
_CROPPED = {"size": {"shortest_edge": 224}, "default_to_square": False, "crop_size": 224, "do_center_crop": True}
# Processors that do no more than these settings say, with the defaults in which they differ.
_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "ViT": {"resample": 2},
    "DeiT": {"size": 256, "crop_size": 224, "do_center_crop": True},
    "Levit": {**_CROPPED, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
    "CLIP": {**_CROPPED, **_CLIP},
    "Bit": {**_CROPPED, **_CLIP},
    "Siglip": {"default_to_square": False},
}
_OF_MODELS = {"vit": "ViT", "deit": "DeiT", "levit": "Levit"}
# Names, settings of a call, and padding, which is refused by `do_pad`; so are fields that begin with "_".
_WITHOUT_EFFECT = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "name_or_path", "model_type"),
    *("do_convert_rgb", "data_format", "input_data_format", "device", "return_tensors", "disable_grouping"),
    *("pad_size", "image_seq_length", "model_input_names", "num_channels", "transformers_version", "use_fast"),
}


def read_transformers_config(
    data: Mapping[str, Any], processor: Mapping[str, Any] | None, families: Mapping[str, FamilyLayouts]
) -> Description:
    """A transformers config, and the transform of the processor beside it (without one, the authors').

    Raises: ConfigError: a model_type of no family here, or values that cannot be built.
    """
    kind = data["model_type"]
    layouts = next((layouts for layouts in families.values() if kind in layouts.model_types), None)
    if layouts is None:
        known = ", ".join(repr(name) for layouts in families.values() for name in layouts.model_types)
        raise ConfigError(f"config.json is of model_type {kind!r}; deit-models loads {known}")
    labels = data.get("id2label") or _inverse(data.get("label2id"))
    # Configs leave fields out that have transformers' default: two classes.
    num_classes = len(labels) if labels else data.get("num_labels", 2)
    if data.get("num_labels") not in (None, num_classes):
        raise ConfigError(f"config.json has num_labels={data['num_labels']!r} and {num_classes} names of classes")
    config = replace(layouts.read_transformers(tuples(data)), num_classes=num_classes)
    architectures = data.get("architectures") or ()
    backbone = not any("ForImageClassification" in name for name in architectures)
    headless = bool(architectures) and backbone
    name = nearest_registered(replace(config, num_classes=0) if headless else config, layouts.family)
    preprocessing = None if processor is None else read_processor(processor, kind, channels=config.in_chans)
    origin = Origin(
        name=name or kind,
        preprocessing=preprocessing or default_preprocessing(name or "", config.image_hw),
        class_names=read_class_names(labels),
        problem_type=data.get("problem_type"),
        thresholds=tuples(data).get("thresholds"),
    )
    return Description(config=config, origin=origin, family=layouts.family, layout="transformers", backbone=backbone)


def write_transformers_config(model: ModelLike, origin: Origin, layouts: FamilyLayouts) -> dict[str, Any]:
    """The config.json from which `AutoModelForImageClassification` builds a model.

    Raises: ConfigError: transformers has no such model.
    """
    if not model.config.num_classes:
        return layouts.write_transformers(model.config)
    return {**layouts.write_transformers(model.config), **write_labels(model, origin)}


def write_labels(model: ModelLike, origin: Origin) -> dict[str, Any]:
    """Fields of a config.json for the names of the classes, `LABEL_0` and so on if they have none, and the problem."""
    names = origin.class_names or tuple(f"LABEL_{index}" for index in range(model.config.num_classes))
    return {
        "id2label": write_class_names(names),
        "label2id": {label: index for index, label in enumerate(names)},
        **({} if origin.problem_type is None else {"problem_type": origin.problem_type}),
        **({} if origin.thresholds is None else {"thresholds": list(origin.thresholds)}),  # which transformers keeps
    }


def _inverse(label2id: Any) -> dict[Any, str] | None:
    """The table `id2label` of a config that has the other direction alone."""
    if not label2id:
        return None
    labels = {index: label for label, index in label2id.items()}
    if len(labels) < len(label2id):
        raise ConfigError("config.json has two names for one class in label2id; each needs a number of its own")
    return labels


def read_processor(processor: Mapping[str, Any], model_type: str, *, channels: int) -> Preprocessing:
    """The transform that `AutoImageProcessor` carries out for a preprocessor_config.json.

    Raises: ConfigError: a setting that is unknown here, out of range, or makes images of several sizes.
    """
    kind, values = _processor_settings(processor, model_type)
    try:
        resize = _read_size(values, enlarged=kind == "Levit")
        spec = Preprocessing(
            resize=resize,
            crop=_read_crop(values, resize),
            interpolation=_FILTERS[values["resample"]],
            mean=_per_channel(values["image_mean"], channels),
            std=_per_channel(values["image_std"], channels),
        )
        return _rescaled(replace(spec, rounding=values["rounding"] or _rounding(spec)), values)
    except ConfigError as error:
        raise ConfigError(f"{_FILE}: {error}") from error


def _processor_settings(processor: Mapping[str, Any], model_type: str) -> tuple[str, dict[str, Any]]:
    """The kind of a processor, and all its settings, with defaults for those that are missing or null."""
    said = processor.get("image_processor_type") or processor.get("feature_extractor_type")
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(said or _OF_MODELS.get(model_type)))
    if kind not in _PROCESSORS:
        raise ConfigError(f"{_FILE} is for {said!r}; known are those of {', '.join(_PROCESSORS)}")
    given = {key: value for key, value in processor.items() if value is not None}
    unknown = {key for key, value in given.items() if value is not False} - _SETTINGS.keys() - _WITHOUT_EFFECT
    if unknown := {key for key in unknown if not key.startswith("_")}:
        raise ConfigError(f"{_FILE} sets {', '.join(sorted(unknown))}, which deit-models does not carry out; remove it")
    values = {key: given.get(key, default) for key, default in {**_SETTINGS, **_PROCESSORS[kind]}.items()}
    for key, value in values.items():
        if key.startswith("do_") and not isinstance(value, bool):
            raise ConfigError(f"{_FILE} has {key}={value!r}; expected true or false")
    resample = values["resample"]
    if not is_finite(resample) or resample not in _FILTERS:
        raise ConfigError(f"{_FILE} has resample={resample!r}; expected a number of Pillow's, 0 to 5")
    return kind, values


def _per_channel(value: Any, channels: int) -> Any:
    """A tuple; a single number is that of all channels."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return numbers * channels if len(numbers) == 1 else numbers


def _read_size(values: Mapping[str, Any], *, enlarged: bool) -> Any:
    """The shorter side or (height, width); None: not resized. LeViT's shorter side is that of the crop, `enlarged`."""
    size = values["size"]
    if not values["do_resize"]:
        return None
    if not isinstance(size, (Mapping, list, tuple)):
        size = {"height": size, "width": size} if values["default_to_square"] else {"shortest_edge": size}
    if not isinstance(size, Mapping):
        return tuple(size)
    size = {key: value for key, value in size.items() if value is not None}
    if size.keys() == {"shortest_edge"}:
        side = size["shortest_edge"]
        # a wrong type or range is refused by `Preprocessing`
        return int(256 / 224 * side) if enlarged and isinstance(side, int) else side
    if size.keys() != {"height", "width"}:
        raise ConfigError(f"size={size}; expected height and width, or shortest_edge alone")
    return size["height"], size["width"]


def _read_crop(values: Mapping[str, Any], resize: Any) -> Any:
    """(height, width) of the input."""
    if not values["do_center_crop"]:
        if isinstance(resize, tuple):
            return resize
        raise ConfigError(
            "images keep their own aspect or size; set size to height and width, or do_center_crop to true"
        )
    crop = values["crop_size"]
    if isinstance(crop, Mapping):
        return tuple(crop.get(key) for key in ("height", "width"))
    return tuple(crop) if isinstance(crop, (list, tuple)) else (crop, crop)


def _rounding(spec: Preprocessing) -> Literal["even", "down"]:
    """Where transformers puts a crop; squashed images mostly have no half pixel to round."""
    squash = spec.resize if isinstance(spec.resize, tuple) else None
    return (
        "even"
        if squash and not any((one - other) % 2 for one, other in zip(squash, spec.crop, strict=True))
        else "down"
    )


def _rescaled(spec: Preprocessing, values: Mapping[str, Any]) -> Preprocessing:
    """The normalisation on values from 0 to 1 that equals the processor's own on values of its scale."""
    factor = values["rescale_factor"] if values["do_rescale"] else 1
    if not is_finite(factor) or not factor > 0:
        raise ConfigError(f"rescale_factor={factor!r}; expected a number above 0")
    scale = 1.0 if math.isclose(255 * factor, 1, rel_tol=1e-6) else 255 * factor
    if not values["do_normalize"]:
        spec = replace(spec, mean=(0.0,) * len(spec.mean), std=(1.0,) * len(spec.std))
    if scale == 1:
        return spec
    return replace(spec, mean=tuple(m / scale for m in spec.mean), std=tuple(s / scale for s in spec.std))


def write_processor(spec: Preprocessing) -> dict[str, Any]:
    """The preprocessor_config.json from which `AutoImageProcessor` builds this transform.

    Raises: ConfigError: transformers has no such transform.
    """
    if isinstance(spec.resize, tuple) and spec.fit == "cover":
        raise ConfigError(f"transformers has no transform like '{spec}'; save the model with layout='native' or 'timm'")
    height, width = spec.resize if isinstance(spec.resize, tuple) else spec.crop
    return {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": spec.resize is not None,
        "size": {"shortest_edge": spec.resize} if isinstance(spec.resize, int) else {"height": height, "width": width},
        "resample": next(number for number, name in _FILTERS.items() if name == spec.interpolation),
        "do_center_crop": spec.resize != spec.crop,
        "crop_size": {"height": spec.crop[0], "width": spec.crop[1]},
        **({} if _rounding(spec) == spec.rounding else {"rounding": spec.rounding}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
