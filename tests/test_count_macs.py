"""Multiply-accumulates of configs, models and names at any size, against a count of the model itself."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from nas.toy import RESNAS, RESNAS_OPTIONS, measured
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deit_models
from deit_models import ConfigError, UnknownModelError, count_macs, create_model, list_models, model_info
from deit_models.models.deit import DeiT, DeiTConfig
from deit_models.models.layers import ImageClassifier
from deit_models.models.levit import LeViT, LeViTConfig
from deit_models.models.t2t_vit import T2TViT, T2TViTConfig
from deit_models.models.vit_resnas import ViTResNAS
from deit_models.registry import model_spec, register_model

DEIT = DeiTConfig(img_size=64, embed_dim=24, depth=2, num_heads=3, num_classes=5)
LEVIT = LeViTConfig(img_size=64, embed_dim=(16, 24, 40), depth=(1, 2, 1), num_heads=(2, 3, 1), key_dim=8, num_classes=5)
T2T = T2TViTConfig(img_size=48, token_dim=16, embed_dim=24, depth=2, num_heads=3, num_classes=5)
FULL = replace(T2T, tokens_type="transformer")
ODD: list[tuple[type[ImageClassifier], Any, dict[str, Any]]] = [
    (DeiT, DEIT, {}),
    (DeiT, DEIT, {"img_size": (32, 80)}),
    (DeiT, DEIT, {"img_size": (80, 16)}),
    (DeiT, DEIT, {"patch_size": 4, "img_size": (28, 32)}),
    (DeiT, DEIT, {"patch_size": 14, "img_size": 42}),
    (DeiT, DEIT, {"patch_size": 64}),
    (DeiT, DEIT, {"in_chans": 1}),
    (DeiT, DEIT, {"in_chans": 7, "num_classes": 1}),
    (DeiT, DEIT, {"distilled": True}),
    (DeiT, DEIT, {"distilled": True, "num_classes": 11, "img_size": (32, 48)}),
    (DeiT, DEIT, {"mlp_ratio": 2.6, "depth": 3}),
    (DeiT, DEIT, {"qkv_bias": False, "num_heads": 1}),
    (DeiT, DEIT, {"layer_scale": 1e-4, "prefix_positions": False, "distilled": True}),
    (DeiT, DEIT, {"dynamic_img_size": True, "drop_rate": 0.1, "drop_path_rate": 0.1}),
    (LeViT, LEVIT, {}),
    (LeViT, LEVIT, {"img_size": (48, 112)}),
    (LeViT, LEVIT, {"img_size": (16, 80)}),
    (LeViT, LEVIT, {"img_size": 16}),
    (LeViT, LEVIT, {"in_chans": 1, "num_classes": 1}),
    (LeViT, LEVIT, {"distilled": False}),
    (LeViT, LEVIT, {"key_dim": 5}),
    (LeViT, LEVIT, {"attn_ratio": 1, "mlp_ratio": 3}),
    (LeViT, LEVIT, {"attn_ratio": 5, "mlp_ratio": 1}),
    (LeViT, LEVIT, {"embed_dim": (24,), "depth": (3,), "num_heads": (4,)}),
    (LeViT, LEVIT, {"embed_dim": (40, 16), "depth": (1, 1), "num_heads": (2, 3), "img_size": (80, 48)}),
    (LeViT, LEVIT, {"embed_dim": (16,) * 4, "depth": (1,) * 4, "num_heads": (1, 2, 3, 4), "img_size": 112}),
    *((ViTResNAS, RESNAS, options) for options in RESNAS_OPTIONS),
    (T2TViT, T2T, {}),
    (T2TViT, FULL, {}),
    (T2TViT, T2T, {"img_size": (16, 80)}),
    (T2TViT, FULL, {"img_size": (64, 32)}),
    (T2TViT, T2T, {"in_chans": 1, "num_classes": 1}),
    (T2TViT, FULL, {"in_chans": 5, "num_classes": 11}),
    (T2TViT, T2T, {"token_head": True}),
    (T2TViT, FULL, {"token_head": True, "img_size": (32, 48)}),
    (T2TViT, T2T, {"token_dim": 2}),
    (T2TViT, T2T, {"token_dim": 22, "mlp_ratio": 2.3, "depth": 1}),
    (T2TViT, FULL, {"token_dim": 22, "qkv_bias": True}),
    (T2TViT, T2T, {"num_heads": 12, "dynamic_img_size": True, "pos_resize": "recompute"}),
]


@pytest.mark.parametrize("name", list_models())
def test_every_model_has_as_many_as_torch_counts(name: str) -> None:
    spec = model_spec(name)
    assert count_macs(name) == measured(spec.model_class, spec.config) == model_info(name).macs


def case_id(model_class: type[ImageClassifier], config: Any, options: dict[str, Any]) -> str:
    stem = "t2t_vit_t" if config is FULL else model_class.family
    return "-".join([stem, *(f"{name}={value}" for name, value in options.items())])


@pytest.mark.parametrize(("model_class", "base", "options"), ODD, ids=[case_id(*case) for case in ODD])
def test_every_option_counts_as_torch_counts_it(
    model_class: type[ImageClassifier], base: Any, options: dict[str, Any]
) -> None:
    config = replace(base, **options)
    assert count_macs(config) == measured(model_class, config)


@pytest.mark.parametrize("config", [DEIT, LEVIT, T2T, RESNAS], ids=["deit", "levit", "t2t_vit", "vit_resnas"])
def test_every_option_is_tried(config: Any) -> None:
    # the registered models vary the width, and FULL the type of token layer; the rest cannot matter
    elsewhere = {"embed_dim", "tokens_type", "norm_eps", "token_drop_rate", "drop_path_uniform", "patch_drop_rate"}
    tried = {name for _, base, options in ODD if type(base) is type(config) for name in options}
    assert {field.name for field in fields(config)} - {"drop_rate", "drop_path_rate"} <= tried | elsewhere


def test_a_model_is_counted_as_it_is_now() -> None:
    model = create_model("deit_micro_distilled_patch4_32")
    before = count_macs(model)
    assert before == count_macs("deit_micro_distilled_patch4_32")
    deit_models.adapt_head(model, num_classes=3, img_size=(16, 40))
    assert model.config.num_classes == 3
    assert count_macs(model) == measured(DeiT, model.config) != before


def test_fusing_changes_nothing() -> None:
    fused = LeViT(LEVIT).fuse()
    with FlopCounterMode(display=False) as counter:
        fused(torch.zeros(1, 3, 64, 64))
    assert 2 * count_macs(fused) == counter.get_total_flops()


@pytest.mark.usefixtures("own_registry")
def test_names_registered_at_run_time_are_counted() -> None:
    register_model("toy", T2TViT, T2T, depth=3)
    assert count_macs("toy") == model_info("toy").macs


@dataclass(frozen=True, slots=True, kw_only=True)
class WiderConfig(DeiTConfig):
    """What a user's own model may have; its fields can mean anything."""


@pytest.mark.parametrize("given", [WiderConfig(), DeiTConfig, 224, None, nn.Linear(2, 2)], ids=repr)
def test_unknown_configs_are_refused(given: Any) -> None:
    name = re.escape(type(given).__name__)
    expected = rf"^cannot count the MACs of {name}; expected CaiTConfig, DeiTConfig, LeViTConfig, ResMLP.*model_info"
    with pytest.raises(ConfigError, match=expected):
        count_macs(given)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownModelError, match="unknown model 'deit_huge'"):
        count_macs("deit_huge")
