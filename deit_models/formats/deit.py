"""DeiT in other libraries: timm kept the authors' names; transformers has DeiT with a distillation token, else ViT.

DeiT III is in timm, under other names for the layer scale, and not in transformers. DINO's backbones are plain ViTs in
both. timm's other plain ViTs are of DeiT's kind, too, and load by their size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

from ..checkpoint import find_repo, load_manifest
from ..config import override
from ..errors import CheckpointError, ConfigError
from ..registry import model_spec
from .family import FamilyLayouts, Naming

# Tables of transformers' names: `{i}` stands for a block index, `{w}` for weight or bias. With several names, the
# native tensor is their concatenation along the rows: the authors fuse query, key and value, transformers does not.
_OUTER = {
    "cls_token": ("embeddings.cls_token",),
    "dist_token": ("embeddings.distillation_token",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj.{w}": ("embeddings.patch_embeddings.projection.{w}",),
    "norm.{w}": ("layernorm.{w}",),
}
_CLASSIC = {
    **_OUTER,
    "blocks.{i}.norm1.{w}": ("encoder.layer.{i}.layernorm_before.{w}",),
    "blocks.{i}.attn.qkv.{w}": tuple(
        f"encoder.layer.{{i}}.attention.attention.{part}.{{w}}" for part in ("query", "key", "value")
    ),
    "blocks.{i}.attn.proj.{w}": ("encoder.layer.{i}.attention.output.dense.{w}",),
    "blocks.{i}.norm2.{w}": ("encoder.layer.{i}.layernorm_after.{w}",),
    "blocks.{i}.mlp.fc1.{w}": ("encoder.layer.{i}.intermediate.dense.{w}",),
    "blocks.{i}.mlp.fc2.{w}": ("encoder.layer.{i}.output.dense.{w}",),
}
_V5 = {
    **_OUTER,
    "blocks.{i}.norm1.{w}": ("layers.{i}.layernorm_before.{w}",),
    "blocks.{i}.attn.qkv.{w}": tuple(f"layers.{{i}}.attention.{part}_proj.{{w}}" for part in "qkv"),
    "blocks.{i}.attn.proj.{w}": ("layers.{i}.attention.o_proj.{w}",),
    "blocks.{i}.norm2.{w}": ("layers.{i}.layernorm_after.{w}",),
    "blocks.{i}.mlp.fc1.{w}": ("layers.{i}.mlp.fc1.{w}",),
    "blocks.{i}.mlp.fc2.{w}": ("layers.{i}.mlp.fc2.{w}",),
}
_BODIES = {"transformers": _CLASSIC, "transformers-5": _V5}
# By whether there is a distillation head. With a distillation token alone the names are those of a plain ViT.
_HEADS = {
    False: {"head.{w}": ("classifier.{w}",)},
    True: {"head.{w}": ("cls_classifier.{w}",), "head_dist.{w}": ("distillation_classifier.{w}",)},
}

# timm's ViTs that differ from DeiT in size alone: width, depth, heads.
_PLAIN = re.compile(r"vit_(tiny|small|base|large|huge)_patch(\d+)_(\d+)")
_SIZES = {
    **{"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)},
    **{"large": (1024, 24, 16), "huge": (1280, 32, 16)},
}

# Our option: transformers' name of it.
_FIELDS = {
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "qkv_bias": "qkv_bias",
    "norm_eps": "layer_norm_eps",
}


class DeiTLayouts(FamilyLayouts):
    """See the module docstring."""

    signs: ClassVar[Mapping[Naming, str]] = {
        "timm": r"blocks\.0\.ls1\.gamma$",
        "native": r"patch_embed\.proj\.weight$",
        "transformers": r"encoder\.layer\.",
        "transformers-5": r"embeddings\.cls_token$",
    }
    # transformers puts the body under the model type and leaves the heads bare.
    body = r"(?:vit|deit)\.(?=embeddings\.|encoder\.|layers\.|layernorm\.|pooler\.)"
    # Parts of a feature extractor or of pre-training (masks, decoders of pixels) that a classifier never uses.
    ignored = r"pooler\.|(?:embeddings\.)?mask(?:ed)?_(?:token|embed)$|decoder[._]"
    timm_options = tuple(
        "img_size patch_size in_chans embed_dim depth num_heads mlp_ratio qkv_bias dynamic_img_size".split()
    )
    timm_ignored = FamilyLayouts.timm_ignored | {
        *("attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate")
    }
    timm_fixed: ClassVar[Mapping[str, Any]] = {"global_pool": "token"}
    model_types = ("deit", "vit")

    def body_prefix(self, config: Any) -> str:
        """The model type."""
        return "deit." if config.distilled else "vit."

    def other_names(self, name: str, naming: Naming, config: Any) -> tuple[str, ...]:
        """In timm the layer scale is a module: `gamma_1` is `ls1.gamma`; transformers has a table."""
        if naming == "timm":
            return (re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name),)
        for native, others in {**_BODIES[naming], **_HEADS[config.distilled is True]}.items():
            if match := _pattern(native).fullmatch(name):
                return tuple(other.format(**match.groupdict()) for other in others)
        raise CheckpointError(f"the {naming} layout of {self.family} has no name for {name}")

    def read_heads(self, names: Collection[str], config: Any, *, bare: bool) -> Any:
        """The distillation token and its head; transformers has models with the token alone."""
        found = {self._bare_name(name) for name in names}
        has_token = not found.isdisjoint(("dist_token", "embeddings.distillation_token"))
        distilled = has_token if bare else config.distilled
        if has_token and distilled and not found.isdisjoint(("classifier.weight", "cls_classifier.weight")):
            distilled = True if "cls_classifier.weight" in found else "token"
        return replace(config, distilled=distilled)

    def from_timm_name(self, architecture: str, tag: str | None) -> str:
        """The model whose weights timm publishes under this tag, else the same name, or DeiT-B for a plain ViT."""
        known = find_repo(f"timm/{architecture}.{tag}")
        if known is not None:
            return known[0].name
        return "deit_base_patch16_224" if _PLAIN.fullmatch(architecture) else architecture

    def timm_shape(self, architecture: str) -> Mapping[str, Any]:
        """The shape of a plain ViT."""
        match = _PLAIN.fullmatch(architecture)
        if match is None:
            return {}
        numbers = (*_SIZES[match[1]], int(match[2]), int(match[3]))
        return dict(zip(("embed_dim", "depth", "num_heads", "patch_size", "img_size"), numbers, strict=True))

    def write_timm(self, name: str, config: Any) -> tuple[str, dict[str, Any]]:
        """Shapes without a name of timm's are built from the smallest one.

        The tag is written where the architecture alone does not lead back to the name.
        """
        facts = {
            "num_features": config.embed_dim,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.distilled else "head",
        }
        three = _is_three(config)
        if config.distilled == "token":
            raise ConfigError("timm has no DeiT with a distillation token and one head; save it as 'transformers'")
        if three and config.distilled:
            raise ConfigError("timm has no DeiT III with a distillation token; save it with layout='native'")
        known = load_manifest().get(name)
        repo = next((s.repo for s in known.sources if s.layout == "timm" and s.repo), None) if known else None
        if repo is not None and _is_three(model_spec(name).config) == three:
            architecture, _, tag = repo.removeprefix("timm/").partition(".")
            return architecture, facts if self.from_timm_name(architecture, None) == name else {**facts, "tag": tag}
        return f"deit{'3_small' if three else '_tiny'}{'_distilled' if config.distilled else ''}_patch16_224", facts

    def read_transformers(self, data: Mapping[str, Any]) -> Any:
        """Configs leave fields out that have transformers' default: base width."""
        if data.get("hidden_act", "gelu") not in ("gelu", "gelu_python"):
            raise ConfigError(f"config.json has hidden_act={data['hidden_act']!r}; these models use the exact 'gelu'")
        defaults = {"image_size": 224, "layer_norm_eps": 1e-12}
        found = {ours: ({**defaults, **data}).get(theirs) for ours, theirs in _FIELDS.items()}
        overrides = {key: value for key, value in found.items() if value is not None}
        spec = model_spec(
            "deit_base_distilled_patch16_224" if data["model_type"] == "deit" else "deit_base_patch16_224"
        )
        width, hidden = overrides.get("embed_dim", 768), data.get("intermediate_size", 3072)
        ratio = hidden / width
        # the next number, where the product is rounded below the whole number: 980 / 60 * 60
        overrides["mlp_ratio"] = ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
        if "DeiTForImageClassification" in (data.get("architectures") or []):
            overrides["distilled"] = "token"
        return override(spec.config, overrides)

    def write_transformers(self, config: Any) -> dict[str, Any]:
        """A DeiT where there is a distillation token, "with teacher" if it has a head, else a ViT."""
        if _is_three(config):
            raise ConfigError("transformers has no DeiT III; save it with layout='native' or 'timm'")
        kind = "ForImageClassification" if config.num_classes else "Model"
        teacher = "WithTeacher" if config.num_classes and config.distilled is True else ""
        return {
            "architectures": [f"{'DeiT' if config.distilled else 'ViT'}{kind}{teacher}"],
            "model_type": "deit" if config.distilled else "vit",
            "hidden_act": "gelu",
            "intermediate_size": int(config.embed_dim * config.mlp_ratio),
            **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        }


@cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(escaped.replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{w\}", r"(?P<w>weight|bias)"))


def _is_three(config: Any) -> bool:
    """Whether a config has the layer scale and the positions of DeiT III.

    Raises: ConfigError: one without the other, which no other library has.
    """
    if bool(config.layer_scale) == config.prefix_positions:
        raise ConfigError(
            f"layer_scale={config.layer_scale} with prefix_positions={config.prefix_positions} is neither DeiT nor "
            f"DeiT III, which other libraries have; save it with layout='native'"
        )
    return bool(config.layer_scale)
