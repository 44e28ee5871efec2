"""config.json: which layout one is of, read; and all that goes beside the weights in a layout, written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..checkpoint import Layout, Origin, Preprocessing
from ..config import override
from ..errors import CheckpointError, ConfigError, DeitModelsError
from ..hub.fetch import CONFIG_NAME, PROCESSOR_NAME
from ..models.layers import ImageClassifier
from ..registry import family_spec
from . import timm_config, transformers_config
from .description import Description, read_class_names, tuples, write_class_names

CONFIG_FORMAT = 1


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
            return timm_config.read(data)
        if "model_type" in data:
            return transformers_config.read(data, processor)
    except DeitModelsError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"config.json lacks or misuses a field ({type(error).__name__}: {error})") from error
    raise CheckpointError("config.json is of no known layout: it has neither deit_models, architecture nor model_type")


def write_config(model: ImageClassifier, layout: Layout) -> dict[str, dict[str, Any]]:
    """The JSON files that go beside model.safetensors in a layout: contents by file name.

    Raises: ConfigError: an unknown layout, one the family does not have, or a model without `origin` (built by hand).
    """
    if model.origin is None:
        raise ConfigError("this model has no origin; build it with create_model or load it with from_pretrained")
    if layout == "native":
        return {CONFIG_NAME: _write_native(model, model.origin)}
    if layout in ("timm", "timm-conv"):
        return {CONFIG_NAME: timm_config.write(model, model.origin, conv=layout == "timm-conv")}
    if layout == "transformers":
        return {
            CONFIG_NAME: transformers_config.write(model, model.origin),
            PROCESSOR_NAME: transformers_config.write_processor(model.origin.preprocessing),
        }
    raise ConfigError(f"layout={layout!r}; expected 'native', 'timm' or 'transformers'")


def _read_native(data: Mapping[str, Any]) -> Description:
    if data["deit_models"] != CONFIG_FORMAT:
        raise CheckpointError(f"config.json has format {data['deit_models']!r}; this version reads {CONFIG_FORMAT}")
    spec = family_spec(data["family"])
    config = override(type(spec.config)(), tuples(data["config"]))
    origin = Origin(
        name=data["architecture"],
        preprocessing=Preprocessing.from_dict(data["preprocessing"]),
        class_names=read_class_names(data.get("id2label")),
        **{key: data.get(key) for key in ("dataset", "top1", "top5", "licence", "notes")},
    )
    return Description(config=config, origin=origin, family=spec.family, layout="native")


def _write_native(model: ImageClassifier, origin: Origin) -> dict[str, Any]:
    data: dict[str, Any] = {
        "deit_models": CONFIG_FORMAT,
        "architecture": origin.name,
        "family": model.family,
        "config": asdict(model.config),
        "preprocessing": origin.preprocessing.to_dict(),
    }
    if origin.class_names is not None:
        data["id2label"] = write_class_names(origin.class_names)
    facts = {key: getattr(origin, key) for key in ("dataset", "top1", "top5", "licence", "notes")}
    return data | {key: value for key, value in facts.items() if value is not None}
