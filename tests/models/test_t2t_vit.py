"""T2T-ViT: the authors' figures, half precision, positions of other sizes, and what the contract suite cannot know."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from golden import reference
from numpy.testing import assert_allclose
from torch import Tensor, nn

from deit_models import ConfigError, create_model, model_info
from deit_models.models.layers import resize_pos_embed
from deit_models.models.t2t_vit import (
    _FEATURE_SCALE,
    T2TViT,
    T2TViTConfig,
    TokenPerformer,
    TokenTransformer,
    _features,
    performer_attention,
    sinusoid,
)

GOLDEN = ("t2t_vit_7", "t2t_vit_t_14")
SMALL: dict[str, Any] = {
    "img_size": 64,
    "num_classes": 7,
    "token_dim": 16,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
}
# The README's figures, in millions of parameters and billions of multiply-accumulates.
PUBLISHED = {
    "t2t_vit_7": (4.3, 1.1),
    "t2t_vit_10": (5.9, 1.5),
    "t2t_vit_12": (6.9, 1.8),
    "t2t_vit_14": (21.5, 4.8),
    "t2t_vit_19": (39.2, 8.5),
    "t2t_vit_24": (64.1, 13.8),
    "t2t_vit_t_14": (21.5, 6.1),
    "t2t_vit_t_19": (39.2, 9.8),
    "t2t_vit_t_24": (64.1, 15.0),
    "t2t_vit_14_384": (21.7, None),
}


def small(**overrides: Any) -> T2TViT:
    torch.manual_seed(0)
    return T2TViT(T2TViTConfig(**{**SMALL, **overrides})).eval()


def images(height: int = 64, width: int | None = None, *, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width or height, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["performer", "transformer"])
def tokens_type(request: pytest.FixtureRequest) -> str:
    return request.param


# Golden figures of the authors' code


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request: pytest.FixtureRequest) -> tuple[dict[str, Any], T2TViT]:
    model = create_model(request.param)
    missing, unexpected = model.load_state_dict(reference.weights(request.param), strict=False)
    assert (missing, unexpected) == (["pos_embed"], [])
    return reference.read(request.param), model.eval()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_filling_is_the_recorded_one(name: str) -> None:
    check = reference.read(name)["weights_check"]
    values = torch.cat([w.flatten() for w in reference.weights(name).values()]).double()
    assert (len(reference.weights(name)), values.numel()) == (check["entries"], check["values"])
    assert_allclose([values.sum(), values.square().sum()], [check["sum"], check["sum_of_squares"]], rtol=1e-6)


def test_golden_logits_and_features(golden: tuple[dict[str, Any], T2TViT]) -> None:
    recorded, model = golden
    x = reference.inputs(224)
    with torch.inference_mode():
        features = model.forward_features(x)
        logits = model.head(features[:, 0])
    assert_allclose(logits, recorded["outputs"]["logits"], rtol=0, atol=1e-4)
    assert_allclose(features[0, 0], recorded["outputs"]["features"], rtol=0, atol=1e-4)


def test_golden_positions(golden: tuple[dict[str, Any], T2TViT]) -> None:
    recorded, model = golden
    kept = recorded["pos_embed_kept"]
    assert list(model.pos_embed.shape) == kept["shape"]
    for position, values in kept["rows"].items():
        assert_allclose(model.pos_embed[0, int(position), : len(values)], values, rtol=0, atol=1e-6)
    assert_allclose([model.pos_embed.mean(), model.pos_embed.std(correction=0)], [kept["mean"], kept["std"]], atol=1e-6)


def test_golden_config_scales_and_epsilons(golden: tuple[dict[str, Any], T2TViT]) -> None:
    recorded, model = golden
    theirs, ours = recorded["config"], model.config
    for field in ("img_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"):
        assert getattr(ours, field) == theirs[field], field
    assert (ours.tokens_type, ours.token_dim) == tuple(theirs["tokens_to_token"][key] for key in ("type", "token_dim"))
    norms = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert norms == [theirs["norm_eps"]] * (2 * ours.depth + 1 + 4)
    if ours.tokens_type == "transformer":
        scales = [module.attn.scale for module in model.modules() if isinstance(module, TokenTransformer)]
        assert_allclose(scales, theirs["tokens_to_token"]["attention_scale"], rtol=1e-6)


def test_golden_state_dict_names_shapes_and_order(golden: tuple[dict[str, Any], T2TViT]) -> None:
    recorded, model = golden
    ours = [(name, list(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    assert ours == [(e["name"], e["shape"], f"torch.{e['dtype']}") for e in recorded["state_dict"]]
    assert sum(p.numel() for p in model.parameters()) == recorded["num_params"]["total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == recorded["num_params"]["trainable"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_and_cost_are_the_published_ones(name: str) -> None:
    info, (params, macs) = model_info(name), PUBLISHED[name]
    assert round(info.params / 1e6, 1) == params
    if macs is not None:
        assert info.macs / 1e9 == pytest.approx(macs, rel=0.015, abs=0.05)


# Half precision: where the original gives NaN


class Louder(nn.Module):
    """Multiplies what a layer gives."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.factor


def louder(model: T2TViT, factor: float) -> T2TViT:
    """The model with large activations: keys, queries and values of the token layers grow by the factor, in place."""
    for layer in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
        if isinstance(layer, TokenPerformer):
            layer.kqv = Louder(layer.kqv, factor)
        else:
            layer.attn.qkv = Louder(layer.attn.qkv, factor)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1, 10, 300])
def test_autocast_with_large_activations_stays_finite_forward_and_backward(
    tokens_type: str, dtype: torch.dtype, factor: int
) -> None:
    model, x = louder(small(tokens_type=tokens_type), factor), images() * 10
    exact = model(x)
    with torch.autocast("cpu", dtype):
        rounded = model(x)
    assert rounded.isfinite().all()
    rounded.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_computed_in_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = TokenPerformer(12, T2TViTConfig()).eval()
    layer.reset_parameters()
    query, key, value = (torch.randn(2, 50, 64).to(dtype) for _ in range(3))
    exact = performer_attention(query.float(), key.float(), value.float(), layer.w)
    with torch.autocast("cpu", dtype):
        mixed = performer_attention(query, key, value, layer.w)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, exact.to(dtype))
    # |x|^2 of a vector of 300s overflows fp16, and its features vanish: attention to nothing, not NaN
    far = torch.full((1, 5, 64), 300.0, dtype=dtype)
    assert torch.equal(performer_attention(far, far, value[:1, :5], layer.w), torch.zeros(1, 5, 64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_model_in_half_precision_answers_like_in_float32(tokens_type: str, dtype: torch.dtype) -> None:
    model, x = small(tokens_type=tokens_type), images()
    exact = model(x)
    rounded = model.to(dtype)(x.to(dtype))
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)


def test_random_features_approximate_softmax_attention() -> None:
    """The Performer's claim, with many orthogonal features: phi(q) . phi(k) is exp(q . k) on average."""
    torch.manual_seed(0)
    layer, estimates = TokenPerformer(12, T2TViTConfig()), []
    query, key = torch.randn(1, 1, 64) * 0.15, torch.randn(1, 6, 64) * 0.15
    for _ in range(400):
        # rows as long as Gaussian vectors of 64 values are, of which the frozen rows keep only the direction
        nn.init.orthogonal_(layer.w)
        layer.w.data *= torch.randn(32, 64).norm(dim=1, keepdim=True)
        estimates.append(_features(query, layer.w) @ _features(key, layer.w).transpose(1, 2))
    ratio = torch.stack(estimates).mean(0) / _FEATURE_SCALE**2 / (query @ key.transpose(1, 2)).exp()
    assert (ratio - 1).abs().max() < 0.15


def test_frozen_features_are_orthogonal_rows_of_norm_sqrt_m() -> None:
    for layer in (small().tokens_to_token.attention1, create_model("t2t_vit_7").tokens_to_token.attention2):
        rows = layer.w.shape[0]
        torch.testing.assert_close(layer.w @ layer.w.T, rows * torch.eye(rows), atol=1e-4, rtol=0)
        assert not layer.w.requires_grad


# Tokens


def test_tokens_of_a_non_square_image_lie_row_by_row(tokens_type: str) -> None:
    """What a bright patch moves much is at its own place, or beside it, where the windows overlap."""
    model = small(tokens_type=tokens_type, img_size=(48, 80))
    dark = torch.zeros(1, 3, 48, 80)
    for row, column in ((0, 0), (1, 3), (2, 4)):
        bright = dark.clone()
        bright[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1
        moved = (model.tokens_to_token(bright) - model.tokens_to_token(dark)).norm(dim=-1).reshape(3, 5)
        places = (moved > moved.max() / 3).nonzero()
        assert len(places) >= 4
        assert (places - torch.tensor([row, column])).abs().max() == 1


def test_full_attention_has_the_scale_of_its_input() -> None:
    model = small(tokens_type="transformer", in_chans=2)
    assert model.tokens_to_token.attention1.attn.scale == pytest.approx((2 * 49) ** -0.5)
    assert model.tokens_to_token.attention2.attn.scale == pytest.approx((16 * 9) ** -0.5)


def test_token_dropout_is_the_performers_own_and_survives_the_recipes_rates() -> None:
    model = small(token_drop_rate=0.5)
    model.set_drop_rates(drop_rate=0.2, drop_path_rate=0.3)
    inside = [m.p for m in model.tokens_to_token.modules() if isinstance(m, nn.Dropout)]
    assert inside == [0.5] * 4
    assert model.pos_drop.p == 0.2
    assert {m.p for m in model.blocks.modules() if isinstance(m, nn.Dropout)} == {0.2}
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.15, 0.3])
    model.set_drop_rates(drop_rate=0.0, drop_path_rate=0.0)
    model.train()
    assert not torch.equal(model(images()), model(images()))


def test_token_head_adds_half_the_strongest_patch() -> None:
    model, x = small(token_head=True), images()
    features = model.forward_features(x)
    patches = model.aux_head(features[:, 1:]).max(dim=1).values
    torch.testing.assert_close(model(x), model.head(features[:, 0]) + patches / 2)
    assert small().aux_head is None


def test_attention_maps_and_intermediate_layers_follow_the_forward_pass(tokens_type: str) -> None:
    model, x = small(tokens_type=tokens_type, img_size=(48, 80)), images(48, 80)
    maps = model.attention_maps(x)
    assert maps.shape == (3, 2, 3, 16, 16)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 3, 16))
    (layer,) = model.get_intermediate_layers(x)
    tokens = model.forward_features(x)
    torch.testing.assert_close(layer.prefix, tokens[:, :1])
    torch.testing.assert_close(layer.patches[:, :, 1, 2], tokens[:, 1 + 7])


# Positions


def test_sinusoid_is_the_formula() -> None:
    table = sinusoid(50, 8)
    assert table.shape == (1, 50, 8)
    for position, column in ((0, 0), (0, 1), (7, 2), (49, 5), (13, 7)):
        angle = position / 10000 ** (2 * (column // 2) / 8)
        wave = math.cos if column % 2 else math.sin
        assert table[0, position, column].item() == pytest.approx(wave(angle), abs=1e-6)


def test_positions_of_another_size_are_interpolated_or_recomputed() -> None:
    made = small()
    for grid, size in (((2, 3), (32, 48)), ((6, 6), 96)):
        interpolated = small(img_size=size).fit_state(made.state_dict(), made.config)["pos_embed"]
        assert torch.equal(interpolated, resize_pos_embed(made.pos_embed, num_prefix=1, grid=grid))
        recomputed = small(img_size=size, pos_resize="recompute").fit_state(made.state_dict(), made.config)
        assert torch.equal(recomputed["pos_embed"], sinusoid(1 + grid[0] * grid[1], 24))
    again = small(pos_resize="recompute").fit_state(made.state_dict(), made.config)
    assert again["pos_embed"].data_ptr() == made.pos_embed.data_ptr()


@pytest.mark.parametrize("pos_resize", ["interpolate", "recompute"])
def test_positions_on_the_fly_are_those_of_a_model_of_that_size(pos_resize: str) -> None:
    dynamic = small(dynamic_img_size=True, pos_resize=pos_resize)
    fixed = small(img_size=(48, 80), pos_resize=pos_resize)
    fixed.load_state_dict(fixed.fit_state(dynamic.state_dict(), dynamic.config))
    torch.testing.assert_close(dynamic(images(48, 80)), fixed(images(48, 80)))


def test_interpolated_positions_can_be_computed_anew() -> None:
    made, model = small(), small(img_size=96)
    model.load_state_dict(model.fit_state(made.state_dict(), made.config))
    assert not torch.equal(model.pos_embed, sinusoid(37, 24))
    model.reset_positions()
    assert torch.equal(model.pos_embed, sinusoid(37, 24))
    assert not model.pos_embed.requires_grad


# Every option does something, and impossible ones are refused


FLIPS: dict[str, tuple[Any, str]] = {
    "img_size": (80, "parameters"),
    "in_chans": (1, "parameters"),
    "num_classes": (5, "parameters"),
    "tokens_type": ("transformer", "parameters"),
    "token_dim": (32, "parameters"),
    "embed_dim": (48, "parameters"),
    "depth": (2, "parameters"),
    "num_heads": (4, "eval"),
    "mlp_ratio": (2.0, "parameters"),
    "qkv_bias": (True, "parameters"),
    "norm_eps": (1e-2, "eval"),
    "token_head": (True, "parameters"),
    "token_drop_rate": (0.5, "training"),
    "drop_rate": (0.5, "training"),
    "drop_path_rate": (0.5, "training"),
    "pos_resize": ("recompute", "large"),
    "dynamic_img_size": (False, "large"),
}


def observe(config: T2TViTConfig) -> dict[str, Any]:
    torch.manual_seed(0)
    model = T2TViT(config).eval()
    seen: dict[str, Any] = {"parameters": {name: tuple(p.shape) for name, p in model.named_parameters()}}
    x = images(*config.image_hw, channels=config.in_chans)
    seen["eval"] = model(x).tolist()
    try:
        seen["large"] = model(images(96, channels=config.in_chans)).tolist()
    except ConfigError:
        seen["large"] = None
    torch.manual_seed(0)
    seen["training"] = model.train()(x).tolist()
    return seen


def test_every_option_has_a_flip() -> None:
    assert set(FLIPS) == {field.name for field in dataclasses.fields(T2TViTConfig)}


@pytest.mark.parametrize("field", FLIPS)
def test_option_changes_the_model(field: str) -> None:
    value, place = FLIPS[field]
    base = {**SMALL, "dynamic_img_size": True}
    before, after = observe(T2TViTConfig(**base)), observe(T2TViTConfig(**{**base, field: value}))
    order = ["parameters", "eval", "training" if place == "training" else "large"]
    assert before[place] != after[place]
    assert all(before[earlier] == after[earlier] for earlier in order[: order.index(place)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 230}, "img_size=230 is not a multiple of patch_size=16; use 224 or 240"),
        ({"img_size": 8}, "img_size=8 is not a multiple of patch_size=16; use 16 or 32"),
        ({"tokens_type": "convolution"}, "tokens_type='convolution'; expected 'performer' or 'transformer'"),
        ({"pos_resize": "learned"}, "pos_resize='learned'; expected 'interpolate' or 'recompute'"),
        ({"embed_dim": 25}, "embed_dim=25 is not a multiple of num_heads=3"),
        ({"embed_dim": 27}, "embed_dim=27 is odd"),
        ({"token_dim": 15}, "token_dim=15 is odd"),
        ({"token_drop_rate": 1.0}, "token_drop_rate=1.0"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_impossible_config_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        T2TViTConfig(**{**SMALL, **options})


def test_wrong_input_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"80x96 pixels; this model takes 64x64.*img_size"):
        small()(images(80, 96))
    with pytest.raises(ConfigError, match="img_size=72 is not a multiple of patch_size=16; use 64 or 80"):
        small(dynamic_img_size=True)(images(72))


# Compilers


# without autocast, and of the Performer: tests/test_contract.py


def test_graph_has_no_break_under_autocast(tokens_type: str) -> None:
    model, x = small(tokens_type=tokens_type), images()
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, model(x))


def test_exported_program_gives_the_same_logits_for_any_batch() -> None:
    model = small(tokens_type="transformer")
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(images(batch=5)), model(images(batch=5)))
