"""config.json, three ways: what a folder or repository says of its weights, read; `publish` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..config import override
from ..errors import CheckpointError, ConfigError, DeitModelsError
from ..models.layers import Layout
from ..registry import Origin, default_preprocessing, family_spec, model_info, model_spec
from .manifest import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, load_manifest

CONFIG_FORMAT = 1

# Pillow's resampling filters by the numbers image processors store.
PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# transformers' names of the same options; hidden_size stands for itself.
TRANSFORMERS_FIELDS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "qkv_bias": "qkv_bias",
    "norm_eps": "layer_norm_eps",
}
# The options timm's DeiT takes under our own names, and those of its that change no weight and no output.
TIMM_OPTIONS = tuple(
    "img_size patch_size in_chans embed_dim depth num_heads mlp_ratio qkv_bias dynamic_img_size".split()
)
_TIMM_IGNORED = {"drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "num_classes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a weights file is said to be: the model to build for it, and what belongs to the weights.

    `layout` is None for a bare weights file, of which only the model's name is known.
    """

    config: Any
    origin: Origin
    family: str
    layout: Layout | None = None


def describe_registered(name: str) -> Description:
    """The description of a registered model's published weights. Raises: UnknownModelError: no such name."""
    spec, known = model_spec(name), model_info(name)
    origin = Origin(
        name=name,
        preprocessing=default_preprocessing(name, spec.config.image_hw),
        class_names=known.class_names,
        dataset=known.dataset,
        top1=known.top1,
        top5=known.top5,
        licence=known.licence,
    )
    return Description(config=spec.config, origin=origin, family=spec.family)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON table. Raises: CheckpointError: not JSON, or something else than a table."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; expected a table of settings")
    return data


def describe_bare(name: str) -> Description:
    """Another training of a registered model: nothing is known of it but its shape, and that only roughly."""
    description = describe_registered(name)
    return replace(description, origin=Origin(name=name, preprocessing=description.origin.preprocessing))


def read_config(data: Mapping[str, Any], processor: Mapping[str, Any] | None = None) -> Description:
    """Tell the layout of a config.json from its contents, and read it.

    Args:
        data: the parsed config.json.
        processor: the parsed preprocessor_config.json that transformers puts beside it, if there is one.

    Raises: CheckpointError: none of the three layouts. ConfigError: values this package cannot build.
        UnknownModelError: an architecture that is not registered.
    """
    try:
        if "deit_models" in data:
            return _read_native(data)
        if "architecture" in data:
            return _read_timm(data)
        if "model_type" in data:
            return _read_transformers(data, processor)
    except DeitModelsError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"config.json lacks or misuses a field ({type(error).__name__}: {error})") from error
    raise CheckpointError("config.json is of no known layout: it has neither deit_models, architecture nor model_type")


def _read_native(data: Mapping[str, Any]) -> Description:
    if data["deit_models"] != CONFIG_FORMAT:
        raise CheckpointError(f"config.json has format {data['deit_models']!r}; this version reads {CONFIG_FORMAT}")
    spec = family_spec(data["family"])
    config = override(type(spec.config)(), _tuples(data["config"]))
    origin = Origin(
        name=data["architecture"],
        preprocessing=Preprocessing.from_dict(data["preprocessing"]),
        class_names=_class_names(data.get("id2label")),
        **{key: data.get(key) for key in ("dataset", "top1", "top5", "licence", "notes")},
    )
    return Description(config=config, origin=origin, family=spec.family, layout="native")


def _read_timm(data: Mapping[str, Any]) -> Description:
    # Before 2023 timm wrote one flat table.
    cfg = data.get("pretrained_cfg", data)
    name = str(data["architecture"])
    spec = model_spec(name)
    options = _tuples(data.get("model_args") or {})
    size = cfg.get("input_size")
    if size is not None:
        options.setdefault("in_chans", size[0])
        options.setdefault("img_size", tuple(size[1:]))
    if isinstance(options.get("img_size"), tuple) and len(set(options["img_size"])) == 1:
        options["img_size"] = options["img_size"][0]  # timm writes squares as pairs
    if (pool := options.pop("global_pool", "token")) != "token":
        raise ConfigError(f"config.json sets global_pool={pool!r}; {name} reads the class token, global_pool='token'")
    unknown = set(options) - set(TIMM_OPTIONS) - _TIMM_IGNORED
    if unknown:
        raise ConfigError(f"config.json sets model_args {sorted(unknown)}, which {name} does not have here")
    overrides = {key: value for key, value in options.items() if key in TIMM_OPTIONS}
    overrides["num_classes"] = data.get("num_classes", cfg.get("num_classes", 1000))
    config = override(spec.config, overrides)
    origin = Origin(
        name=name,
        preprocessing=_timm_preprocessing(cfg, config.image_hw),
        class_names=_class_names(_timm_labels(data, cfg)),
        licence=cfg.get("license"),
    )
    return Description(config=config, origin=origin, family=spec.family, layout="timm")


def _timm_labels(data: Mapping[str, Any], cfg: Mapping[str, Any]) -> Any:
    names = data.get("label_names") or cfg.get("label_names")
    descriptions = data.get("label_descriptions") or cfg.get("label_descriptions") or {}
    if isinstance(names, Mapping):
        return {index: descriptions.get(name, name) for index, name in names.items()}
    return {index: descriptions.get(name, name) for index, name in enumerate(names)} if names else None


def _timm_preprocessing(cfg: Mapping[str, Any], image_hw: tuple[int, int]) -> Preprocessing:
    crop_pct = cfg.get("crop_pct") or 0.875
    scaled = (int(image_hw[0] / crop_pct), int(image_hw[1] / crop_pct))
    return Preprocessing(
        resize=scaled if cfg.get("crop_mode") == "squash" else max(scaled),
        crop=image_hw,
        interpolation=cfg.get("interpolation") or "bicubic",
        mean=tuple(cfg.get("mean") or IMAGENET_MEAN),
        std=tuple(cfg.get("std") or IMAGENET_STD),
    )


def _read_transformers(data: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Description:
    kind, classes = data["model_type"], data.get("architectures") or []
    if kind not in ("deit", "vit"):
        raise ConfigError(f"config.json is of model_type {kind!r}; deit-models loads 'deit' and 'vit'")
    if "DeiTForImageClassification" in classes:
        raise ConfigError(
            "DeiTForImageClassification has a distillation token but only one head; "
            "save the model as DeiTForImageClassificationWithTeacher, or plain DeiT as ViTForImageClassification"
        )
    if data.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(f"config.json has hidden_act={data['hidden_act']!r}; these models use the exact 'gelu'")
    defaults = {"image_size": 224, "layer_norm_eps": 1e-12}
    overrides = {ours: ({**defaults, **data}).get(theirs) for ours, theirs in TRANSFORMERS_FIELDS.items()}
    overrides = {key: value for key, value in _tuples(overrides).items() if value is not None}
    labels = data.get("id2label")
    # Configs leave fields out that have transformers' default: base width, two classes.
    spec = model_spec("deit_base_distilled_patch16_224" if kind == "deit" else "deit_base_patch16_224")
    overrides["mlp_ratio"] = data.get("intermediate_size", 3072) / overrides.get("embed_dim", 768)
    overrides["num_classes"] = len(labels) if labels else data.get("num_labels", 2)
    config = override(spec.config, overrides)
    name = _registered_name(config)
    preprocessing = _processor_preprocessing(processor, config.image_hw) if processor is not None else None
    origin = Origin(
        name=name or kind,
        preprocessing=preprocessing or default_preprocessing(name or "", config.image_hw),
        class_names=_class_names(labels),
    )
    return Description(config=config, origin=origin, family=spec.family, layout="transformers")


def _processor_preprocessing(processor: Mapping[str, Any], image_hw: tuple[int, int]) -> Preprocessing:
    """Read preprocessor_config.json, of which older ones give sizes as plain numbers, meaning squares."""
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type"))
    size = processor.get("size") or (256 if kind.startswith("DeiT") else image_hw)
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    elif isinstance(size, int):
        size = (size, size)
    crop: Any = processor.get("crop_size") or image_hw
    if isinstance(crop, Mapping):
        crop = (crop["height"], crop["width"])
    elif isinstance(crop, int):
        crop = (crop, crop)
    if not processor.get("do_center_crop", kind.startswith("DeiT")):
        crop = (size, size) if isinstance(size, int) else size
    return Preprocessing(
        resize=size if isinstance(size, int) else tuple(size),
        crop=tuple(crop),
        interpolation=PIL_FILTERS.get(processor.get("resample", 3 if kind.startswith("DeiT") else 2), "bicubic"),
        mean=tuple(processor.get("image_mean") or (0.5, 0.5, 0.5)),
        std=tuple(processor.get("image_std") or (0.5, 0.5, 0.5)),
    )


def _registered_name(config: Any) -> str | None:
    """The registered model of the same shape, whatever its number of classes, size and epsilon."""
    ignored = {"img_size", "num_classes", "norm_eps", "drop_rate", "drop_path_rate", "dynamic_img_size"}

    def shape(candidate: Any) -> list[Any]:
        return [getattr(candidate, field.name) for field in fields(candidate) if field.name not in ignored]

    names = [name for name in load_manifest() if shape(model_spec(name).config) == shape(config)]
    same_size = [name for name in names if model_spec(name).config.image_hw == config.image_hw]
    return next(iter(same_size + names), None)


def _class_names(id2label: Any) -> tuple[str, ...] | None:
    """Names in the order of the logits; None where there are none, or only placeholders."""
    if not id2label:
        return None
    by_index = {int(index): str(name) for index, name in id2label.items()}
    if sorted(by_index) != list(range(len(by_index))):
        raise CheckpointError(f"config.json names classes {min(by_index)} to {max(by_index)} with gaps")
    names = tuple(by_index[index] for index in range(len(by_index)))
    return None if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; config fields do."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
