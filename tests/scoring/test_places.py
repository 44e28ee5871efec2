"""Logits of places: of convnets the linear layer on each cell, of our models the head on each patch."""

from typing import Any

import pytest
import torch
import torchvision
from tiny_models import tiny_model
from torch import Tensor, nn

from deit_models.errors import ConfigError
from deit_models.scoring.places import find_pooling, logits_of_places

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def network(name: str) -> nn.Module:
    """A network of torchvision with random weights, and statistics that fit its own maps."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=7)
    model.train()(X.repeat(4, 1, 1, 1))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "mobilenet_v2"])
def test_mean_over_places_is_what_the_network_says(name: str) -> None:
    model = network(name)
    found = logits_of_places(model, model, X)(X)
    assert found.shape == (2, 7, 2, 2)
    torch.testing.assert_close(found.mean((2, 3)), model(X), atol=1e-4, rtol=1e-4)
    assert float((found[..., 0, 0] - found[..., 1, 1]).abs().max()) > 1e-3


@torch.no_grad()
def test_each_place_has_the_linear_layer_on_its_cell_alone() -> None:
    model = network("resnet18")
    cells: list[Tensor] = []
    model.layer4.register_forward_hook(lambda _, __, output: cells.append(output))
    found = logits_of_places(model, model, X)(X)
    for row in range(2):
        for column in range(2):
            expected = cells[-1][:, :, row, column] @ model.fc.weight.T + model.fc.bias
            torch.testing.assert_close(found[:, :, row, column], expected)


class Largest(nn.Module):
    """Ends in the maximum of each channel, a linear layer and a division."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.GELU())
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).amax(dim=(2, 3))) / 8


@torch.no_grad()
def test_what_follows_the_linear_layer_counts_too() -> None:
    model = Largest()
    found = logits_of_places(model, model, X)(X)
    expected = (model.body(X).permute(0, 2, 3, 1) @ model.head.weight.T + model.head.bias) / 8
    torch.testing.assert_close(found.permute(0, 2, 3, 1), expected)
    assert not model.head._forward_pre_hooks  # none are left


@pytest.mark.parametrize("name", ["vgg11", "vit_b_16", "convnext_tiny"])
def test_other_networks_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    kind = type(model).__name__
    with pytest.raises(ConfigError, match=f"{kind} gives no logits for places of an image of 64x64 pixels; expected a"):
        logits_of_places(model, lambda _: None, X)
    assert find_pooling(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), lambda x: x, X) is None
    with pytest.raises(ConfigError, match="function gives no logits"):
        logits_of_places(lambda x: x, lambda x: x, X)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_micro_patch4_32", {"img_size": (16, 24)}),
        ("deit_micro_distilled_patch4_32", {}),
        ("t2t_vit_micro_cifar10", {"token_dim": 8, "token_head": True, "img_size": 64}),
        ("t2t_vit_micro_cifar10", {"token_dim": 8, "img_size": 64}),
    ],
)
def test_each_patch_of_a_transformer_has_its_heads(name: str, options: dict[str, Any]) -> None:
    model = tiny_model(name, **options)
    x = torch.randn(2, 3, *model.config.image_hw)
    found, features = logits_of_places(model, model, x)(x), model.forward_features(x)
    patches, (height, width) = features[:, model.num_prefix_tokens :], model.config.grid
    if getattr(model, "aux_head", None) is not None:
        expected = model.aux_head(patches)
    else:
        heads = [head for head in (model.head, getattr(model, "head_dist", None)) if head is not None]
        expected = sum(head(patches) for head in heads) / len(heads)
    assert found.shape == (2, 10, height, width)
    for row in range(height):
        for column in range(width):
            torch.testing.assert_close(found[:, :, row, column], expected[:, row * width + column])


@torch.no_grad()
def test_mean_over_places_of_a_levit_is_what_it_says() -> None:
    model = tiny_model("levit_128s", embed_dim=(16, 24), depth=(1, 1), num_heads=(2, 2), img_size=64)
    x = torch.randn(2, 3, 64, 64)
    found = logits_of_places(model, model, x)(x)
    assert found.shape == (2, 1000, 2, 2)
    torch.testing.assert_close(found.mean((2, 3)), model(x), atol=1e-4, rtol=1e-4)
