"""Every fold is exact: the prepared network gives the model's logits, for every family and shape."""

import copy
import re

import pytest
import torch
from small_models import TINY, build, normalised, pixels
from torch import nn

from deit_models import ConfigError
from deit_models.deploy.network import PrefixBlock, prepare
from deit_models.models.deit import DeiT, DeiTConfig
from deit_models.models.transformer import Block


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
