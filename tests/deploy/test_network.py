"""Folds give the model's logits, for every family and shape; merges keep sums and sizes; refusals."""

import copy
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TINY, build, normalised, pixels
from torch import nn

import deit_models
from deit_models import ConfigError
from deit_models.deploy.network import (
    MergingBlocks,
    PrefixBlock,
    decreasing,
    match_tokens,
    merge_tokens,
    merged_patches,
    merging_plan,
    prepare,
    random_images,
)
from deit_models.models.deit import DeiT, DeiTConfig
from deit_models.models.transformer import Block

MERGEABLE = ["deit", "distilled", "deit3", "one block", "t2t_vit"]
FIXED = ["token head", "levit", "vit_resnas", "cait", "resmlp"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("takes_pixels", [False, True])
@pytest.mark.parametrize("kind", TINY)
@torch.inference_mode()
def test_prepared_network_gives_the_models_logits(kind: str, takes_pixels: bool) -> None:
    model = build(kind)
    x = normalised(model, pixels())
    prepared = prepare(model, pixels=takes_pixels)
    torch.testing.assert_close(prepared(pixels() if takes_pixels else x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", TINY)
@torch.inference_mode()
def test_model_is_left_as_it_is(kind: str) -> None:
    model = build(kind).train()
    before, logits = copy.deepcopy(model.state_dict()), copy.deepcopy(model).eval()(normalised(model, pixels()))
    prepared = prepare(model, pixels=True, dtype=torch.bfloat16)
    assert not any(module.training for module in prepared.modules())
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.eval()(normalised(model, pixels())), logits)


def test_unchanged_tensors_are_shared() -> None:
    model = build("deit")
    prepared = prepare(model)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    folded = re.compile(r"qkv|query|key_value|fc1")  # which take in the LayerNorm before them
    shared = {parameter.data_ptr() for name, parameter in prepared.named_parameters() if not folded.search(name)}
    assert shared
    assert shared <= own
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_last_block_computes_the_prefix_alone_unless_a_head_reads_the_patches() -> None:
    def last(kind: str) -> nn.Module:
        return prepare(build(kind)).network.blocks[-1]

    assert isinstance(last("distilled"), PrefixBlock)
    assert last("distilled")(torch.zeros(1, 18, 24)).shape == (1, 2, 24)
    assert not isinstance(last("token head"), PrefixBlock)


@pytest.mark.parametrize("kind", ["deit", "vit_resnas"])
def test_norms_in_blocks_lose_scale_and_shift(kind: str) -> None:
    blocks = [module for module in prepare(build(kind)).modules() if isinstance(module, (Block, PrefixBlock))]
    assert blocks
    assert all(norm.weight is None and norm.bias is None for block in blocks for norm in (block.norm1, block.norm2))


@torch.inference_mode()
def test_half_precision_gives_float32_logits_close_to_the_models() -> None:
    model = build("distilled")
    logits = prepare(model, dtype=torch.bfloat16)(normalised(model, pixels()))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(normalised(model, pixels())), atol=0.5, rtol=0.1)


def test_half_precision_model_is_computed_in_float32() -> None:
    model = build("deit").to(torch.bfloat16)
    prepared = prepare(model)
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_pixels_of_a_model_built_by_hand_are_refused() -> None:
    model = DeiT(DeiTConfig(img_size=16, embed_dim=16, depth=1, num_heads=2))
    with pytest.raises(ConfigError, match="its normalisation is unknown"):
        prepare(model, pixels=True)
    assert prepare(model)(torch.zeros(1, 3, 16, 16)).shape == (1, 1000)


@pytest.mark.parametrize("kind", ["deit", "levit"])
def test_random_images_are_the_same_ones_as_pixels_and_normalised(kind: str) -> None:
    model = build(kind)
    levels = random_images(model, 3, pixels=True)
    assert (levels.dtype, levels.shape) == (torch.uint8, (3, 3, 64, 64))
    assert len(levels.unique(dim=0)) == 3
    assert torch.equal(levels, random_images(model, 3, pixels=True))
    torch.testing.assert_close(random_images(model, 3, pixels=False), normalised(model, levels))


def test_random_images_of_a_model_built_by_hand_have_its_channels() -> None:
    model = DeiT(DeiTConfig(img_size=16, in_chans=1, embed_dim=16, depth=1, num_heads=2))
    images = random_images(model, 2, pixels=False)
    assert (images.dtype, images.shape) == (torch.float32, (2, 1, 16, 16))
    assert -2 <= images.min() < images.max() <= 2


# The merge


@given(
    batch=st.integers(1, 3), tokens=st.integers(2, 33), prefix=st.integers(0, 2), share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_a_merge_keeps_the_weighted_sum_the_total_size_and_the_prefix(
    batch: int, tokens: int, prefix: int, share: float, seed: int
) -> None:
    r, count = round(share * (tokens // 2)), prefix + tokens
    x, sizes = draw(batch, count, 5, seed=seed), 1 + draw(batch, count, 1, seed=seed + 1).abs().round()
    sizes[:, :prefix] = 1
    pairs = match_tokens(draw(batch, count, 4, seed=seed + 2), r, num_prefix=prefix)
    merged, merged_sizes = merge_tokens(x, sizes, pairs)
    assert merged.shape == (batch, count - r, 5)
    assert merged_sizes.shape == (batch, count - r, 1)
    assert torch.equal(merged_sizes.sum(1), sizes.sum(1))
    torch.testing.assert_close((merged_sizes * merged).sum(1), (sizes * x).sum(1), atol=1e-4, rtol=1e-4)
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    assert torch.equal(merged_sizes[:, :prefix], sizes[:, :prefix])


def test_the_most_alike_are_merged_each_into_the_one_most_like_it() -> None:
    # angles of the keys; first tokens at 0, 2, 4, second tokens at 1, 3, 5, behind one prefix token
    angles = torch.tensor([9.0, 0.0, 1.0, 2.0, 2.01, 0.5, 0.52])
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    lengths = torch.tensor([1.0, 5.0, 0.1, 1.0, 3.0, 7.0, 2.0])[:, None]
    pairs = match_tokens(keys * lengths, 2, num_prefix=1)
    assert pairs.kept.tolist() == [[0]]
    assert sorted(pairs.gone[0].tolist()) == [1, 2]
    x = torch.arange(7.0)[None, :, None]
    merged, sizes = merge_tokens(x, torch.ones(1, 7, 1), pairs)
    assert merged.flatten().tolist() == [0, 1, 2, 3.5, 5.5]
    assert sizes.flatten().tolist() == [1, 1, 1, 2, 2]


def test_several_tokens_may_go_into_one() -> None:
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]]])
    merged, sizes = merge_tokens(
        torch.tensor([[[3.0], [6.0], [9.0], [1.0]]]), torch.ones(1, 4, 1), match_tokens(keys, 2)
    )
    assert merged.flatten().tolist() == pytest.approx([6.0, 1.0])
    assert sizes.flatten().tolist() == [3, 1]


def test_tokens_that_stay_keep_their_order() -> None:
    keys = draw(2, 20, 4)
    pairs = match_tokens(keys, 3)
    assert torch.equal(pairs.kept, pairs.kept.sort(dim=1).values)
    assert all({*pairs.kept[i].tolist(), *pairs.gone[i].tolist()} == set(range(10)) for i in range(2))


def test_half_precision_is_compared_in_float32_and_keeps_its_type() -> None:
    x, sizes = draw(1, 9, 4).bfloat16(), torch.ones(1, 9, 1)
    pairs = match_tokens(x, 3, num_prefix=1)
    merged, merged_sizes = merge_tokens(x, sizes, pairs)
    assert (pairs.into.dtype, merged.dtype, merged_sizes.dtype) == (torch.float32, torch.bfloat16, torch.float32)


# Whole networks


def repeated(model: DeiT, times: int, count: int = 2) -> torch.Tensor:
    """Tokens of which every patch's stands there several times in a row."""
    width, prefix = model.config.embed_dim, model.config.num_prefix_tokens
    patches = draw(count, 6, width, seed=1).repeat_interleave(times, dim=1)
    return torch.cat([draw(count, prefix, width, seed=2), patches], dim=1)


@pytest.mark.parametrize("kind", ["deit", "distilled", "deit3"])
@pytest.mark.parametrize(("times", "plan"), [(2, (6, 0, 0)), (2, (2, 0, 0)), (4, (12, 6, 0)), (4, (12, 6, 3))])
@torch.inference_mode()
def test_merging_tokens_that_are_the_same_changes_nothing(kind: str, times: int, plan: tuple[int, ...]) -> None:
    model = deit_models.create_model(TINY[kind][0], embed_dim=24, depth=3, num_heads=3, img_size=64).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.normal_(0.1, 0.2, generator=torch.Generator().manual_seed(0))
    tokens, prefix = repeated(model, times), model.config.num_prefix_tokens
    expected = model.blocks(tokens)
    for fold in (False, True):
        blocks = prepare(model, fold=fold, plan=plan).network.blocks
        assert isinstance(blocks, MergingBlocks)
        found = blocks(tokens)
        assert found.shape[1] == (prefix if fold else tokens.shape[1] - sum(plan))
        torch.testing.assert_close(found[:, :prefix], expected[:, :prefix], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_without_the_sizes_it_would_change_something() -> None:
    # breaks the exactness above on purpose: proportional attention is what makes it hold
    model = deit_models.create_model(TINY["deit"][0], embed_dim=24, depth=2, num_heads=3, img_size=64).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.normal_(0.1, 0.2, generator=torch.Generator().manual_seed(0))
    tokens = repeated(model, 2)
    blocks = prepare(model, fold=False, plan=(3, 0)).network.blocks
    unsized, _ = blocks[1](blocks[0](tokens, None)[0], None)
    assert (unsized[:, :1] - model.blocks(tokens)[:, :1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TINY)
@torch.inference_mode()
def test_merging_nothing_is_the_network_as_it_was(kind: str) -> None:
    model = build(kind)
    x = normalised(model, pixels())
    for nothing in (0, (0, 0, 0)):
        assert merging_plan(model, nothing) == ()
        prepared = prepare(model, plan=merging_plan(model, nothing))
        assert not any(isinstance(module, MergingBlocks) for module in prepared.modules())
        assert torch.equal(prepared(x), prepare(model)(x))


@pytest.mark.parametrize("kind", MERGEABLE)
@torch.inference_mode()
def test_folds_and_merging_go_together(kind: str) -> None:
    model = build(kind)
    x, plan = normalised(model, pixels()), merging_plan(model, 3)
    plain = prepare(model, fold=False, plan=plan)(x)
    torch.testing.assert_close(prepare(model, plan=plan)(x), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prepare(model, pixels=True, plan=plan)(pixels()), plain, atol=1e-4, rtol=1e-4)
    if kind != "one block":  # whose one merge comes after all attention
        assert (plain - prepare(model)(x)).abs().max() > 2e-4
    assert prepare(model, dtype=torch.bfloat16, plan=plan)(x).dtype == torch.float32


@torch.inference_mode()
def test_at_most_half_of_the_tokens_go() -> None:
    model = build("distilled")
    tokens = draw(2, 2 + 16, 24)
    assert prepare(model, fold=False, plan=(100, 100)).network.blocks(tokens).shape == (2, 2 + 4, 24)
    lonely = DeiT(DeiTConfig(img_size=16, embed_dim=16, depth=2, num_heads=2)).eval()
    x = draw(1, 3, 16, 16)
    torch.testing.assert_close(prepare(lonely, plan=merging_plan(lonely, 8))(x), lonely(x), atol=1e-5, rtol=1e-5)


@given(r=st.integers(0, 20), depth=st.integers(1, 24))
def test_a_decreasing_plan_falls_from_twice_to_nothing_and_merges_as_many(r: int, depth: int) -> None:
    plan = decreasing(r, depth)
    assert (len(plan), sum(plan)) == (depth, r * depth)
    if depth > 1:
        assert (plan[0], plan[-1]) == (2 * r, 0)
    assert all(after <= before + 1 for before, after in pairwise(plan))


# Refusals


@pytest.mark.parametrize("kind", FIXED)
def test_models_that_need_every_patch_are_refused(kind: str, tmp_path: Path) -> None:
    reads = kind in ("token head", "cait")
    expected = "reads every patch after its blocks" if reads else "needs its tokens on a grid"
    message = rf"token_merging=8: \w+ {expected}; expected DeiT, DeiT III or T2T-ViT"
    with pytest.raises(ConfigError, match=message):
        merging_plan(build(kind), 8)
    with pytest.raises(ConfigError, match=message):
        deit_models.optimize(build(kind), token_merging=8, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=message):
        deit_models.export(build(kind), tmp_path / "model.onnx", token_merging=8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (-1, "token_merging=-1; expected a whole number from 0, or one for each block"),
        ((2, 1.5), r"token_merging=\(2, 1\.5\); expected a whole number"),
        (True, "token_merging=True; expected a whole number"),
        ((1, 2, 3), "token_merging has 3 numbers; this model has 2 blocks, one for each"),
    ],
)
def test_plans_that_do_not_fit_are_refused(wrong: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merging_plan(build("deit"), wrong)


@pytest.mark.parametrize("kind", MERGEABLE)
@torch.inference_mode()
def test_patches_are_counted_in_the_token_that_they_are_part_of(kind: str) -> None:
    model = deit_models.create_model(TINY[kind][0], embed_dim=24, depth=4, num_heads=3, img_size=(64, 96)).eval()
    x, plan, prefix = draw(2, 3, 64, 96), (4, 3, 0, 2), model.num_prefix_tokens
    groups = merged_patches(model, x, plan)
    assert groups.shape == (2, 4, 6)
    network = prepare(model, fold=False, plan=plan).network
    tokens, sizes = network.forward_tokens(x), None
    for block in [*network.blocks][:-1]:
        tokens, sizes = block(tokens, sizes)
    for own, size in zip(groups, sizes, strict=True):
        assert own.flatten().bincount().tolist() == size[prefix:, 0].tolist()
    assert not torch.equal(groups[0], groups[1])


def test_patches_that_are_alike_are_part_of_one_token() -> None:
    model = deit_models.create_model("deit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=3, img_size=64).eval()
    with torch.no_grad():
        model.pos_embed.zero_()
    x = draw(1, 3, 64, 64)
    x[..., :16, 16:32] = x[..., :16, :16]
    groups = merged_patches(model, x, 1)[0]
    assert groups[0, 0] == groups[0, 1]
    assert len(groups.unique()) == 15
    assert merged_patches(model, x, 0).flatten().tolist() == [*range(16)]
    with pytest.raises(ConfigError, match="needs its tokens on a grid"):
        merged_patches(build("levit"), x, 1)
