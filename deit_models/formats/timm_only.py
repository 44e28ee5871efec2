"""CaiT and ResMLP in timm, the one library besides the authors' that has them.

CaiT's tensors have the authors' names in timm; those of ResMLP differ in name, and its scales and shifts in shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..checkpoint import load_manifest
from ..errors import ConfigError
from ..registry import model_spec
from .family import FamilyLayouts, Naming


class CaiTLayouts(FamilyLayouts):
    """timm's names of options; the class blocks' MLPs have an option of their own, and so has our config."""

    signs: ClassVar[Mapping[Naming, str]] = {"native": r"blocks\.0\.attn\.proj_l\.weight$"}
    timm_options = tuple(
        "img_size patch_size in_chans embed_dim depth depth_token_only num_heads mlp_ratio mlp_ratio_token_only "
        "qkv_bias layer_scale".split()
    )
    timm_names: ClassVar[Mapping[str, str]] = {"layer_scale": "init_values"}
    timm_ignored = FamilyLayouts.timm_ignored | {"attn_drop_rate", "proj_drop_rate", "pos_drop_rate"}
    timm_fixed: ClassVar[Mapping[str, Any]] = {"global_pool": "token"}

    def write_timm(self, name: str, config: Any) -> tuple[str, dict[str, Any]]:
        """Shapes without a name of timm's are built from the smallest one."""
        facts = {
            "num_features": config.embed_dim,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        known = load_manifest().get(name)
        return name if known is not None and known.sources else "cait_xxs24_224", facts


class ResMLPLayouts(FamilyLayouts):
    """timm tells apart by tags what are names here: trained on labels, with a teacher, without labels."""

    signs: ClassVar[Mapping[Naming, str]] = {
        "timm": r"stem\.proj\.weight$",
        "native": r"patch_embed\.proj\.weight$",
    }
    timm_options = ("img_size", "in_chans")  # its functions fix the others
    timm_ignored = FamilyLayouts.timm_ignored | {"proj_drop_rate"}
    timm_fixed: ClassVar[Mapping[str, Any]] = {"global_pool": "avg", "nlhb": False, "stem_norm": False}
    _PLACES: ClassVar[Mapping[str, str]] = {
        r"^patch_embed\.": "stem.",
        r"\.attn\.": ".linear_tokens.",
        r"\.mlp\.": ".mlp_channels.",
        r"\.gamma_": ".ls",
    }
    _SUFFIXES: ClassVar[Mapping[str, str]] = {
        "fb_distilled_in1k": "_distilled",
        "fb_dino": "_dino",
        "fb_in22k_ft_in1k": "_in22ft1k",
    }

    def other_names(self, name: str, naming: Naming, config: Any) -> tuple[str, ...]:
        """One name for each tensor."""
        del naming, config
        for place, theirs in self._PLACES.items():
            name = re.sub(place, theirs, name)
        return (name,)

    def read_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Timm's scales and shifts have two more axes."""
        return tensor.flatten() if _is_affine(name) and tensor.shape[:-1] == (1, 1) else tensor

    def write_tensor(self, name: str, tensor: Tensor, naming: Naming) -> Tensor:
        """The inverse of `read_tensor`."""
        tensor = super().write_tensor(name, tensor, naming)
        return tensor[None, None] if _is_affine(name) else tensor

    def from_timm_name(self, architecture: str, tag: str | None) -> str:
        """Timm's name today, or an older one that says what the tag says now; "big" is the authors' B."""
        found = re.fullmatch(r"resmlp_(big_)?(\d+)(_distilled)?_224(_in22ft1k|_dino)?", architecture)
        if found is None:
            return architecture
        suffix = found[3] or found[4] or self._SUFFIXES.get(tag or "", "")
        return f"resmlp_{'b' if found[1] else ''}{found[2]}{suffix}"

    def write_timm(self, name: str, config: Any) -> tuple[str, dict[str, Any]]:
        """Raises: ConfigError: timm builds the published shapes alone."""
        for ours in ("resmlp_12", "resmlp_24", "resmlp_36", "resmlp_b24"):
            shape = ("patch_size", "embed_dim", "depth", "mlp_ratio")
            if all(getattr(model_spec(ours).config, key) == getattr(config, key) for key in shape):
                facts = {
                    "num_features": config.embed_dim,
                    "pool_size": None,
                    "first_conv": "stem.proj",
                    "classifier": "head",
                }
                return f"{ours.replace('b24', 'big_24')}_224", facts
        raise ConfigError(f"timm has no ResMLP with the width, depth or patches of this {name}; use layout='native'")


def _is_affine(name: str) -> bool:
    return name.endswith((".alpha", ".beta"))
