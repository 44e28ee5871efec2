"""Heat maps against arithmetic written out in loops, on every family; a model is left as it was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from cifar10 import first_images, needs_cifar10
from tiny_models import randomise, refusal, tiny_model
from torch import Tensor
from torch.nn import functional as F

import deit_models
from deit_models.errors import ConfigError
from deit_models.models.layers import ImageClassifier
from deit_models.models.vit_resnas import Stage
from deit_models.show.heat_maps import METHODS, heat_maps

STAGES = tuple(Stage(embed_dim=8 * k, head_dim=4, num_heads=(2, 2), mlp_hidden=(8, 8)) for k in (1, 2))
# One of each family, with images that are not square
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "DeiT": ("deit_micro_patch4_32", {"img_size": (16, 24), "embed_dim": 16, "num_heads": 2, "depth": 3}),
    "distilled": ("deit_micro_distilled_patch4_32", {"img_size": (24, 16), "embed_dim": 16, "num_heads": 2}),
    "DeiT III": ("deit3_small_patch16_224", {"img_size": (32, 48), "embed_dim": 16, "num_heads": 2, "depth": 2}),
    "T2T-ViT": ("t2t_vit_micro_cifar10", {"img_size": (32, 48), "embed_dim": 16, "num_heads": 2, "depth": 2}),
    "T2T-ViT with a token head": (
        "t2t_vit_24_token_labeling",
        {"img_size": (48, 32), "embed_dim": 16, "num_heads": 2, "depth": 2},
    ),
    "LeViT": (
        "levit_128s",
        {"img_size": (144, 208), "embed_dim": (16, 24, 32), "depth": (1, 2, 1), "num_heads": (2, 2, 2), "key_dim": 8},
    ),
    "ViT-ResNAS": ("vit_res_micro_patch4_32", {"img_size": (32, 48), "stages": STAGES}),
    "CaiT": ("cait_micro_patch4_32", {"img_size": (16, 24), "embed_dim": 16, "num_heads": 2, "depth": 3}),
    "distilled ViT-ResNAS": ("vit_res_micro_patch4_32", {"img_size": (32, 48), "stages": STAGES, "distilled": True}),
}


def small(family: str, **changes: Any) -> ImageClassifier:
    name, shape = FAMILIES[family]
    model = randomise(deit_models.create_model(name, **{**shape, "num_classes": 5, **changes})).eval()
    if family == "LeViT":  # else the stem makes all positions alike
        with torch.no_grad():
            for parameter in model.patch_embed.parameters():
                parameter.mul_(4)
    return model


def images(model: ImageClassifier, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, model.config.in_chans, *model.config.image_hw, generator=generator)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> ImageClassifier:
    return small(request.param)


# The arithmetic


def window_shares(height: int, width: int) -> Tensor:
    """Of each 2x2 cell: half by the 3x3 window of the convolution, without its padding, half by the 2x2 mean."""
    shares = torch.zeros(height // 2 * (width // 2), height * width)
    for row in range(height // 2):
        for column in range(width // 2):
            cell = row * (width // 2) + column
            window = [
                (i, j)
                for i in range(2 * row - 1, 2 * row + 2)
                for j in range(2 * column - 1, 2 * column + 2)
                if 0 <= i < height and 0 <= j < width
            ]
            for i, j in window:
                shares[cell, i * width + j] += 0.5 / len(window)
            for i in (2 * row, 2 * row + 1):
                for j in (2 * column, 2 * column + 1):
                    shares[cell, i * width + j] += 0.5 / 4
    return shares


def product(model: ImageClassifier, blocks: list[Tensor], *, with_residual: Any) -> Tensor:
    """The product of all layers for one image, (outputs, inputs), from the matrix of each attention in order."""
    whole = torch.eye(blocks[0].shape[1], dtype=torch.float64)
    prefix = model.num_prefix_tokens
    for number, block in enumerate(blocks):
        if block.shape[1] < whole.shape[0]:  # a reduction of ViT-ResNAS lies between
            height, width = model.config.grids[0]
            step = torch.eye(prefix + height * width // 4, prefix + height * width, dtype=torch.float64)
            step[prefix:, :] = 0
            step[prefix:, prefix:] = window_shares(height, width).double()
            whole = step @ whole
        step = block.double()
        if len(block) == 1:  # a class block of CaiT
            if len(whole) < block.shape[1]:  # the class token joins: from it nothing leads back
                whole = F.pad(whole, (0, 0, 1, 0))
            asked, step = step, torch.eye(block.shape[1], dtype=torch.float64)
            step[0] = with_residual(F.pad(asked, (0, 0, 0, block.shape[1] - 1)))[0]
        elif block.shape[0] == block.shape[1]:
            step = with_residual(step)
        assert number == 0 or step.shape[1] == whole.shape[0]
        whole = step @ whole
    return whole


def finished(model: ImageClassifier, whole: Tensor, size: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
    """The map of the rows of the prefix tokens, or of all rows, from 0 to 1."""
    prefix = model.num_prefix_tokens
    row = whole[: prefix or len(whole)].mean(0)[-grid[0] * grid[1] :]
    heat = F.interpolate(row.view(1, 1, *grid), size, mode="bilinear", align_corners=False)[0, 0]
    return (heat - heat.min()) / (heat.max() - heat.min())


def first_grid(model: ImageClassifier) -> tuple[int, int]:
    return model.config.grids[0] if hasattr(model.config, "grids") else model.config.grid


def close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.05, "a flat map would prove nothing"
    torch.testing.assert_close(found, expected.float(), atol=2e-4, rtol=0)


def test_rollout_is_the_product_of_averaged_attention_and_identity(model: ImageClassifier) -> None:
    x = images(model)
    found = heat_maps(model, x, method="rollout")
    for number in range(len(x)):
        blocks = [maps[number].detach().mean(0) for maps in deit_models.attention_maps(model, x)]
        whole = product(model, blocks, with_residual=lambda a: 0.5 * a + 0.5 * torch.eye(len(a)))
        if model.num_block_prefix_tokens == model.num_prefix_tokens:
            torch.testing.assert_close(whole.sum(1), torch.ones(len(whole)).double())
        close(found[number], finished(model, whole, x.shape[2:], first_grid(model)))


@pytest.mark.parametrize("fusion", ["max", "min"])
def test_heads_fuse_and_the_lowest_shares_go(fusion: str) -> None:
    model = small("DeiT")
    x = images(model, 1)
    blocks = []
    for maps in deit_models.attention_maps(model, x).detach()[:, 0]:
        fused = torch.zeros(maps.shape[1:])
        for row in range(len(fused)):
            values = [getattr(maps[:, row, column], fusion)().item() for column in range(len(fused))]
            gone = sorted(range(len(values)), key=values.__getitem__)[: int(0.7 * len(values))]
            fused[row] = torch.tensor([0.0 if i in gone else value for i, value in enumerate(values)])
        blocks.append(fused)

    def with_residual(a: Tensor) -> Tensor:
        mixed = (a + torch.eye(len(a))) / 2
        return mixed / mixed.sum(1, keepdim=True)

    expected = finished(model, product(model, blocks, with_residual=with_residual), x.shape[2:], model.config.grid)
    close(heat_maps(model, x, head_fusion=fusion, discard=0.7)[0], expected)
    assert not torch.equal(heat_maps(model, x, head_fusion=fusion)[0], expected)


def test_last_is_the_last_block_alone(model: ImageClassifier) -> None:
    x = images(model)
    last = deit_models.attention_maps(model, x)[-1].detach()
    grid = model.config.grids[-1] if hasattr(model.config, "grids") else model.config.grid
    for found, heads in zip(heat_maps(model, x, method="last"), last, strict=True):
        close(found, finished(model, heads.mean(0), x.shape[2:], grid))


def test_tokens_apart_average_to_both() -> None:
    model = small("distilled")
    x = images(model, 1)
    rows = deit_models.attention_maps(model, x)[-1].detach()[0].mean(0)[:2, 2:]
    for token, row in (("class", rows[0]), ("distillation", rows[1]), ("mean", rows.mean(0))):
        heat = F.interpolate(row.view(1, 1, *model.config.grid), x.shape[2:], mode="bilinear")[0, 0]
        expected = (heat - heat.min()) / (heat.max() - heat.min())
        close(heat_maps(model, x, method="last", token=token)[0], expected)


def slopes(model: ImageClassifier, x: Tensor, logit: Any) -> list[Tensor]:
    """Gradient * attention of every attention, (B, heads, queries, keys), from a pass with attention written out."""
    kept: list[Tensor] = []

    def written_out(module: Any, arguments: tuple[Tensor, ...], _: Tensor) -> Tensor:
        _, _, value = module.heads(arguments[0])
        attention = getattr(module, "shares", module.weights)(arguments[0])
        attention.retain_grad()
        kept.append(attention)
        return module.proj((attention @ value).transpose(1, 2).flatten(2))

    layers = [module for module in model.modules() if hasattr(module, "weights") and hasattr(module, "heads")]
    handles = [layer.register_forward_hook(written_out) for layer in layers]
    logit(model.forward_heads(x)).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return [(attention * attention.grad).detach() for attention in kept]


def test_gradient_weights_attention_by_the_gradient_of_the_class(model: ImageClassifier) -> None:
    x, target = images(model), [3, 1]

    def logit(heads: Any) -> Tensor:
        answer = heads.cls if heads.dist is None else (heads.cls + heads.dist) / 2
        return answer[0, 3] + answer[1, 1]

    products = slopes(model, x, logit)
    found = heat_maps(model, x, method="gradient", target=target)
    for number in range(len(x)):
        blocks = [each[number].clamp(min=0).mean(0) for each in products]
        whole = product(model, blocks, with_residual=lambda a: a + torch.eye(len(a)))
        close(found[number], finished(model, whole, x.shape[2:], first_grid(model)))


def test_gradient_of_one_token_takes_its_head_and_its_row() -> None:
    model = small("distilled")
    x = images(model, 1)
    for number, token in enumerate(("class", "distillation")):
        products = slopes(model, x, lambda heads, number=number: heads[number][0, 2])
        blocks = [each[0].clamp(min=0).mean(0) for each in products]
        whole = product(model, blocks, with_residual=lambda a: a + torch.eye(len(a)))
        heat = F.interpolate(whole[number, 2:].view(1, 1, *model.config.grid), x.shape[2:], mode="bilinear")[0, 0]
        expected = (heat - heat.min()) / (heat.max() - heat.min())
        close(heat_maps(model, x, method="gradient", target=2, token=token)[0], expected)


def test_the_class_of_a_gradient_is_the_likeliest_unless_told(model: ImageClassifier) -> None:
    x = images(model)
    likeliest = model(x).argmax(1).tolist()
    default = heat_maps(model, x, method="gradient")
    assert torch.equal(default, heat_maps(model, x, method="gradient", target=likeliest))
    other = (likeliest[0] + 1) % 5
    assert not torch.equal(default[0], heat_maps(model, x, method="gradient", target=other)[0])


# Properties


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_from_0_to_1_and_of_each_image_alone(model: ImageClassifier, method: Any) -> None:
    x = images(model, 3)
    found = heat_maps(model, x, method=method)
    assert found.shape == (3, *model.config.image_hw)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.amin((1, 2)).tolist() == [0.0] * 3
    assert found.amax((1, 2)).tolist() == [1.0] * 3
    torch.testing.assert_close(found[1:2], heat_maps(model, x[1:2], method=method), atol=1e-4, rtol=0)


def test_a_map_without_differences_is_all_zeros() -> None:
    model = small("DeiT")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    for method in METHODS:
        assert heat_maps(model, images(model), method=method).abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_other_sizes_of_a_dynamic_model(method: Any) -> None:
    model = small("DeiT", dynamic_img_size=True)
    assert heat_maps(model, torch.randn(1, 3, 32, 8), method=method).shape == (1, 32, 8)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_gives_nearly_the_same_map(method: Any) -> None:
    model = small("distilled", depth=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    x = images(model)
    exact = heat_maps(model, x, method=method, **({"target": 0} if method == "gradient" else {}))
    half = heat_maps(model.bfloat16(), x.bfloat16(), method=method, **({"target": 0} if method == "gradient" else {}))
    assert half.dtype == torch.float32
    assert (half - exact).abs().mean() < 0.03


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method: Any) -> None:
    model = small("distilled")
    expected = heat_maps(model, images(model), method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(heat_maps(model, images(model), method=method), expected)


# The model stays as it is


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", METHODS)
def test_the_caller_may_have_gradients_on_or_off(context: Any, method: Any) -> None:
    for family in ("distilled", "LeViT"):
        model = small(family)
        expected = heat_maps(model, images(model), method=method)
        with context():
            grad_mode = torch.is_grad_enabled()
            found = heat_maps(model, images(model), method=method)
            assert torch.is_grad_enabled() == grad_mode
        assert torch.equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_hooks_are_left_as_found(model: ImageClassifier, method: Any, fails: bool) -> None:
    model.train()
    model.set_grad_checkpointing()
    model.blocks[0].eval()
    some = next(p for p in model.parameters() if p.requires_grad)
    some.requires_grad_(False)
    other = list(model.parameters())[-1]
    other.grad = torch.ones_like(other)
    x = images(model).requires_grad_()
    before = [(module, module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        with pytest.raises(ConfigError):
            heat_maps(model, x * float("nan"), method=method)
    else:
        expected = heat_maps(small_copy(model), x, method=method)
        assert torch.equal(heat_maps(model, x, method=method), expected)
    assert [(module, module.training, len(module._forward_pre_hooks)) for module in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.grad is not None for p in model.parameters()] == [p is other for p in model.parameters()]
    assert torch.equal(other.grad, torch.ones_like(other))
    assert x.grad is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def small_copy(model: ImageClassifier) -> ImageClassifier:
    """The same weights in eval mode, all of them with gradients, and without gradient checkpointing."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def test_a_fused_levit_and_a_compiled_model_have_the_same_maps() -> None:
    model = small("LeViT")
    x = images(model)
    for method in METHODS:
        found = heat_maps(model.fuse(), x, method=method)
        torch.testing.assert_close(found, heat_maps(model, x, method=method), atol=1e-3, rtol=0)
    wrapped = torch.nn.DataParallel(model)
    assert torch.equal(heat_maps(wrapped, x), heat_maps(model, x))


# Refusals


class Plain(ImageClassifier):
    head_names = ()


class Steps(ImageClassifier):
    """A family of its own, whose layers are not known here."""

    head_names = ()

    def __init__(self) -> None:
        super().__init__(small("DeiT").config)
        self.blocks = torch.nn.Sequential(torch.nn.Linear(2, 2))

    def attention_maps(self, x: Tensor) -> list[Tensor]:
        return [torch.ones(len(x), 1, 2, 2)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "flow"}, "method='flow'; expected one of rollout, last, gradient"),
        ({"head_fusion": "sum"}, "head_fusion='sum'"),
        ({"token": "patch"}, "token='patch'"),
        ({"token": "distillation"}, "has no distillation token"),
        ({"discard": 1.0}, "discard=1.0; expected a share"),
        ({"discard": float("nan")}, "discard=nan"),
        ({"discard": 0.5, "method": "last"}, "only method='rollout' discards"),
        ({"head_fusion": "max", "method": "gradient"}, "always averages"),
        ({"target": 1}, "only method='gradient' differs"),
        ({"target": 5, "method": "gradient"}, "target=5; expected a class from 0 to 4"),
        ({"target": -1, "method": "gradient"}, "expected a class from 0 to 4"),
        ({"target": [1], "method": "gradient"}, "one for each of 2 images"),
        ({"target": [1, True], "method": "gradient"}, "expected a class"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    model = small("DeiT")
    assert message in refusal(ConfigError, lambda: heat_maps(model, images(model), **changes))


def test_inputs_and_models_that_do_not_fit_are_refused_by_name() -> None:
    model = small("DeiT")
    x = images(model)
    pixels = torch.zeros(1, 3, 16, 24, dtype=torch.uint8)
    assert "uint8" in refusal(ConfigError, lambda: heat_maps(model, pixels))
    assert "(3, 16, 24)" in refusal(ConfigError, lambda: heat_maps(model, x[0]))
    assert "16x24" in refusal(ConfigError, lambda: heat_maps(model, torch.zeros(1, 3, 8, 8)))
    assert "not finite" in refusal(ConfigError, lambda: heat_maps(model, x * float("nan")))
    assert "no class token" in refusal(ConfigError, lambda: heat_maps(small("LeViT"), x, token="class"))
    headless = small("DeiT", num_classes=0)
    assert "num_classes=0" in refusal(ConfigError, lambda: heat_maps(headless, x, method="gradient"))
    assert heat_maps(headless, x).shape == (2, 16, 24)
    assert "Plain has no attention maps" in refusal(ConfigError, lambda: heat_maps(Plain(model.config), x))
    assert "no attention maps" in refusal(ConfigError, lambda: heat_maps(torch.nn.Linear(2, 2), x))
    assert "with a Linear" in refusal(ConfigError, lambda: heat_maps(Steps(), x))
    with torch.inference_mode():
        frozen = small("DeiT")
    assert "inference_mode" in refusal(ConfigError, lambda: heat_maps(frozen, x, method="gradient"))
    assert heat_maps(frozen, x).shape == (2, 16, 24)


def test_an_optimised_model_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model()
    fast = deit_models.optimize(model, backend="eager", precision="float32", cache_dir=tmp_path)
    message = refusal(ConfigError, lambda: heat_maps(fast, torch.randn(1, 3, 32, 32)))
    assert "as it was before `optimize`" in message


# Sanity, on the shipped checkpoint; benchmarks/heat_maps.py measures the same on 500 images


@pytest.fixture(scope="module")
def shipped() -> ImageClassifier:
    return deit_models.from_pretrained("deit_micro_distilled_patch4_32")


@pytest.fixture(scope="module")
def cats(shipped: ImageClassifier) -> Tensor:
    """Parts of a photograph, and their mirror images."""
    transform = deit_models.transform_for(shipped)
    with PIL.Image.open(Path(__file__).parents[2] / "examples" / "cat.jpg") as photograph:
        width, height = photograph.size
        side = min(width, height)
        boxes = [
            (x, y, x + side * 3 // 4, y + side * 3 // 4)
            for x in range(0, width - side * 3 // 4, side // 6)
            for y in range(0, side // 4, side // 12)
        ]
        parts = torch.stack([transform(photograph.crop(box)) for box in boxes])
    return torch.cat([parts, parts.flip(-1)])


def patch_heat(model: ImageClassifier, x: Tensor, method: Any, classes: Tensor) -> Tensor:
    target = {"target": classes.tolist()} if method == "gradient" else {}
    return F.avg_pool2d(heat_maps(model, x, method=method, **target)[:, None], 4).flatten(1)


def fallen(model: ImageClassifier, x: Tensor, heat: Tensor, classes: Tensor) -> Tensor:
    """Mean probability of the class after 8, 16 and 24 of 64 patches, the hottest ones, are the mean colour."""
    total = torch.zeros(len(x))
    for count in (8, 16, 24):
        kept = torch.ones_like(heat).scatter(1, heat.argsort(1, descending=True)[:, :count], 0.0)
        with torch.no_grad():
            scores = model(x * F.interpolate(kept.view(-1, 1, 8, 8), scale_factor=4)).softmax(1)
        total += scores.gather(1, classes[:, None])[:, 0] / 3
    return total.mean()


def gains(model: ImageClassifier, x: Tensor, method: Any) -> tuple[float, float]:
    """By how much less likely a class is without its hottest patches than without random ones, and the coldest ones."""
    with torch.no_grad():
        classes = model(x).argmax(1)
    heat = patch_heat(model, x, method, classes)
    generator = torch.Generator().manual_seed(0)
    random = [fallen(model, x, torch.rand(heat.shape, generator=generator), classes) for _ in range(3)]
    hottest, coldest = (fallen(model, x, sign * heat, classes) for sign in (1, -1))
    return float(min(random) - hottest), float(coldest - hottest)


def test_a_cat_is_less_likely_without_its_hottest_patches(shipped: ImageClassifier, cats: Tensor) -> None:
    beside_random, beside_coldest = gains(shipped, cats, "gradient")
    assert beside_random > 0.1
    assert beside_coldest > 0.2


@pytest.mark.slow
@needs_cifar10
@pytest.mark.parametrize(("method", "least"), [("gradient", 0.1), ("last", 0.03)])
def test_classes_of_cifar10_are_less_likely_without_their_hottest_patches(
    shipped: ImageClassifier, method: Any, least: float
) -> None:
    beside_random, beside_coldest = gains(shipped, first_images(shipped, "test", 8)[0], method)
    assert beside_random > least
    assert beside_coldest > 2 * least


@pytest.mark.parametrize("method", METHODS)
def test_other_weights_give_another_map(shipped: ImageClassifier, cats: Tensor, method: Any) -> None:
    def ranks(model: ImageClassifier) -> Tensor:
        classes = torch.full((len(cats),), 3)
        order = patch_heat(model, cats, method, classes).argsort(1).argsort(1).double()
        return F.normalize(order - order.mean(1, keepdim=True), dim=1)

    torch.manual_seed(0)
    fresh = [deit_models.create_model("deit_micro_distilled_patch4_32").eval() for _ in range(6)]
    own = ranks(shipped)
    assert (own * own).sum(1).mean() == pytest.approx(1)
    correlations = [float((own * ranks(model)).sum(1).mean()) for model in fresh]
    assert abs(sum(correlations) / len(correlations)) < 0.4, correlations  # a single one may have the cat's centre
