"""Parts that all families share: stochastic depth, grids, chosen layers, drop rates, position resizing."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from deit_models import ConfigError, create_model, registry
from deit_models.models.features import chosen_layers
from deit_models.models.layers import DropPath, init_vit_weights, patch_grid, resize_pos_embed


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = DropPath(0.3)(torch.ones(20_000, 2, 3))
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    kept = out[:, 0, 0] > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 0.7))
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.013)  # four standard deviations


@pytest.mark.parametrize("drop_path", [DropPath(0.0), DropPath(0.9).eval()], ids=["rate 0", "eval"])
def test_drop_path_is_otherwise_the_identity(drop_path: DropPath) -> None:
    x = torch.randn(8, 4)
    assert drop_path(x) is x


# Position resizing


def test_resize_at_equal_size_changes_nothing() -> None:
    positions = torch.randn(1, 1 + 16, 6)
    assert torch.equal(resize_pos_embed(positions, num_prefix=1, grid=(4, 4)), positions)


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("grid", [(8, 8), (2, 2), (3, 7)])
def test_resize_leaves_prefix_and_argument_alone(num_prefix: int, grid: tuple[int, int]) -> None:
    positions = torch.randn(1, num_prefix + 16, 6)
    before = positions.clone()
    resized = resize_pos_embed(positions, num_prefix=num_prefix, grid=grid)
    assert resized.shape == (1, num_prefix + grid[0] * grid[1], 6)
    assert torch.equal(resized[:, :num_prefix], positions[:, :num_prefix])
    assert torch.equal(positions, before)


def test_resize_keeps_rows_and_columns_apart() -> None:
    # positions that only know their row must not vary along the columns of any other grid
    rows = torch.arange(3.0).repeat_interleave(5).reshape(1, 15, 1)
    resized = resize_pos_embed(rows, num_prefix=0, grid=(6, 4), source_grid=(3, 5)).reshape(6, 4)
    torch.testing.assert_close(resized, resized[:, :1].expand(6, 4))
    assert (resized[1:, 0] > resized[:-1, 0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resize_of_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    positions = torch.randn(1, 1 + 16, 6).to(dtype)
    resized = resize_pos_embed(positions, num_prefix=1, grid=(6, 6))
    assert resized.dtype == dtype
    assert torch.equal(resized, resize_pos_embed(positions.float(), num_prefix=1, grid=(6, 6)).to(dtype))


def test_resize_of_a_count_that_fills_no_grid_is_refused() -> None:
    positions = torch.randn(1, 1 + 15, 6)
    with pytest.raises(ConfigError, match="15 patch positions do not fill a grid of 4x4"):
        resize_pos_embed(positions, num_prefix=1, grid=(8, 8))
    with pytest.raises(ConfigError, match="15 patch positions do not fill a grid of 2x7"):
        resize_pos_embed(positions, num_prefix=1, grid=(8, 8), source_grid=(2, 7))


# Grids, layers, weights


def test_grid_counts_patches_along_height_and_width() -> None:
    assert patch_grid((32, 48), 16) == (2, 3)
    with pytest.raises(ConfigError, match=r"img_size=40 is not a multiple of patch_size=16; use 32 or 48"):
        patch_grid((32, 40), 16)
    with pytest.raises(ConfigError, match=r"img_size=8 is not a multiple of size_step=16; use 16 or 32"):
        patch_grid((8, 16), 16, name="size_step")
    with pytest.raises(ConfigError, match="neither a whole number nor"):
        patch_grid((32.0, 32), 16)  # type: ignore[arg-type]


def test_layers_are_chosen_by_number_or_index() -> None:
    assert chosen_layers(2, 5, "blocks") == [3, 4]
    assert chosen_layers([-1, 0], 5, "blocks") == [4, 0]
    for layers in (6, 0, [5], [-6], []):
        with pytest.raises(ConfigError, match="this model has blocks 0 to 4"):
            chosen_layers(layers, 5, "blocks")


def test_fresh_linear_layers_have_small_weights_and_no_bias() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(200, 200), nn.LayerNorm(200), nn.Conv2d(3, 4, 3))
    before = network[2].weight.clone()
    init_vit_weights(network)
    assert network[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network[0].bias.abs().max() == 0
    assert torch.equal(network[2].weight, before)


@pytest.mark.parametrize(
    "name", ["deit_micro_patch4_32", "levit_micro_cifar10", "t2t_vit_micro_cifar10", "vit_res_micro_patch4_32"]
)
def test_drop_rates_that_change_are_those_of_a_model_built_with_them(name: str) -> None:
    rates = {"drop_rate": 0.25, "drop_path_rate": 0.5}
    if name.startswith("deit"):
        rates["patch_drop_rate"] = 0.125
    built, changed = create_model(name, **rates), create_model(name)
    generator = torch.get_rng_state()
    changed.set_drop_rates(**rates)
    assert torch.equal(torch.get_rng_state(), generator)
    assert changed.config == built.config
    for module, wanted in zip(changed.modules(), built.modules(), strict=True):
        assert module.extra_repr() == wanted.extra_repr()
    with pytest.raises(ConfigError, match="unknown option 'drop'"):
        changed.set_drop_rates(drop=0.1)


def test_drop_rates_of_exchanged_parts_stay() -> None:
    model = create_model("levit_micro_cifar10")
    model.head, model.blocks[0].drop_path = nn.Sequential(nn.Dropout(0.9), nn.Linear(256, 10)), nn.Identity()
    model.set_drop_rates(drop_rate=0.25, drop_path_rate=0.5)
    assert (model.head[0].p, model.head_dist.drop.p, model.blocks[1].drop_path.rate) == (0.9, 0.25, 0.5)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "levit_128s", "t2t_vit_7", "vit_resnas_tiny"])
def test_config_takes_attributes_of_others_and_keeps_its_own(name: str) -> None:
    config = registry.model_spec(name).config
    mine = dataclasses.replace(config)
    mine.use_cache = False
    assert mine == config
    assert not hasattr(config, "use_cache")
    assert mine.use_cache is False
    with pytest.raises(AttributeError, match="num_classes"):
        mine.num_classes = 7
    with pytest.raises(AttributeError):
        mine.image_hw = (1, 1)
    assert copy.deepcopy(mine) == config
