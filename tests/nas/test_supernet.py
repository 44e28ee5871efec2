"""The super-network: masked networks are the extracted ones, in values and gradients; sampling; sorted channels."""

from collections import Counter

import pytest
import torch
from nas.toy import largest_network, noise, supernet, toy_space
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from deit_models import ConfigError
from deit_models.models.vit_resnas import ViTResNAS
from deit_models.nas.settings import Sampling
from deit_models.nas.space import SPACES, SearchSpace
from deit_models.nas.supernet import SuperNetwork, _normed, extract, reorder_channels
from deit_models.scoring.evaluation import Heads


@pytest.fixture(params=["toy", "distilled", "small32"])
def space(request: pytest.FixtureRequest) -> SearchSpace:
    if request.param == "small32":
        return SPACES["small32"]
    return toy_space(distilled=request.param == "distilled")


def images_for(space: SearchSpace, count: int) -> Tensor:
    size = space.config_of(space.largest()).image_hw
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_fifty_extracted_networks_equal_the_masked_super_network(space: SearchSpace) -> None:
    whole, x = supernet(space), images_for(space, 2)
    torch.manual_seed(0)
    keys = set()
    for candidate in whole.draw(50):
        alone = extract(whole.net, space, candidate)
        masked = whole.forward_masked(x, [candidate])
        torch.testing.assert_close(alone.forward_heads(x).cls, masked.cls, atol=1e-4, rtol=1e-4)
        if masked.dist is not None:
            torch.testing.assert_close(alone.forward_heads(x).dist, masked.dist, atol=1e-4, rtol=1e-4)
        keys.add(candidate.key())
    assert len(keys) > 40
    assert masked.cls.abs().max() > 0.1


@torch.no_grad()
def test_images_of_a_batch_are_dealt_to_the_candidates_in_turn(space: SearchSpace) -> None:
    whole, x = supernet(space), images_for(space, 7)
    torch.manual_seed(1)
    candidates = whole.draw(3)
    together = whole.forward_masked(x, candidates).cls
    for number, candidate in enumerate(candidates):
        alone = extract(whole.net, space, candidate).forward_heads(x[number::3]).cls
        torch.testing.assert_close(together[number::3], alone, atol=1e-4, rtol=1e-4)
    wrong = extract(whole.net, space, candidates[0]).forward_heads(x[1::3]).cls
    assert not torch.allclose(together[1::3], wrong, atol=1e-2)


def gradients(whole: SuperNetwork) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
    whole.zero_grad()
    return found


def test_gradients_of_one_step_are_the_sum_of_the_separate_steps() -> None:
    whole, x, labels = supernet(toy_space()), noise(6), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(2)
    candidates = whole.draw(3)
    F.cross_entropy(whole.forward_masked(x, candidates).cls, labels, reduction="sum").backward()
    together = gradients(whole)
    for number, candidate in enumerate(candidates):
        part = slice(number, None, 3)
        F.cross_entropy(whole.forward_masked(x[part], [candidate]).cls, labels[part], reduction="sum").backward()
    apart = gradients(whole)
    assert set(together) == set(apart) == {name for name, _ in whole.named_parameters()}
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], atol=1e-4, rtol=1e-3, msg=name)


def test_masked_gradients_are_those_of_the_extracted_network() -> None:
    space = toy_space()
    whole, x, labels = supernet(space), noise(4), torch.tensor([0, 1, 2, 0])
    candidate = space.smallest()
    F.cross_entropy(whole.forward_masked(x, [candidate]).cls, labels).backward()
    alone = extract(whole.net, space, candidate)
    F.cross_entropy(alone(x), labels).backward()
    shared, own = whole.net.blocks[0].mlp.fc1.weight, alone.blocks[0].mlp.fc1.weight
    assert own.grad.abs().max() > 1e-3
    torch.testing.assert_close(shared.grad[: len(own), : own.shape[1]], own.grad, atol=1e-4, rtol=1e-3)
    assert shared.grad[len(own) :].abs().max() == 0


def test_masked_norm_is_layer_norm_over_the_kept_channels() -> None:
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(12, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    mask = (torch.arange(12) < 7).float()
    x = (5 + 3 * torch.randn(2, 4, 12)) * mask
    expected = F.layer_norm(x[..., :7], (7,), norm.weight[:7], norm.bias[:7], norm.eps)
    result = _normed(norm, x, mask[None, None])
    torch.testing.assert_close(result[..., :7], expected, atol=1e-5, rtol=1e-5)
    assert result[..., 7:].abs().max() == 0
    assert torch.equal(_normed(norm, x, None), norm(x))


@torch.no_grad()
def test_whole_network_speaks_in_eval_mode_and_where_all_choices_are_the_largest() -> None:
    whole, x = supernet(toy_space(), warmup_epochs=5), noise()
    calm = whole(x)
    assert torch.equal(calm, whole.net(x))
    torch.testing.assert_close(whole.forward_masked(x, [whole.space.largest()] * 2).cls, calm, atol=1e-4, rtol=1e-4)
    whole.begin_epoch(0)
    whole.train()
    for module in whole.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    torch.testing.assert_close(whole(x), calm, atol=1e-4, rtol=1e-4)


def test_choices_are_dealt_evenly_and_presence_is_even_odds() -> None:
    space = toy_space()
    whole = supernet(space)
    torch.manual_seed(3)
    drawn = whole.draw(600)
    widths = Counter(candidate.stages[0].embed_dim for candidate in drawn)
    assert set(widths.values()) == {200}
    assert sum(candidate.stages[0].blocks[1].kept for candidate in drawn) == 300
    assert all(candidate.stages[0].blocks[0].kept for candidate in drawn)
    # each item is dealt on its own
    assert len({(c.stages[0].embed_dim, c.stages[0].blocks[0].num_heads) for c in drawn}) == 9


def test_same_seed_draws_the_same() -> None:
    whole = supernet(toy_space())
    torch.manual_seed(4)
    first = whole.draw(8)
    torch.manual_seed(4)
    assert whole.draw(8) == first
    assert whole.draw(8) != first


@torch.no_grad()
def test_sorting_channels_keeps_what_the_network_computes_and_puts_the_largest_first() -> None:
    network, x = largest_network(toy_space()), noise()
    before, calm = {name: tensor.clone() for name, tensor in network.state_dict().items()}, network(x)
    reorder_channels(network.blocks)
    torch.testing.assert_close(network(x), calm, atol=1e-4, rtol=1e-4)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".", 2)[2] for name in changed} == {
        *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"), *("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight")
    }  # fmt: skip
    for layer in network.blocks:
        if hasattr(layer, "mlp"):
            mlp, attn = layer.mlp, layer.attn
            units = mlp.fc1.weight.abs().sum(1) + mlp.fc1.bias.abs() + mlp.fc2.weight.abs().sum(0)
            heads = attn.qkv.weight.view(3, attn.num_heads, -1).abs().sum((0, 2))
            heads = heads + attn.qkv.bias.view(3, attn.num_heads, -1).abs().sum((0, 2))
            heads = heads + attn.proj.weight.view(len(attn.proj.weight), attn.num_heads, -1).abs().sum((0, 2))
            for importance in (units, heads):
                assert torch.equal(importance, importance.sort(descending=True).values)


def test_channels_are_sorted_at_the_start_of_warm_up_epochs_only() -> None:
    whole = supernet(toy_space(), warmup_epochs=2)
    for epoch, moves in ((0, True), (2, True), (3, False)):
        with torch.no_grad():
            whole.net.blocks[0].mlp.fc1.weight.copy_(whole.net.blocks[0].mlp.fc1.weight.flip(0))
        before = whole.net.blocks[0].mlp.fc1.weight.clone()
        whole.begin_epoch(epoch)
        assert torch.equal(before, whole.net.blocks[0].mlp.fc1.weight) != moves


def test_extracted_network_has_weights_of_its_own() -> None:
    space = toy_space()
    whole = largest_network(space)
    alone = extract(whole, space, space.largest())
    assert isinstance(alone, ViTResNAS)
    assert not alone.training
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.zero_()
    assert all(parameter.abs().max() > 0 for parameter in whole.parameters())


def test_removed_blocks_take_their_weights_along() -> None:
    space = toy_space()
    whole = largest_network(space)
    smallest = extract(whole, space, space.smallest())
    # stage 1 keeps place 0; the reduction is entry 2; stage 2 keeps place 1 of 3, which is entry 4
    assert torch.equal(smallest.blocks[1].norm.weight, whole.blocks[2].norm.weight[:8])
    assert torch.equal(smallest.blocks[2].norm1.weight, whole.blocks[4].norm1.weight[:20])


def test_network_of_another_space_is_refused() -> None:
    space = toy_space()
    small = extract(largest_network(space), space, space.smallest())
    with pytest.raises(ConfigError, match="the space's largest has"):
        SuperNetwork(small, space, Sampling())


def test_compiled_once_for_all_candidates_and_epochs() -> None:
    """Masks that came from whole numbers of Python were compiled anew eight times, and then no more."""
    torch.compiler.reset()
    whole, counter = supernet(toy_space(), warmup_epochs=2).train(), CompileCounter()
    compiled = torch.compile(Heads(whole), backend=counter, dynamic=False)
    frames = []
    for epoch in range(4):
        whole.begin_epoch(epoch)
        for _ in range(2):
            compiled(noise())
        frames.append(counter.frame_count)
    assert frames == [frames[0]] * 4
    assert counter.op_count > 100
