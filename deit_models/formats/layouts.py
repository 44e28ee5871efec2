"""The layouts of a saved model: config.json read, its layout told; config.json written, in any layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ..checkpoint import Layout, ModelLike, Origin, Preprocessing
from ..config import override
from ..errors import CheckpointError, ConfigError, DeitModelsError
from ..files import tuples
from ..registry import family_spec
from .deit import DeiTLayouts
from .family import Description, FamilyLayouts, read_class_names, write_class_names
from .levit import LeViTLayouts
from .timm_config import read_timm_config, write_timm_config
from .timm_only import CaiTLayouts, ResMLPLayouts
from .transformers_config import read_transformers_config, write_processor, write_transformers_config

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
PROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a repository or folder; the first is written."""
CONFIG_FORMAT = 1
_FACTS = ("problem_type", "thresholds", "dataset", "top1", "top5", "licence", "notes", "base")
FAMILIES: Mapping[str, FamilyLayouts] = {
    "deit": DeiTLayouts("deit"),
    "levit": LeViTLayouts("levit"),
    "cait": CaiTLayouts("cait"),
    "resmlp": ResMLPLayouts("resmlp"),
}
"""Families that other libraries have, too."""


def layouts_of(family: str) -> FamilyLayouts:
    """The layouts of a family; only the native one if no other library has it."""
    return FAMILIES.get(family) or FamilyLayouts(family)


def read_config(data: Mapping[str, Any], processor: Mapping[str, Any] | None = None) -> Description:
    """Read a config.json; its layout is told from its contents.

    Args:
        data: the parsed config.json.
        processor: the parsed preprocessor_config.json that transformers puts beside it, if there is one.

    Raises: CheckpointError: none of the three layouts. ConfigError: values this package cannot build.
        UnknownModelError: an architecture that is not registered.
    """
    try:
        if "deit_models" in data:
            return _checked(_read_native(data))
        if "architecture" in data:
            return _checked(read_timm_config(data, FAMILIES))
        if "model_type" in data:
            return _checked(read_transformers_config(data, processor, FAMILIES))
    except DeitModelsError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"config.json lacks or misuses a field ({type(error).__name__}: {error})") from error
    raise CheckpointError("config.json is of no known layout: it has neither deit_models, architecture nor model_type")


def _checked(said: Description) -> Description:
    """The description, if its parts fit each other.

    Raises: ConfigError: preprocessing of another size or number of colours. CheckpointError: other class names.
    """
    spec, config, names = said.origin.preprocessing, said.config, said.origin.class_names
    if names is not None and len(names) != config.num_classes > 0:
        raise CheckpointError(f"config.json has {len(names)} class names for num_classes={config.num_classes}")
    if (chosen := said.origin.thresholds) is not None and len(chosen) != config.num_classes > 0:
        raise CheckpointError(f"config.json has {len(chosen)} thresholds for num_classes={config.num_classes}")
    if spec.crop != config.image_hw and not getattr(config, "dynamic_img_size", False):
        raise ConfigError(
            f"preprocessing gives images of {spec.crop}, the model takes {config.image_hw}; mend one of them"
        )
    if config.in_chans == 3 and len(spec.mean) != 3:
        raise ConfigError(f"preprocessing has mean={spec.mean}; expected a number each of {config.in_chans} channels")
    return said


def write_config(model: ModelLike, layout: Layout) -> dict[str, dict[str, Any]]:
    """Contents of the JSON files beside model.safetensors in a layout, by file name.

    Raises: ConfigError: an unknown layout, one the family does not have, or a model without `origin` (built by hand).
    """
    origin, layouts = known_origin(model), layouts_of(model.family)
    if layout == "native":
        return {CONFIG_NAME: _write_native(model, origin)}
    if layout in ("timm", "timm-conv"):
        return {CONFIG_NAME: write_timm_config(model, origin, layouts, conv=layout == "timm-conv")}
    if layout == "transformers":
        return {
            CONFIG_NAME: write_transformers_config(model, origin, layouts),
            PROCESSOR_NAME: write_processor(origin.preprocessing),
        }
    raise ConfigError(f"layout={layout!r}; expected 'native', 'timm' or 'transformers'")


def known_origin(model: ModelLike) -> Origin:
    """The origin of a model. Raises: ConfigError: a model without one (built by hand)."""
    if model.origin is None:
        raise ConfigError("this model has no origin; build it with create_model or load it with from_pretrained")
    return model.origin


def _read_native(data: Mapping[str, Any]) -> Description:
    if data["deit_models"] != CONFIG_FORMAT:
        raise CheckpointError(f"config.json has format {data['deit_models']!r}; this version reads {CONFIG_FORMAT}")
    spec = family_spec(data["family"])
    kind, given = type(spec.config), tuples(data["config"])
    # Fields without which older versions wrote their files; all others are in every file.
    added = getattr(kind, "added", frozenset[str]())
    missing = [field.name for field in fields(kind) if field.name not in given and field.name not in added]
    if missing:
        raise CheckpointError(f"config.json lacks the fields {', '.join(missing)} of its config; it is not complete")
    config = override(kind(), given)
    origin = Origin(
        name=data["architecture"],
        preprocessing=Preprocessing.from_dict(data["preprocessing"]),
        class_names=read_class_names(data.get("id2label")),
        **tuples({key: data.get(key) for key in _FACTS}),
    )
    return Description(config=config, origin=origin, family=spec.family, layout="native")


def _write_native(model: ModelLike, origin: Origin) -> dict[str, Any]:
    data: dict[str, Any] = {
        "deit_models": CONFIG_FORMAT,
        "architecture": origin.name,
        "family": model.family,
        "config": asdict(model.config),
        "preprocessing": origin.preprocessing.to_dict(),
    }
    if origin.class_names is not None:
        data["id2label"] = write_class_names(origin.class_names)
    facts = {key: getattr(origin, key) for key in _FACTS}
    return data | {key: value for key, value in facts.items() if value is not None}
