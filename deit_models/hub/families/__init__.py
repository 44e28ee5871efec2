"""The families whose layouts are known: one import and one entry each."""

from __future__ import annotations

from .contract import FamilyLayouts
from .deit import DeiTLayouts
from .levit import LeViTLayouts
from .t2t_vit import T2TViTLayouts
from .vit_resnas import ViTResNASLayouts

_LAYOUTS: tuple[FamilyLayouts, ...] = (DeiTLayouts(), LeViTLayouts(), T2TViTLayouts(), ViTResNASLayouts())
FAMILIES = {layouts.family: layouts for layouts in _LAYOUTS}


def layouts_of(family: str) -> FamilyLayouts:
    """The layouts of a family; of one that is registered at run time, the native one alone."""
    if family in FAMILIES:
        return FAMILIES[family]
    layouts = FamilyLayouts()
    layouts.family = family  # type: ignore[misc]
    return layouts
