"""T2T-ViT elsewhere: nowhere. Neither timm nor transformers has it, and its authors' names are the native ones."""

from __future__ import annotations

from .contract import FamilyLayouts


class T2TViTLayouts(FamilyLayouts):
    """See the module docstring."""

    family = "t2t_vit"
