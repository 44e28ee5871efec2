"""What a weights file is said to be, wherever that was read, and the small readings every config.json needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..checkpoint import Layout, Origin, load_manifest
from ..errors import CheckpointError
from ..registry import default_preprocessing, model_info, model_spec

logger = logging.getLogger(__name__)


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


def describe_bare(name: str) -> Description:
    """Another training of a registered model: nothing is known of it but its shape, and that only roughly.

    A licence that forbids commercial use is kept all the same: some authors publish nothing but bare files.
    """
    description = describe_registered(name)
    known = description.origin
    licence = known.licence if is_non_commercial(known.licence) else None
    return replace(description, origin=Origin(name=name, preprocessing=known.preprocessing, licence=licence))


def show_licence(source: str, licence: str | None) -> None:
    """Log a licence that whoever uses the weights must know of."""
    if is_non_commercial(licence):
        logger.warning("%s: licensed %s, for non-commercial use only", source, licence)


def is_non_commercial(licence: str | None) -> bool:
    """Whether a licence, by its SPDX identifier, forbids commercial use."""
    return licence is not None and "-NC" in licence


def registered_name(config: Any, family: str) -> str | None:
    """The registered model of the same shape, whatever its number of classes, size and epsilon."""
    ignored = {
        *("img_size", "num_classes", "norm_eps", "drop_rate", "drop_path_rate", "patch_drop_rate", "dynamic_img_size"),
    }

    def shape(candidate: Any) -> list[Any]:
        return [getattr(candidate, field.name) for field in fields(candidate) if field.name not in ignored]

    rows = [name for name, checkpoint in load_manifest().items() if checkpoint.family == family]
    names = [name for name in rows if shape(model_spec(name).config) == shape(config)]
    same_size = [name for name in names if model_spec(name).config.image_hw == config.image_hw]
    return next(iter(same_size + names), None)


def read_class_names(id2label: Any) -> tuple[str, ...] | None:
    """Names in the order of the logits; None where there are none, or only placeholders."""
    if not id2label:
        return None
    by_index = {int(index): str(name) for index, name in id2label.items()}
    if sorted(by_index) != list(range(len(by_index))):
        raise CheckpointError(f"config.json names classes {min(by_index)} to {max(by_index)} with gaps")
    names = tuple(by_index[index] for index in range(len(by_index)))
    return None if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names


def write_class_names(names: tuple[str, ...]) -> dict[str, str]:
    """The inverse of `read_class_names`; JSON has no other keys than strings."""
    return {str(index): name for index, name in enumerate(names)}


def tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; config fields do."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
