"""Model families, and `create_model` for any of them. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoint import Origin
from ..config import override
from ..errors import ConfigError, first_line, shown
from ..formats.architecture import SUFFIX, read_architecture
from ..registry import default_preprocessing, family_spec, model_spec

if TYPE_CHECKING:
    import torch

    from .layers import ImageClassifier


def create_model(
    name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None, **overrides: Any
) -> ImageClassifier:
    """Build a registered model with random weights, in training mode.

    Args:
        name: one of `list_models()`, or a file with an architecture, see `formats.architecture.read_architecture`.
        device: where to put it.
        dtype: floating-point type of its parameters, or its name.
        **overrides: fields of the family's config, e.g. num_classes=10, img_size=(224, 448), drop_path_rate=0.1.

    Raises: UnknownModelError: no such name. ConfigError: an unknown option, misfitting values, a file of another kind.
    """
    import torch

    from .layers import ImageClassifier, check_device, float_type

    check_device(device)
    wanted, preprocessing = float_type(dtype), None
    if name.endswith(SUFFIX):
        file = read_architecture(name)
        spec, preprocessing = family_spec(file.family), file.preprocessing
        spec = replace(spec, name=file.name, config=override(type(spec.config)(), dict(file.settings)))
    else:
        spec = model_spec(name)
    config = override(spec.config, overrides)
    try:
        with torch.device(device if device is not None else torch.get_default_device()):
            model = spec.model_class(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{name} with {shown(overrides)} cannot be built: {first_line(error)}") from error
    if not isinstance(model, ImageClassifier):
        raise ConfigError(f"{name} is registered with {type(model).__name__}, which is no ImageClassifier")
    preprocessing = preprocessing or default_preprocessing(spec.name, config.image_hw)
    preprocessing = preprocessing.at_size(config.image_hw).for_channels(config.in_chans)
    model.origin = Origin(name=spec.name, preprocessing=preprocessing)
    return model if wanted is None else model.to(wanted)
