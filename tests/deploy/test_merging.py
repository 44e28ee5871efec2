"""Token merging: what a merge keeps, when it is exact, that every backend gives it, and where it is refused."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TINY, build, normalised, pixels

import deit_models
from deit_models import AgreementError, ConfigError
from deit_models.deploy import optimize as optimizing
from deit_models.deploy import runtimes as backends
from deit_models.deploy.network import MergingBlocks, decreasing, match_tokens, merge_tokens, merging_plan, prepare
from deit_models.deploy.runtimes import open_exported, read_metadata
from deit_models.deploy.timing import quiet
from deit_models.models.deit import DeiT, DeiTConfig
from deit_models.models.layers import ImageClassifier

MERGEABLE = ["deit", "distilled", "deit3", "one block", "t2t_vit"]
FIXED = ["token head", "levit", "vit_resnas"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def needs(*names: str) -> None:
    for name in names:
        with quiet():
            pytest.importorskip(name, reason="needs the extra [export]")


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
        blocks = prepare(model, fold=fold, token_merging=plan).network.blocks
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
    blocks = prepare(model, fold=False, token_merging=(3, 0)).network.blocks
    unsized, _ = blocks.merging[1](blocks.merging[0](tokens, None)[0], None)
    assert (unsized[:, :1] - model.blocks(tokens)[:, :1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TINY)
@torch.inference_mode()
def test_merging_nothing_is_the_network_as_it_was(kind: str) -> None:
    model = build(kind)
    x = normalised(model, pixels())
    for nothing in (0, (0, 0, 0)):
        prepared = prepare(model, token_merging=nothing)
        assert not any(isinstance(module, MergingBlocks) for module in prepared.modules())
        assert torch.equal(prepared(x), prepare(model)(x))


@pytest.mark.parametrize("kind", MERGEABLE)
@torch.inference_mode()
def test_folds_and_merging_go_together(kind: str) -> None:
    model = build(kind)
    x = normalised(model, pixels())
    plain = prepare(model, fold=False, token_merging=3)(x)
    torch.testing.assert_close(prepare(model, token_merging=3)(x), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prepare(model, pixels=True, token_merging=3)(pixels()), plain, atol=1e-4, rtol=1e-4)
    if kind != "one block":  # whose one merge comes after all attention
        assert (plain - prepare(model)(x)).abs().max() > 2e-4
    assert prepare(model, dtype=torch.bfloat16, token_merging=3)(x).dtype == torch.float32


@torch.inference_mode()
def test_at_most_half_of_the_tokens_go() -> None:
    model = build("distilled")
    tokens = draw(2, 2 + 16, 24)
    assert prepare(model, fold=False, token_merging=100).network.blocks(tokens).shape == (2, 2 + 4, 24)
    lonely = DeiT(DeiTConfig(img_size=16, embed_dim=16, depth=2, num_heads=2)).eval()
    x = draw(1, 3, 16, 16)
    torch.testing.assert_close(prepare(lonely, token_merging=8)(x), lonely(x), atol=1e-5, rtol=1e-5)


@given(r=st.integers(0, 20), depth=st.integers(1, 24))
def test_a_decreasing_plan_falls_from_twice_to_nothing_and_merges_as_many(r: int, depth: int) -> None:
    plan = decreasing(r, depth)
    assert (len(plan), sum(plan)) == (depth, r * depth)
    if depth > 1:
        assert (plan[0], plan[-1]) == (2 * r, 0)
    assert all(after <= before + 1 for before, after in pairwise(plan))


# Backends


def trained() -> tuple[ImageClassifier, torch.Tensor]:
    model = deit_models.from_pretrained("deit_micro_patch4_32")
    return model, draw(5, 3, 32, 32)


@pytest.mark.parametrize("name", ["eager", "openvino", "onnxruntime", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_every_backend_gives_the_merged_networks_logits(name: str, tmp_path: Path) -> None:
    if name in ("openvino", "onnxruntime"):
        needs(name)
    model = build("distilled")
    fast = deit_models.optimize(
        model, sample=2, backend=name, precision="float32", token_merging=3, min_agreement=0, cache_dir=tmp_path
    )
    assert (fast.choice.backend, fast.choice.token_merging) == (name, (3, 3))
    assert fast.choice.agreement.max_abs_diff <= 1e-4
    merged, x = prepare(model, fold=False, token_merging=3), normalised(model, pixels(5))
    for count in (1, 2, 5):
        torch.testing.assert_close(fast(x[:count]), merged(x[:count]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("suffix", "libraries"), [("onnx", ("onnxscript", "onnxruntime")), ("xml", ("openvino",)), ("pt2", ())]
)
@torch.inference_mode()
def test_files_merge_too_and_say_so(suffix: str, libraries: tuple[str, ...], tmp_path: Path) -> None:
    needs(*libraries)
    model, path = build("distilled"), tmp_path / f"model.{suffix}"
    kind = {"onnx": "onnx", "xml": "openvino", "pt2": "torch-export"}[suffix]
    deit_models.export(model, path, format=kind, token_merging=(3, 1), preprocessing=True)
    expected = prepare(model, fold=False, token_merging=(3, 1))(normalised(model, pixels(5)))
    torch.testing.assert_close(open_exported(path)(pixels(5)), expected, atol=1e-4, rtol=0)
    assert read_metadata(path)["token_merging"] == [3, 1]


# optimize


def test_the_choice_carries_the_plan_and_the_agreement_with_the_model(tmp_path: Path) -> None:
    model, x = trained()
    options = {"sample": x, "backend": "eager", "precision": "float32", "cache_dir": tmp_path}
    choice = deit_models.optimize(model, token_merging=decreasing(1, 6), min_agreement=0, **options).choice
    assert choice.token_merging == decreasing(1, 6)
    difference = (prepare(model, token_merging=decreasing(1, 6))(x) - prepare(model)(x)).abs().max()
    assert choice.merging_agreement.max_abs_diff == pytest.approx(float(difference), abs=1e-4)
    assert choice.merging_agreement.images == 5
    plain = deit_models.optimize(model, **options).choice
    assert (plain.token_merging, plain.merging_agreement) == ((), None)


def test_too_little_agreement_is_refused_with_the_measured_share(tmp_path: Path) -> None:
    model, _ = trained()
    x = optimizing._random_images(model, 40, pixels=False)
    merged, plain = (prepare(model, token_merging=r)(x).argmax(1) for r in (8, 0))
    share = float((merged == plain).double().mean())
    assert share < 1, "the test needs a model that answers otherwise when merged"
    options = {"sample": x, "backend": "eager", "token_merging": 8, "cache_dir": tmp_path}
    message = (
        rf"token_merging=8,8,8,8,8,8: {100 * share:.1f}% agree with the unmerged model on 40 images, min_agreement=1 is"
    )
    with pytest.raises(AgreementError, match=message):
        deit_models.optimize(model, min_agreement=1, **options)
    assert deit_models.optimize(model, min_agreement=share, precision="float32", **options).choice.backend == "eager"


def test_a_kept_choice_is_kept_for_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizing, "_ROUND_S", 0.001)
    monkeypatch.setattr(backends, "has_bf16", lambda _: True)  # or there would be one way only, and nothing to keep
    model = build("deit")
    for merging in (0, 2, (2, 2), (4, 0)):
        deit_models.optimize(
            model, sample=1, backend="eager", min_agreement=0, token_merging=merging, cache_dir=tmp_path
        )
    assert len(list(tmp_path.rglob("*.json"))) == 3


# Refusals


@pytest.mark.parametrize("kind", FIXED)
def test_models_that_need_every_patch_are_refused(kind: str, tmp_path: Path) -> None:
    expected = "has a head that reads every patch" if kind == "token head" else "needs its tokens on a grid"
    message = rf"token_merging=8: \w+ {expected}; expected DeiT, DeiT III or T2T-ViT"
    with pytest.raises(ConfigError, match=message):
        prepare(build(kind), token_merging=8)
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
