"""ViT-ResNAS: the authors' figures and notation, their files, stages, and what the contract suite cannot know."""

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import reference
from numpy.testing import assert_allclose
from torch import Tensor

from deit_models import ConfigError, create_model, from_pretrained, list_models, model_info, register_model
from deit_models.models.layers import resize_pos_embed
from deit_models.models.vit_resnas import SpatialReduction, Stage, ViTResNAS, ViTResNASConfig
from deit_models.registry import model_spec

# Parameters with and without the patch head, and multiply-accumulates, of the authors' estimator.
PUBLISHED = {
    "vit_res_tiny": (42781736, 42012736, 1794378240),
    "vit_resnas_tiny": (41498552, 40793552, 1782630272),
    "vit_resnas_small": (64605108, 63724108, 2845501856),
    "vit_resnas_medium": (97323672, 96442672, 4513135936),
    # with the stem counted at its true size, which the authors' estimator leaves at that of 224 pixels
    "vit_resnas_medium_280": (97389192, 96508192, 7219069888),
    "vit_resnas_medium_336": (97469272, 96588272, 10739099456),
    "vit_resnas_medium_392": (97563912, 96682912, 15200890816),
    "vit_resnas_supernet_tiny": (85839464, 84814464, 3497553920),
    "vit_resnas_supernet_small": (156599528, 155318528, 6260342784),
}
STAGES: tuple[dict[str, Any], ...] = (
    {"embed_dim": 16, "head_dim": 8, "num_heads": (3, 1), "mlp_hidden": (20, 28)},
    {"embed_dim": 24, "head_dim": 6, "num_heads": (2,), "mlp_hidden": (30,)},
    {"embed_dim": 24, "head_dim": 6, "num_heads": (5,), "mlp_hidden": (10,)},
)
SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 8, "stem_dim": 4, "num_classes": 7, "stages": STAGES}


def small(**overrides: Any) -> ViTResNAS:
    torch.manual_seed(0)
    return ViTResNAS(ViTResNASConfig(**{**SMALL, **overrides})).eval()


def images(height: int = 64, width: int | None = None) -> Tensor:
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(1))


# The authors' figures


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], ViTResNAS]:
    model = create_model("vit_resnas_tiny").eval()
    reference.check_filling("vit_resnas_tiny")
    missing, unexpected = model.load_state_dict(reference.weights("vit_resnas_tiny"), strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return reference.read("vit_resnas_tiny"), model


@torch.inference_mode()
def test_logits_and_features_are_the_authors(golden: tuple[dict[str, Any], ViTResNAS]) -> None:
    recorded, model = golden
    outputs, x = recorded["outputs"], reference.inputs(224)
    assert_allclose(model(x), outputs["logits"], rtol=1e-5, atol=1e-4)
    assert_allclose(model.embed(x)[0], outputs["features"], rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_patch_head_says_what_the_authors_says(golden: tuple[dict[str, Any], ViTResNAS]) -> None:
    recorded, model = golden
    features = model.forward_features(reference.inputs(224))
    assert model.all_logits(features).patches is None
    model.train()
    patches = model.all_logits(features).patches
    model.eval()
    assert patches is not None
    outputs = recorded["outputs"]
    assert list(patches.shape) == outputs["patch_logits_seq_shape"]
    assert_allclose(patches.mean(1), outputs["patch_logits_avg"], rtol=1e-5, atol=1e-4)
    assert_allclose(patches[0, 0], outputs["patch_logits_seq_image0_patch0"], rtol=1e-5, atol=1e-4)


@torch.inference_mode()
def test_both_heads_of_a_distilled_network_are_the_authors() -> None:
    name = "vit_resnas_tiny_distill_token"
    model = create_model("vit_resnas_tiny", distilled=True, patch_head=False).eval()
    model.load_state_dict(reference.weights(name), strict=False)
    heads, outputs = model.forward_heads(reference.inputs(224)), reference.read(name)["outputs"]
    assert heads.dist is not None
    assert_allclose(heads.cls, outputs["logits_cls"], rtol=1e-5, atol=1e-4)
    assert_allclose(heads.dist, outputs["logits_dist"], rtol=1e-5, atol=1e-4)


def test_state_dict_has_the_authors_names_and_shapes(golden: tuple[dict[str, Any], ViTResNAS]) -> None:
    recorded, model = golden
    expected = {entry["name"]: tuple(entry["shape"]) for entry in recorded["state_dict"]}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == recorded["num_params"]["total"]
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == recorded["config"]["norm_eps"]


@pytest.mark.parametrize(("name", "keys"), [("tiny", 234), ("small", 246), ("medium", 282)])
def test_number_of_tensors_is_the_published_one(name: str, keys: int) -> None:
    assert len(create_model(f"vit_resnas_{name}", device="meta").state_dict()) == keys


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name: str) -> None:
    with_head, without, macs = PUBLISHED[name]
    info = model_info(name)
    assert (info.params, info.macs) == (with_head, macs)
    bare = create_model(name, device="meta", patch_head=False)
    assert sum(parameter.numel() for parameter in bare.parameters()) == without


# Files


@pytest.mark.parametrize("payload", ["model_ema", "model"])
def test_authors_file_loads_and_shows_its_licence(
    payload: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(name for name in list_models("vit_resnas_*") if model_info(name).licence == "CC-BY-NC-4.0")
    shrunken = dict(patch_head=True, **SMALL)
    spec = model_spec(name)
    monkeypatch.setitem(__import__("deit_models.registry").registry._specs, name, _with_config(spec, shrunken))
    model, other = small(patch_head=True), small(patch_head=True, num_classes=7)
    with torch.no_grad():
        other.cls_head.weight.add_(1)
    file = {"optimizer": {"state": {}}, "epoch": 289, "args": argparse.Namespace(lr=1e-3), payload: model.state_dict()}
    if payload == "model_ema":
        file["model"] = other.state_dict()  # beside averaged weights, which are those that were scored
    torch.save(file, tmp_path / "best.pth.tar")
    with caplog.at_level(logging.WARNING):
        loaded = from_pretrained(tmp_path / "best.pth.tar", model=name, cache_dir=tmp_path / "cache")
    assert "licensed CC-BY-NC-4.0, for non-commercial use only" in caplog.text
    assert torch.equal(loaded(images()), model(images()))
    assert loaded.origin is not None
    assert loaded.origin.licence == "CC-BY-NC-4.0"
    loaded.save_pretrained(tmp_path / "saved")
    assert "license: cc-by-nc-4.0" in (tmp_path / "saved" / "README.md").read_text()


def _with_config(spec: Any, settings: dict[str, Any]) -> Any:
    import dataclasses

    return dataclasses.replace(spec, config=ViTResNASConfig(**settings))


def test_own_trainings_carry_no_licence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    create_model("vit_resnas_tiny", **SMALL).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = from_pretrained(tmp_path)
    assert loaded.origin is not None
    assert loaded.origin.licence is None
    assert not caplog.records


def test_stages_come_back_from_a_folder(tmp_path: Path) -> None:
    model = create_model("vit_res_micro_patch4_32", **SMALL)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert all(isinstance(stage, Stage) for stage in loaded.config.stages)


# The network


@torch.no_grad()
def test_reduction_is_the_residual_plus_the_main_path() -> None:
    model = small()
    layer = next(layer for layer in model.blocks if isinstance(layer, SpatialReduction))
    for parameter in (layer.patch_reduce.weight, layer.patch_reduce.bias, layer.pos_embed):
        parameter.zero_()
    layer.token_transform.weight.zero_()
    layer.token_transform.bias.zero_()
    x = torch.randn(2, 1 + 8 * 8, 16)
    out = layer(x)
    assert out.shape == (2, 1 + 4 * 4, 24)
    assert torch.equal(out[:, 0, :16], x[:, 0])
    assert out[..., 16:].abs().max() == 0
    # the first patch of the smaller grid is the mean of a 2x2 square
    square = x[:, 1:].reshape(2, 8, 8, 16)[:, :2, :2].mean((1, 2))
    torch.testing.assert_close(out[:, 1, :16], square)


def test_stages_shrink_and_widen() -> None:
    last = small().get_intermediate_layers(images(), layers=3)
    assert [tuple(tokens.patches.shape) for tokens in last] == [(2, 16, 8, 8), (2, 24, 4, 4), (2, 24, 2, 2)]


def test_positions_of_every_stage_are_resized() -> None:
    model, larger = small(), small(img_size=(96, 128))
    state = larger.fit_state(model.state_dict(), model.config)
    larger.load_state_dict(state)
    assert larger(images(96, 128)).isfinite().all()
    reductions = [
        f"blocks.{i}.pos_embed" for i, layer in enumerate(model.blocks) if isinstance(layer, SpatialReduction)
    ]
    before = model.state_dict()
    assert torch.equal(
        state["pos_embed"], resize_pos_embed(before["pos_embed"], num_prefix=1, grid=(12, 16), source_grid=(8, 8))
    )
    for name, grid, source in zip(reductions, [(6, 8), (3, 4)], [(4, 4), (2, 2)], strict=True):
        assert torch.equal(state[name], resize_pos_embed(before[name], num_prefix=0, grid=grid, source_grid=source))


def test_stochastic_depth_grows_over_the_blocks_and_spares_reductions() -> None:
    model = small(drop_path_rate=0.3)
    rates = [layer.drop_path.rate for layer in model.blocks if hasattr(layer, "drop_path")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    model.set_drop_rates(drop_rate=0.1, drop_path_rate=0.6)
    rates = [layer.drop_path.rate for layer in model.blocks if hasattr(layer, "drop_path")]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6])


def test_stem_without_convolutions() -> None:
    model = small(stem="patch")
    assert {name.split(".")[1] for name in model.state_dict() if name.startswith("patch_embed")} == {"conv_proj"}
    assert model(images()).shape == (2, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 72}, "img_size=72 is not a multiple of size_step=32; use 64 or 96"),
        ({"stages": STAGES[::-1]}, r"stages of widths \[24, 24, 16\]; expected one or more, none narrower"),
        ({"stages": ()}, "expected one or more"),
        ({"stages": ({**STAGES[0], "mlp_hidden": (20,)},)}, "expected one of each for every block"),
        ({"stages": ({**STAGES[0], "num_heads": (3, 0)},)}, r"num_heads=\(3, 0\)"),
        ({"stages": ({"embed_dims": 16},)}, r"is no stage .*; expected a table with embed_dim, head_dim"),
        ({"stages": (5,)}, "5 is no stage"),
        ({"stem": "convolution"}, "stem='convolution'; expected 'conv' or 'patch'"),
        ({"patch_size": 7, "img_size": 56}, "patch_size=7 is odd"),
    ],
)
def test_impossible_networks_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**change)


@pytest.mark.usefixtures("own_registry")
def test_registered_at_run_time_like_any_other() -> None:
    register_model("my_search", ViTResNAS, ViTResNASConfig(), **SMALL)
    assert model_info("my_search").params == sum(p.numel() for p in small().parameters())
