"""timm's config.json, read and written, as far as families are alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..checkpoint import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ModelLike,
    Origin,
    Preprocessing,
    load_manifest,
    usual_ratio,
)
from ..config import is_finite, override
from ..errors import ConfigError
from ..files import tuples
from ..registry import model_spec, unknown_model
from .family import Description, FamilyLayouts, nearest_registered, read_class_names

logger = logging.getLogger(__name__)


def timm_run(
    settings: Mapping[str, Any], class_names: Sequence[str] | None, *, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json for the weights of a run of timm's train.py, from its args.yaml.

    Args:
        settings: the parsed file; what belongs to training alone is passed over.
        class_names: the lines of the class map that it names.
        base: the config.json of the folder that the run began with.

    Raises: ConfigError: a setting that cannot be honoured; the message names it.
    """
    given = {key: value for key, value in settings.items() if value not in (None, "", [])}
    base = base or {}
    name, _, tag = str(base.get("architecture", given["model"])).rpartition("/")[2].partition(".")
    known, options = load_manifest().get(name), {**base.get("model_args", {}), **given.get("model_kwargs", {})}
    cfg = base.get("pretrained_cfg", {"tag": tag, "crop_pct": known and known.timm_crop_pct})
    channels = given.get("in_chans") or (given.get("input_size") or cfg.get("input_size") or [3])[0]
    for key, fixed in (("bn_eps", None), ("input_img_mode", "L" if channels == 1 else "RGB")):
        if given.get(key, fixed) != fixed:
            raise ConfigError(f"args.yaml sets {key}={given[key]!r}, where {fixed!r} is known here; mend one of them")
    if size := given.get("img_size"):
        cfg = {**cfg, "input_size": [channels, size, size]}
        options.pop("img_size", None)
    fields = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
    return {
        "architecture": name,
        "num_classes": given.get("num_classes", options.pop("num_classes", base.get("num_classes", 1000))),
        "pretrained_cfg": {**cfg, **{key: given[key] for key in fields if key in given}},
        "model_args": options | {"in_chans": channels} | ({"global_pool": given["gp"]} if "gp" in given else {}),
        "label_names": class_names,
    }


def read_timm_config(data: Mapping[str, Any], families: Mapping[str, FamilyLayouts]) -> Description:
    """A model of timm's that is registered here, with the options it was built with.

    Raises: UnknownModelError: not registered. ConfigError: an option this package does not have.
    """
    # Before 2023 timm wrote one flat table.
    cfg = data.get("pretrained_cfg", data)
    architecture = str(data["architecture"])
    name = _registered(architecture, cfg.get("tag"), families)
    spec = model_spec(name)
    layouts = families[spec.family]
    ours = {theirs: name for name, theirs in layouts.timm_names.items()}
    options = {ours.get(key, key): value for key, value in tuples(data.get("model_args") or {}).items()}
    size = cfg.get("input_size")
    if size is not None:
        options.setdefault("in_chans", size[0])
        options.setdefault("img_size", tuple(size[1:]))
    if isinstance(options.get("img_size"), tuple) and len(set(options["img_size"])) == 1:
        options["img_size"] = options["img_size"][0]  # timm writes squares as pairs
    new_heads = _other_pooling(options, data, layouts)
    for key, fixed in layouts.timm_fixed.items():
        if (value := options.pop(key, fixed)) != fixed:
            raise ConfigError(f"config.json sets {key}={value!r}; {name} has {key}={fixed!r}")
    unknown = set(options) - set(layouts.timm_options) - layouts.timm_ignored
    if unknown:
        raise ConfigError(f"config.json sets model_args {sorted(unknown)}, which {name} does not have here")
    overrides = {key: value for key, value in options.items() if key in layouts.timm_options}
    overrides["num_classes"] = data.get("num_classes", cfg.get("num_classes", 1000))
    shape = layouts.timm_shape(architecture)
    config = override(spec.config, {**shape, **overrides})
    if shape and name == layouts.from_timm_name(architecture, None):  # a name that the tag tells stays
        name = nearest_registered(config, spec.family) or architecture
    origin = Origin(
        name=name,
        preprocessing=(
            Preprocessing.from_dict(data["preprocessing"])
            if "preprocessing" in data
            else _read_preprocessing(cfg, config.image_hw, config.in_chans)
        ),
        class_names=read_class_names(_labels(data, cfg)),
        problem_type=data.get("problem_type"),
        thresholds=tuples(data).get("thresholds"),
        licence=cfg.get("license"),
    )
    return Description(config=config, origin=origin, family=spec.family, layout="timm", new_heads=new_heads)


def write_timm_config(
    model: ModelLike, origin: Origin, layouts: FamilyLayouts, *, conv: bool = False
) -> dict[str, Any]:
    """The config.json from which `timm.create_model("local-dir:...")` builds a model.

    Args:
        model: the model.
        origin: its origin.
        layouts: those of its family.
        conv: name timm's variant that has 1x1 convolutions in the place of linear layers.

    Raises: ConfigError: timm has no such model.
    """
    config = model.config
    name, facts = layouts.write_timm(origin.name, config)
    reference = override(model_spec(layouts.from_timm_name(name, None)).config, layouts.timm_shape(name))
    options = layouts.timm_options
    spec, nearest = origin.preprocessing, _covering(origin.preprocessing)
    differing = {
        layouts.timm_names.get(key, key): getattr(config, key)
        for key in options
        if getattr(config, key) != getattr(reference, key)
    }
    data: dict[str, Any] = {
        "architecture": name.replace("_", "_conv_", 1) if conv else name,
        "num_classes": config.num_classes,
        "num_features": facts.pop("num_features"),
        "pretrained_cfg": {
            "tag": "deit_models",
            "custom_load": False,
            "input_size": [config.in_chans, *config.image_hw],
            "fixed_input_size": True,
            **_write_preprocessing(nearest),
            "num_classes": config.num_classes,
            **facts,
        },
    }
    if origin.licence is not None:
        data["pretrained_cfg"]["license"] = origin.licence.lower()
    if origin.class_names is not None:
        data["label_names"] = list(origin.class_names)
    if origin.problem_type is not None:  # for this package, as is the next; timm ignores them
        data["problem_type"] = origin.problem_type
    if origin.thresholds is not None:
        data["thresholds"] = list(origin.thresholds)
    if nearest != spec:
        logger.warning("timm has no transform like '%s'; from these files it makes '%s'", spec, nearest)
        data["preprocessing"] = spec.to_dict()
    return data | ({"model_args": differing} if differing else {})


def _registered(architecture: str, tag: str | None, families: Mapping[str, FamilyLayouts]) -> str:
    """The registered name of a model of timm's."""
    for layouts in families.values():
        name = layouts.from_timm_name(architecture, tag)
        known = load_manifest().get(name)
        if known is not None and known.family == layouts.family:
            return name
    raise unknown_model(architecture)


def _other_pooling(options: dict[str, Any], data: Mapping[str, Any], layouts: FamilyLayouts) -> str | None:
    """The reason why the head of a file does not fit the class token; takes the option away where the body fits."""
    pool = options.get("global_pool", data.get("global_pool"))
    if layouts.timm_fixed.get("global_pool") != "token" or pool not in ("", "avg", "avgmax", "max"):
        return None
    options.pop("global_pool", None)
    if pool == "" and data.get("num_classes") == 0:
        return None  # timm gives all tokens where this package gives the class token; the weights are the same
    return f"config.json sets global_pool={pool!r}, where these models classify the class token"


def _labels(data: Mapping[str, Any], cfg: Mapping[str, Any]) -> Any:
    names = data.get("label_names") or cfg.get("label_names")
    descriptions = data.get("label_descriptions") or cfg.get("label_descriptions") or {}
    if isinstance(names, Mapping):
        return {index: descriptions.get(name, name) for index, name in names.items()}
    return {index: descriptions.get(name, name) for index, name in enumerate(names)} if names else None


def _read_preprocessing(cfg: Mapping[str, Any], image_hw: tuple[int, int], channels: int) -> Preprocessing:
    """Timm's transform at an input size. Raises: ConfigError: a crop of another kind, or values out of range."""
    mode, crop_pct = cfg.get("crop_mode") or "center", cfg.get("crop_pct") or 0.875
    if mode not in ("center", "squash"):
        raise ConfigError(f"config.json has crop_mode={mode!r}; expected 'center' or 'squash'")
    if not is_finite(crop_pct) or not crop_pct > 0:
        raise ConfigError(f"config.json has crop_pct={crop_pct!r}; expected a number above 0, such as 0.875")
    if cfg.get("label_offset"):
        raise ConfigError(f"config.json has label_offset={cfg['label_offset']!r}; expected no classes before the first")
    scaled = (int(image_hw[0] / crop_pct), int(image_hw[1] / crop_pct))
    mean, std = tuple(cfg.get("mean") or IMAGENET_MEAN), tuple(cfg.get("std") or IMAGENET_STD)
    return Preprocessing(
        resize=scaled if mode == "squash" or scaled[0] != scaled[1] else scaled[0],
        crop=image_hw,
        fit="cover" if mode == "center" and scaled[0] != scaled[1] else "squash",
        interpolation=cfg.get("interpolation") or "bicubic",
        mean=mean * channels if len(mean) == 1 else mean,
        std=std * channels if len(std) == 1 else std,
    )


def _covering(spec: Preprocessing) -> Preprocessing:
    """The nearest transform that timm has, where the input is no square: there it knows no shorter side."""
    if not isinstance(spec.resize, int) or spec.crop[0] == spec.crop[1]:
        return spec
    ratio = usual_ratio(max(spec.crop), spec.resize)
    return replace(spec, resize=(int(spec.crop[0] / ratio), int(spec.crop[1] / ratio)), fit="cover")


def _write_preprocessing(spec: Preprocessing) -> dict[str, Any]:
    """Fields of the same transform, to half a pixel. Raises: ConfigError: timm has no such transform."""
    data: dict[str, Any] = {"interpolation": spec.interpolation, "mean": list(spec.mean), "std": list(spec.std)}
    data["crop_mode"] = "squash" if isinstance(spec.resize, tuple) and spec.fit == "squash" else "center"
    pairs = zip(spec.crop, spec.resize, strict=True) if isinstance(spec.resize, tuple) else ()
    for crop, resize in [(max(spec.crop), spec.resize)] if isinstance(spec.resize, int) else pairs:
        # the side is rounded down: half a pixel more is safe from the rounding of the ratio itself
        for data["crop_pct"] in (usual_ratio(crop, resize), crop / (resize + 0.5)):
            if _read_preprocessing(data, spec.crop, len(spec.mean)) == replace(spec, rounding="even"):
                return data
    raise ConfigError(f"timm has no transform like '{spec}'; save the model with layout='native' or 'transformers'")
