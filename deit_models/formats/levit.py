"""LeViT in other libraries: the authors number all layers in one row, timm and transformers by stage.

The attention between two stages and the MLP after it are at the head of timm's later stage and at the end of
transformers' earlier one. timm's `levit_conv_*` are the same models with 1x1 convolutions for linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import load_manifest
from ..config import override
from ..errors import CheckpointError, ConfigError
from ..registry import model_spec
from .family import FamilyLayouts, Naming


class _Elsewhere(NamedTuple):
    """A module's name in the other two libraries."""

    timm: str
    transformers: str

    def child(self, timm: str, transformers: str) -> _Elsewhere:
        return _Elsewhere(f"{self.timm}.{timm}", f"{self.transformers}.{transformers}")


# The parts of a layer, by their native names.
_ATTENTION = {"qkv": ("qkv", "queries_keys_values"), "proj.1": ("proj.ln", "projection")}
_SHRINK = {"kv": ("kv", "keys_values"), "q.1": ("q.ln", "queries"), "proj.1": ("proj.ln", "projection")}
_MLP = {"0": ("ln1", "linear_up"), "2": ("ln2", "linear_down")}
_NAME = re.compile(r"(?P<module>.+?)\.(?:(?P<layer>c|l|bn)\.(?P<kind>\w+)|attention_biases)")

# Our option: transformers' name of it.
_FIELDS = {
    "img_size": "image_size",
    "in_chans": "num_channels",
    "embed_dim": "hidden_sizes",
    "depth": "depths",
    "num_heads": "num_attention_heads",
}
# Fields of transformers that have one value in these models.
_FIXED = {"kernel_size": 3, "stride": 2, "padding": 1, "patch_size": 16}
# Options with one value in our config, and one for each stage in transformers'.
_PER_STAGE = {"key_dim": "key_dim", "attn_ratio": "attention_ratio", "mlp_ratio": "mlp_ratio"}


class LeViTLayouts(FamilyLayouts):
    """See the module docstring."""

    signs: ClassVar[Mapping[Naming, str]] = {
        "native": r"patch_embed\.0\.c\.weight$",
        "timm": r"stem\.conv1\.linear\.weight$",
        "transformers": r"patch_embeddings\.embedding_layer_1\.convolution\.weight$",
    }
    body = r"levit\.(?=patch_embeddings\.|encoder\.)"
    # Whole numbers that follow from the size; the authors' files hold them.
    ignored = r".*\.attention_bias_idxs$"
    timm_options = tuple("img_size in_chans embed_dim key_dim depth num_heads attn_ratio mlp_ratio distilled".split())
    timm_ignored = FamilyLayouts.timm_ignored | {"use_conv"}
    timm_fixed: ClassVar[Mapping[str, Any]] = {
        "global_pool": "avg",
        "stem_type": "s16",
        "down_op": "subsample",
        "act_layer": "hard_swish",
    }
    model_types = ("levit",)

    def body_prefix(self, config: Any) -> str:
        """The model type."""
        del config
        return "levit."

    def other_names(self, name: str, naming: Naming, config: Any) -> tuple[str, ...]:
        """One name for each tensor; its stage depends on the depths."""
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in _modules(config):
            raise CheckpointError(f"the {naming} layout of levit has no name for {name}")
        module, by_transformers = _modules(config)[match["module"]], naming == "transformers"
        prefix = module.transformers if by_transformers else module.timm
        if match["layer"] is None:
            return (f"{prefix}.attention_biases",)
        layer = "linear"
        if match["layer"] == "bn":
            layer = "batch_norm" if by_transformers else "bn"
        elif by_transformers and name.startswith("patch_embed."):
            layer = "convolution"
        return (f"{prefix}.{layer}.{match['kind']}",)

    def from_native(self, tensors: Mapping[str, Tensor], *, config: Any, naming: Naming) -> dict[str, Tensor]:
        """Native files hold the authors' index buffers, too: their class loads them strictly."""
        named = super().from_native(tensors, config=config, naming=naming)
        return named | (_indices(config) if naming == "native" else {})

    def read_heads(self, names: Collection[str], config: Any, *, bare: bool) -> Any:
        """Whether a transformers file has the distillation head; without any head it is as the config says."""
        found = {self._bare_name(name) for name in names}
        if bare or "classifier.linear.weight" not in found:
            return config
        return replace(config, distilled="classifier_distill.linear.weight" in found)

    def read_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """A 1x1 convolution's weight is a linear layer's with two more axes."""
        return tensor.flatten(1) if _is_linear(name) and tensor.shape[2:] == (1, 1) else tensor

    def write_tensor(self, name: str, tensor: Tensor, naming: Naming) -> Tensor:
        """The inverse of `read_tensor`."""
        return tensor[:, :, None, None] if naming == "timm-conv" and _is_linear(name) else tensor

    def from_timm_name(self, architecture: str, tag: str | None) -> str:
        """Both forms of a model are one model here."""
        del tag
        return architecture.replace("levit_conv_", "levit_")

    def write_timm(self, name: str, config: Any) -> tuple[str, dict[str, Any]]:
        """Shapes without a name of timm's are built from the smallest one."""
        facts = {
            "num_features": config.embed_dim[-1],
            "pool_size": list(config.grids[-1]),
            "first_conv": "stem.conv1.linear",
            "classifier": ["head.linear", "head_dist.linear"] if config.distilled else "head.linear",
        }
        return name if name in load_manifest() else "levit_128s", facts

    def read_transformers(self, data: Mapping[str, Any]) -> Any:
        """Configs leave fields out that have transformers' default, which is LeViT-128."""
        for key, value in _FIXED.items():
            if data.get(key, value) not in (value, (value, value)):
                raise ConfigError(f"config.json has {key}={data[key]!r}; these models have {value}")
        found = {ours: data[theirs] for ours, theirs in _FIELDS.items() if theirs in data}
        for ours, theirs in _PER_STAGE.items():
            values = tuple(data.get(theirs) or ())
            if len(set(values)) > 1:
                raise ConfigError(f"config.json has {theirs}={values}; these models have one value for all stages")
            if values:
                found[ours] = values[0]
        found["distilled"] = "LevitForImageClassification" not in (data.get("architectures") or [])
        config = override(model_spec("levit_128").config, found)
        for operation, expected in zip(data.get("down_ops") or (), _down_ops(config), strict=False):
            if list(operation) != expected:
                raise ConfigError(f"config.json has {operation} in down_ops; these models have {expected}")
        return config

    def write_transformers(self, config: Any) -> dict[str, Any]:
        """With both heads a model "with teacher". Raises: ConfigError: transformers takes squares only."""
        height, width = config.image_hw
        if height != width:
            raise ConfigError(f"transformers builds a LeViT for squares only, not for {height}x{width} pixels")
        stages = len(config.depth)
        return {
            "architectures": [
                f"LevitForImageClassification{'WithTeacher' if config.distilled else ''}"
                if config.num_classes
                else "LevitModel"
            ],
            "model_type": "levit",
            **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
            "image_size": height,
            **_FIXED,
            **{theirs: [getattr(config, ours)] * stages for ours, theirs in _PER_STAGE.items()},
            "down_ops": _down_ops(config),
        }


def _indices(config: Any) -> dict[str, Tensor]:
    """Column of the score bias for each query and key, by the authors' names of the buffers."""
    found, stage = {}, 0
    for index, (parts, _) in enumerate(_layers(config)):
        if parts is not _MLP:
            (height, width), stride = config.grids[stage], 2 if parts is _SHRINK else 1
            rows, columns = torch.arange(height), torch.arange(width)
            down = (rows[::stride, None] - rows).abs()[:, None, :, None] * width
            across = (columns[::stride, None] - columns).abs()[None, :, None, :]
            name = f"blocks.{index}{'' if parts is _SHRINK else '.m'}.attention_bias_idxs"
            found[name] = (down + across).flatten(2).flatten(0, 1)
            stage += stride - 1
    return found


def _is_linear(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".c.weight")


def _down_ops(config: Any) -> list[list[Any]]:
    """Between stages: kind, key width, heads, value width in key widths, MLP ratio, stride."""
    return [["Subsample", config.key_dim, width // config.key_dim, 4, 2, 2] for width in config.embed_dim[:-1]]


@cache
def _modules(config: Any) -> dict[str, _Elsewhere]:
    """Other libraries' names of the modules with parameters, by native name."""
    modules = {"head": _Elsewhere("head", "classifier"), "head_dist": _Elsewhere("head_dist", "classifier_distill")}
    for number in range(1, 5):
        stem = _Elsewhere(f"stem.conv{number}", f"patch_embeddings.embedding_layer_{number}")
        modules[f"patch_embed.{2 * number - 2}"] = stem
    for index, (parts, layer) in enumerate(_layers(config)):
        native = f"blocks.{index}" if parts is _SHRINK else f"blocks.{index}.m"
        modules[native] = layer
        modules |= {f"{native}.{part}": layer.child(*names) for part, names in parts.items()}
    return modules


def _layers(config: Any) -> Iterator[tuple[dict[str, tuple[str, str]], _Elsewhere]]:
    """The authors' row of layers: the parts of each, and its names in other libraries."""
    for stage, depth in enumerate(config.depth):
        if stage:
            before = _Elsewhere(f"stages.{stage}.downsample", f"encoder.stages.{stage - 1}.layers")
            last = 2 * config.depth[stage - 1]
            yield _SHRINK, before.child("attn_downsample", f"{last}")
            yield _MLP, before.child("mlp", f"{last + 1}.module")
        for block in range(depth):
            here = _Elsewhere(f"stages.{stage}.blocks.{block}", f"encoder.stages.{stage}.layers")
            yield _ATTENTION, here.child("attn", f"{2 * block}.module")
            yield _MLP, here.child("mlp", f"{2 * block + 1}.module")
