"""transformers' config.json and preprocessor_config.json, read and written, as far as families are alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..checkpoint import IMAGENET_MEAN, IMAGENET_STD, ModelLike, Origin, Preprocessing, load_manifest
from ..errors import ConfigError
from ..files import tuples
from ..registry import default_preprocessing, model_spec
from .family import Description, FamilyLayouts, read_class_names, write_class_names

# Pillow's resampling filters by the numbers image processors store.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_HALF = (0.5, 0.5, 0.5)


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
    labels = data.get("id2label")
    # Configs leave fields out that have transformers' default: two classes.
    num_classes = len(labels) if labels else data.get("num_labels", 2)
    config = replace(layouts.read_transformers(tuples(data)), num_classes=num_classes)
    name = _registered_name(config, layouts.family)
    preprocessing = _read_processor(processor, config.image_hw) if processor is not None else None
    origin = Origin(
        name=name or kind,
        preprocessing=preprocessing or default_preprocessing(name or "", config.image_hw),
        class_names=read_class_names(labels),
    )
    return Description(config=config, origin=origin, family=layouts.family, layout="transformers")


def write_transformers_config(model: ModelLike, origin: Origin, layouts: FamilyLayouts) -> dict[str, Any]:
    """The config.json from which `AutoModelForImageClassification` builds a model.

    Raises: ConfigError: transformers has no such model.
    """
    names = origin.class_names or tuple(f"LABEL_{index}" for index in range(model.config.num_classes))
    return {
        **layouts.write_transformers(model.config),
        "id2label": write_class_names(names),
        "label2id": {label: index for index, label in enumerate(names)},
    }


def _registered_name(config: Any, family: str) -> str | None:
    """The registered model of the same shape; number of classes, size and epsilon may differ."""
    ignored = {
        *("img_size", "num_classes", "norm_eps", "drop_rate", "drop_path_rate", "patch_drop_rate", "dynamic_img_size"),
    }

    def shape(candidate: Any) -> list[Any]:
        return [getattr(candidate, field.name) for field in fields(candidate) if field.name not in ignored]

    rows = [name for name, info in load_manifest().items() if info.family == family]
    names = [name for name in rows if shape(model_spec(name).config) == shape(config)]
    same_size = [name for name in names if model_spec(name).config.image_hw == config.image_hw]
    return next(iter(same_size + names), None)


def _read_processor(processor: Mapping[str, Any], image_hw: tuple[int, int]) -> Preprocessing:
    """Read preprocessor_config.json; in older ones sizes are plain numbers, which mean squares."""
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type"))
    values = {"crop_size": image_hw, **_defaults(kind, image_hw)}
    values |= {key: value for key, value in processor.items() if value not in (None, {}, [])}
    size, crop = values["size"], values["crop_size"]
    if isinstance(size, Mapping) and size.get("shortest_edge"):
        # LeViT's is that of the crop: the image is resized to int(256 / 224 * shortest_edge)
        size = int(size["shortest_edge"] * (256 / 224 if kind.startswith("Levit") else 1))
    else:
        size = _pair(size)
    if not values["do_center_crop"]:
        crop = size
    return Preprocessing(
        resize=size,
        crop=_pair(crop),
        interpolation=_FILTERS.get(values["resample"], "bicubic"),
        mean=tuple(values["image_mean"]),
        std=tuple(values["image_std"]),
    )


def _defaults(kind: str, image_hw: tuple[int, int]) -> dict[str, Any]:
    """Values of fields that are missing from preprocessor_config.json, by the kind of processor."""
    if kind.startswith("DeiT"):
        return {"size": 256, "do_center_crop": True, "resample": 3, "image_mean": _HALF, "image_std": _HALF}
    if kind.startswith("Levit"):
        normalisation = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
        return {"size": {"shortest_edge": 224}, "do_center_crop": True, "resample": 3, **normalisation}
    return {"size": image_hw, "do_center_crop": False, "resample": 2, "image_mean": _HALF, "image_std": _HALF}


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size in any of its forms."""
    if isinstance(size, Mapping):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else tuple(size)


def write_processor(spec: Preprocessing) -> dict[str, Any]:
    """The preprocessor_config.json from which `AutoImageProcessor` builds this transform."""
    squash = not isinstance(spec.resize, int)
    return {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": True,
        "size": {"height": spec.resize[0], "width": spec.resize[1]}
        if isinstance(spec.resize, tuple)
        else {"shortest_edge": spec.resize},
        "resample": next(number for number, name in _FILTERS.items() if name == spec.interpolation),
        "do_center_crop": not squash or spec.resize != spec.crop,
        "crop_size": {"height": spec.crop[0], "width": spec.crop[1]},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
