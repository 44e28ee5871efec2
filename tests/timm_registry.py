"""Our models in timm's registry, as a plugin of pytest: timm's own tests of models run on them.

In a checkout of timm, of the release that is installed or near it:
`PYTHONPATH=<here>/tests pytest -p timm_registry tests/test_models.py -k deit_models_`
"""

from __future__ import annotations

import sys
import types
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

import deit_models

NAMES = (
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "t2t_vit_7",
    "t2t_vit_t_14",
    "levit_128s",
    "levit_192",
    "vit_resnas_tiny",
    "cait_xxs24_224",
    "resmlp_12",
)
# by these two names timm's tests choose what to run: transformers by the beginning of a model's, files with
# `forward_intermediates` by the file's
PREFIX, FILE = "deit_models_", "deit_models_in_timm.deit"
FIRST = dict.fromkeys(("deit", "cait", "resmlp"), "patch_embed.proj") | {
    "levit": "patch_embed.0.c",
    "vit_resnas": "patch_embed.conv1.conv",
}
HEADS = {"levit": ("head.l", "head_dist.l"), "vit_resnas": "cls_head"}


def _settings(name: str) -> dict[str, Any]:
    info = deit_models.model_info(name)
    heads = ("head", "head_dist") if info.distilled else "head"
    return {
        "input_size": (3, info.input_size, info.input_size),
        "fixed_input_size": True,
        "num_classes": info.num_classes,
        # of T2T-ViT the first layer that sees pixels is linear
        "first_conv": FIRST.get(info.family, "tokens_to_token.attention1.norm1"),
        "classifier": HEADS.get(info.family, heads),
        "pool_size": None,
    }


def _register(name: str, module: types.ModuleType) -> None:
    def build(pretrained: bool = False, **options: Any) -> torch.nn.Module:
        def model_class(**settings: Any) -> torch.nn.Module:
            return deit_models.create_model(name, **settings)

        return build_model_with_cfg(
            model_class, PREFIX + name, pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **options
        )

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__module__ = FILE
    setattr(module, PREFIX + name, register_model(build))


def _register_all() -> None:
    sys.modules[FILE.partition(".")[0]] = types.ModuleType(FILE.partition(".")[0])
    module = sys.modules[FILE] = types.ModuleType(FILE)
    module.default_cfgs = generate_default_cfgs({PREFIX + name: _settings(name) for name in NAMES})
    for name in NAMES:
        _register(name, module)


_register_all()
assert timm.is_model(PREFIX + NAMES[0])
