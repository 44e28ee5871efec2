"""Multiply-accumulates in closed form are those of torch's counter, for every model and for odd options."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import deit_models
from deit_models import ConfigError, create_model, list_models, model_info
from deit_models.macs import count_macs

STAGES = [
    {"embed_dim": 20, "head_dim": 8, "num_heads": [3, 1], "mlp_hidden": [30, 50]},
    {"embed_dim": 24, "head_dim": 6, "num_heads": [5], "mlp_hidden": [7]},
]
ODD: list[tuple[str, dict[str, Any]]] = [
    ("deit_tiny_patch16_224", {"img_size": (48, 80), "in_chans": 1, "num_classes": 3, "mlp_ratio": 1.7}),
    ("deit_tiny_distilled_patch16_224", {"img_size": (32, 16), "num_classes": 7, "qkv_bias": False}),
    ("deit_tiny_patch4_32", {"patch_size": 8, "depth": 1, "embed_dim": 30}),
    ("deit3_small_patch16_224", {"img_size": 64, "depth": 2}),
    ("t2t_vit_7", {"img_size": (48, 80), "in_chans": 5, "token_dim": 18, "num_classes": 3}),
    ("t2t_vit_t_14", {"img_size": (80, 48), "depth": 2, "token_dim": 30}),
    ("t2t_vit_24_token_labeling", {"img_size": (48, 32), "depth": 1, "num_classes": 9}),
    ("levit_128s", {"img_size": (80, 48), "in_chans": 4, "num_classes": 5}),
    ("levit_192", {"img_size": 112, "distilled": False, "attn_ratio": 3, "mlp_ratio": 3}),
    ("levit_256", {"img_size": (16, 32), "embed_dim": (40, 72), "depth": (1, 3), "num_heads": (2, 3), "key_dim": 24}),
    ("vit_resnas_tiny", {"img_size": (56, 112), "stages": STAGES, "patch_size": 28, "num_classes": 3}),
    ("vit_resnas_tiny", {"distilled": True, "img_size": 112, "in_chans": 2}),
    ("vit_resnas_tiny", {"stem": "patch", "patch_size": 7, "img_size": 84, "patch_head": False}),
]


def counted(name: str, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model = create_model(name, device="meta", **options).eval()
        model(torch.empty(1, model.config.in_chans, *model.config.image_hw, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", list_models())
def test_every_model_agrees_with_torchs_counter_and_the_manifest(name: str) -> None:
    formula = count_macs(create_model(name, device="meta").config)
    assert formula == counted(name) == model_info(name).macs


@pytest.mark.parametrize(("name", "options"), ODD)
def test_odd_options_agree_with_torchs_counter(name: str, options: dict[str, Any]) -> None:
    assert count_macs(create_model(name, device="meta", **options).config) == counted(name, **options)


def test_unknown_config_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"of a dict; there is one for DeiTConfig, T2TViTConfig, LeViTConfig, ViTRes"):
        deit_models.count_macs({})
