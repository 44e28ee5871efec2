"""ViT-ResNAS elsewhere: nowhere. Neither timm nor transformers has it, and its authors' names are the native ones."""

from __future__ import annotations

from .contract import FamilyLayouts


class ViTResNASLayouts(FamilyLayouts):
    """See the module docstring."""

    family = "vit_resnas"
