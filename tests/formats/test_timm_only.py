"""CaiT and ResMLP under timm's names; that timm answers alike is in tests/models."""

from pathlib import Path

import pytest
import torch

from deit_models import ConfigError, create_model, list_models, model_info
from deit_models.formats.layouts import layouts_of
from deit_models.formats.publish import layout_tensors

TIMM = {  # ours: timm's name and tag
    "resmlp_12": ("resmlp_12_224", "fb_in1k"),
    "resmlp_12_distilled": ("resmlp_12_224", "fb_distilled_in1k"),
    "resmlp_12_dino": ("resmlp_12_224", "fb_dino"),
    "resmlp_24": ("resmlp_24_224", "fb_in1k"),
    "resmlp_24_distilled": ("resmlp_24_224", "fb_distilled_in1k"),
    "resmlp_24_dino": ("resmlp_24_224", "fb_dino"),
    "resmlp_36": ("resmlp_36_224", "fb_in1k"),
    "resmlp_36_distilled": ("resmlp_36_224", "fb_distilled_in1k"),
    "resmlp_b24": ("resmlp_big_24_224", "fb_in1k"),
    "resmlp_b24_distilled": ("resmlp_big_24_224", "fb_distilled_in1k"),
    "resmlp_b24_in22ft1k": ("resmlp_big_24_224", "fb_in22k_ft_in1k"),
}


def test_names_of_timm_are_the_manifests() -> None:
    layouts = layouts_of("resmlp")
    assert set(TIMM) == {name for name in list_models("resmlp_*") if model_info(name).sources}
    for name, (architecture, tag) in TIMM.items():
        assert layouts.from_timm_name(architecture, tag) == name
        assert model_info(name).sources[0].repo == f"timm/{architecture}.{tag}"
        assert layouts.write_timm(name, create_model(name, device="meta").config)[0] == architecture
    # timm's names until 2023
    assert layouts.from_timm_name("resmlp_12_distilled_224", None) == "resmlp_12_distilled"
    assert layouts.from_timm_name("resmlp_big_24_224_in22ft1k", None) == "resmlp_b24_in22ft1k"
    assert layouts.from_timm_name("resmlp_24_224_dino", None) == "resmlp_24_dino"


def test_shapes_that_timm_cannot_build_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="timm has no ResMLP with the width, depth or patches"):
        create_model("resmlp_micro_patch4_32").save_pretrained(tmp_path / "timm", layout="timm")


def test_tensors_come_back_from_timms_names_bit_for_bit() -> None:
    model = create_model("resmlp_12", depth=2, embed_dim=24, img_size=32)
    named = layout_tensors(model, "timm")
    assert named["blocks.1.norm2.alpha"].shape == named["norm.beta"].shape == (1, 1, 24)
    assert {"stem.proj.weight", "blocks.0.linear_tokens.bias", "blocks.0.mlp_channels.fc1.weight"} <= set(named)
    assert named["blocks.0.ls2"].shape == (24,)
    mapped = layouts_of("resmlp").to_native(named, model.state_dict(), config=model.config)
    assert mapped[1:] == ([], [], [])
    assert all(torch.equal(mapped.tensors[key], tensor) for key, tensor in model.state_dict().items())


def test_tensors_of_cait_have_one_name_everywhere() -> None:
    model = create_model("cait_micro_patch4_32", depth=1)
    named = layout_tensors(model, "timm")
    assert list(named) == list(model.state_dict())
    mapped = layouts_of("cait").to_native(named, model.state_dict(), config=model.config)
    assert mapped[1:] == ([], [], [])
    with pytest.raises(ConfigError, match="cait has no layout 'timm-conv'"):
        layout_tensors(model, "timm-conv")
