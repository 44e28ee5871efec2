"""Registered models by name. Listing them needs no torch; a family is imported on first use."""

from __future__ import annotations

import fnmatch
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .checkpoint import ModelInfo, ModelLike, Preprocessing, load_manifest
from .config import nearest, override
from .errors import ConfigError, ManifestError, UnknownModelError, first_line, shown

M = TypeVar("M", bound=ModelLike)

DEFAULT_MODEL = "deit_micro_distilled_patch4_32"
"""Its weights are part of the package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A registered model: its class and its config."""

    name: str
    model_class: type[ModelLike]
    config: Any

    @property
    def family(self) -> str:
        """Name of the model family, as in the manifest."""
        return self.model_class.family


_specs: dict[str, ModelSpec] = {}


def register_model(name: str, model_class: type[ModelLike], config: Any, **overrides: Any) -> None:
    """Make `model_class(config)` available under a name; `overrides` replace fields of the config.

    Raises: ConfigError: the name is taken, or a field does not exist.
    """
    _import_family(name)  # a manifest name is taken even before its family was first used
    if name in _specs:
        raise ConfigError(f"model {name!r} is already registered; choose another name")
    _specs[name] = ModelSpec(name=name, model_class=model_class, config=override(config, overrides))


def model_spec(name: str) -> ModelSpec:
    """The registration of a name; imports its family if need be. Raises: UnknownModelError: no such name."""
    family = _import_family(name)
    if name not in _specs and family is not None:
        raise ManifestError(f"manifest.toml lists {name}, but models/{family}.py does not register it")
    if name not in _specs:
        raise unknown_model(name)
    return _specs[name]


def _import_family(name: str) -> str | None:
    """Import the family of a manifest name, which registers its models; None for a name not in the manifest."""
    if not isinstance(name, str):
        raise ConfigError(f"{name!r} is no name of a model; expected a text such as {DEFAULT_MODEL!r}")
    if name not in load_manifest():
        return None
    family = load_manifest()[name].family
    importlib.import_module(f".models.{family}", package=__package__)
    return family


def add_web_networks(model: Any, folder: Path) -> None:
    """`deploy.export.write_hub_networks`, imported at the call: `formats`, which publishes the files, is above it."""
    importlib.import_module(".deploy.export", package=__package__).write_hub_networks(model, folder)


def family_spec(family: str) -> ModelSpec:
    """Some model of a family, for its class and the type of its config. Raises: ConfigError: no such family."""
    for name, info in load_manifest().items():
        if info.family == family:
            return model_spec(name)
    known = sorted({info.family for info in load_manifest().values()})
    raise ConfigError(f"unknown model family {shown(family)}; known: {', '.join(known)}")


def unknown_model(name: str) -> UnknownModelError:
    """The error for a name that is not registered."""
    return UnknownModelError(f"unknown model {shown(name)}{nearest(name, _names())}")


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Registered names that match a glob, in the order of the manifest.

    Args:
        pattern: shell-style, e.g. "deit_*distilled*".
        pretrained: only names with published weights.
    """
    manifest = load_manifest()
    names = (name for name in _names() if not pretrained or (name in manifest and manifest[name].sources))
    return fnmatch.filter(names, pattern)


def default_preprocessing(name: str, image_hw: tuple[int, int]) -> Preprocessing:
    """The authors' evaluation transform of a model at an input size (height, width) in pixels.

    Models outside the manifest get DeiT's: shorter side to int(size / 0.875), bicubic, centre crop.
    """
    known = load_manifest().get(name)
    base = known.preprocessing if known is not None else Preprocessing(resize=256, crop=(224, 224))
    return base.at_size(image_hw)


def model_info(name: str) -> ModelInfo:
    """Facts about a model: parameters, MACs, input size, accuracy, licence, sources, evaluation transform.

    For a model registered at run time, which is not in the manifest, they are counted from its definition.
    Raises: UnknownModelError: no such name.
    """
    manifest = load_manifest()
    if name in manifest:
        return manifest[name]
    return _measure(model_spec(name))


def meta_model(model_class: type[M], config: Any) -> M:
    """A model on the meta device: it has names and shapes and takes no memory.

    Raises: ConfigError: tensors that are larger than any memory.
    """
    import torch

    try:
        with torch.device("meta"):
            return model_class(config)
    except (RuntimeError, OverflowError) as error:
        raise ConfigError(f"{model_class.__name__} of such sizes cannot be built: {first_line(error)}") from error


def own_model(model: Any, *, others: bool = False) -> Any:
    """The model of this package inside what torch, peft or `WithLoss` wrap around it: compiled, parallel, averaged.

    Raises: ConfigError: another module; with `others` it is given back.
    """
    inner = model
    while not hasattr(type(inner), "head_names"):
        known = type(inner).__module__.partition(".")[0] in ("torch", "peft", __name__.partition(".")[0])
        parts = getattr(inner, "_modules", {}) if known else {}
        inner = next((parts[name] for name in ("_orig_mod", "module", "base_model", "model") if name in parts), None)
        if inner is None and others:
            return model
        if inner is None:
            raise ConfigError(f"a {type(model).__name__} is no model of this package; pass the model inside it, if any")
    return inner


def count_macs(model: ModelLike | str | Any) -> int:
    """Multiply-accumulates of one image through matrix products and convolutions, at the config's input size.

    Torch's FLOP counter counts them, at two FLOPs each, while the model runs on the meta device in eval mode. Those of
    attention count. Biases, norms, activations, softmax, pooling and other element-wise work do not.

    Args:
        model: a config such as `DeiTConfig(...)`, a model, of which the config is read, or a registered name.

    Raises: UnknownModelError: no such name. ConfigError: no config of a registered model.
    """
    if isinstance(model, str):
        return model_info(model).macs
    config = getattr(model, "config", model)
    for spec in _specs.values():
        if type(spec.config) is type(config):  # a subclass may give its fields another meaning
            return _macs(meta_model(spec.model_class, config), config)
    known = {type(family_spec(info.family).config).__name__ for info in load_manifest().values()}
    raise ConfigError(
        f"cannot count the MACs of {type(config).__name__}; expected {', '.join(sorted(known))}, a model of theirs or "
        f"its name. Any registered model is measured by model_info(name).macs"
    )


def _macs(model: ModelLike, config: Any) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, config.in_chans, *config.image_hw, device="meta"))
    return counter.get_total_flops() // 2


def _measure(spec: ModelSpec) -> ModelInfo:
    model = meta_model(spec.model_class, spec.config)
    return ModelInfo(
        name=spec.name,
        family=spec.family,
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=_macs(model, spec.config),
        input_size=max(spec.config.image_hw),
        num_classes=model.num_classes,
        distilled=bool(getattr(spec.config, "distilled", False)),
        preprocessing=default_preprocessing(spec.name, spec.config.image_hw),
    )


def _names() -> list[str]:
    """Manifest order first, then what was registered at run time."""
    return list(dict.fromkeys([*load_manifest(), *_specs]))
