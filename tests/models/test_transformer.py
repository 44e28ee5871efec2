"""The shared transformer block, alone: attention, MLP, layer scale, stochastic depth."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deit_models.models.transformer import Attention, Block, attention, drop_path_rates


def test_attention_is_torchs_multi_head_attention() -> None:
    torch.manual_seed(0)
    attention, theirs = (
        Attention(24, 3, attn_dim=24, qkv_bias=True, drop_rate=0.0),
        nn.MultiheadAttention(24, 3, batch_first=True),
    )
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.qkv.weight)
        theirs.in_proj_bias.copy_(attention.qkv.bias)
        theirs.out_proj.weight.copy_(attention.proj.weight)
        theirs.out_proj.bias.copy_(attention.proj.bias)
    x = torch.randn(2, 5, 24)
    mixed, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(attention(x), mixed)
    torch.testing.assert_close(attention.weights(x), weights)


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_trained_in_bfloat16_is_that_of_float32(tokens: int, scale: float | None) -> None:
    torch.manual_seed(0)
    exact = torch.randn(3, 2, 3, tokens, 16).requires_grad_()
    rounded = exact.detach().bfloat16().requires_grad_()
    expected, mixed = attention(*exact, scale=scale), attention(*rounded, scale=scale)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, atol=0.03, rtol=0)
    out = torch.randn_like(expected)
    expected.backward(out)
    mixed.backward(out.bfloat16())
    assert exact.grad is not None
    assert rounded.grad is not None
    assert (rounded.grad - exact.grad).norm() < 0.02 * exact.grad.norm()


def test_scores_are_stored_only_where_that_is_faster_and_small() -> None:
    def stored(tokens: int, dtype: torch.dtype) -> bool:
        shapes: list[torch.Size] = []

        def note(kept: torch.Tensor) -> torch.Tensor:
            shapes.append(kept.shape)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            attention(*torch.randn(3, 1, 2, tokens, 8, dtype=dtype, requires_grad=True))
        return (1, 2, tokens, tokens) in shapes

    assert stored(20, torch.bfloat16)
    assert not stored(20, torch.float32)
    assert not stored(300, torch.bfloat16)


def test_heads_may_be_wider_together_than_a_token() -> None:
    block = Block(12, 2, mlp_hidden=20, attn_dim=32, qkv_bias=False, norm_eps=1e-6)
    assert block.attn.qkv.weight.shape == (96, 12)
    assert block.attn.qkv.bias is None
    assert [part.shape for part in block.attn.heads(torch.randn(2, 5, 12))] == [(2, 2, 5, 16)] * 3
    assert block(torch.randn(2, 5, 12)).shape == (2, 5, 12)


def test_block_adds_attention_and_mlp_behind_their_norms() -> None:
    torch.manual_seed(0)
    block, x = Block(24, 3, mlp_hidden=96, qkv_bias=True, norm_eps=1e-6), torch.randn(2, 5, 24)
    middle = x + block.attn(F.layer_norm(x, (24,), eps=1e-6))
    hidden = F.gelu(block.mlp.fc1(F.layer_norm(middle, (24,), eps=1e-6)))
    torch.testing.assert_close(block(x), middle + block.mlp.fc2(hidden))


def test_layer_scale_multiplies_both_branches_channel_by_channel() -> None:
    torch.manual_seed(0)
    block = Block(24, 3, mlp_hidden=96, qkv_bias=True, norm_eps=1e-6, layer_scale=0.5)
    torch.nn.init.normal_(block.gamma_1)
    torch.nn.init.normal_(block.gamma_2)
    x = torch.randn(2, 5, 24)
    after_attention = x + block.gamma_1 * block.attn(block.norm1(x))
    expected = after_attention + block.gamma_2 * block.mlp(block.norm2(after_attention))
    torch.testing.assert_close(block(x), expected)


def test_dropped_branches_leave_the_input() -> None:
    torch.manual_seed(0)
    block, x = Block(8, 2, mlp_hidden=8, qkv_bias=True, norm_eps=1e-6, drop_path_rate=0.999), torch.randn(64, 3, 8)
    out = block(x)
    assert (out == x).all(dim=2).all(dim=1).sum() > 60
    assert not torch.equal(block.eval()(x), x)


def test_stochastic_depth_of_the_blocks() -> None:
    assert drop_path_rates(0.2, 5) == [0.0, 0.05, 0.1, 0.15000000000000002, 0.2]
    assert drop_path_rates(0.2, 1) == [0.0]
