"""Mixup, CutMix and smoothing: the laws of the draws, and the same images and targets as timm for the same draw."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws import kolmogorov
from PIL import Image

from deit_models.augmentation.augment import TrainTransform
from deit_models.augmentation.mixing import Mix, Mixing, cutmix_box, mix_images, mix_targets, smooth_one_hot
from deit_models.checkpoint import Preprocessing
from deit_models.errors import ConfigError, DataError
from deit_models.recipes.recipe import Recipe

BOTH = Recipe()
OFF = Recipe(mixup=0, cutmix=0)


def batch(size: int = 6, height: int = 8, width: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, height, width, generator=generator), torch.arange(size)


def test_smoothed_targets_have_the_papers_values() -> None:
    targets = smooth_one_hot(torch.tensor([7, 0]), 1000, 0.1)
    assert targets.dtype == torch.float32
    assert targets.shape == (2, 1000)
    torch.testing.assert_close(targets[0, 7], torch.tensor(0.9001))
    torch.testing.assert_close(targets[1, 7], torch.tensor(0.0001))
    torch.testing.assert_close(targets.sum(1), torch.ones(2))
    assert smooth_one_hot(torch.tensor([1]), 3, 0.0).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("label", [10, -1])
def test_label_out_of_range_is_named(label: int) -> None:
    with pytest.raises(DataError, match=f"label {label} with 10 classes; labels run from 0 to 9"):
        Mixing(BOTH, 10)(batch(2)[0], torch.tensor([3, label]))


def test_other_numbers_of_labels_and_of_classes_are_refused() -> None:
    with pytest.raises(DataError, match="6 images"):
        Mixing(BOTH, 10)(batch(6)[0], torch.arange(5))
    with pytest.raises(ConfigError, match="num_classes=0"):
        Mixing(BOTH, 0)


def test_without_mixing_only_the_targets_are_smoothed() -> None:
    images, labels = batch()
    before = images.clone()
    mixed, targets = Mixing(OFF, 10)(images, labels)
    assert torch.equal(mixed, before)
    assert torch.equal(targets, smooth_one_hot(labels, 10, 0.1))


@pytest.mark.parametrize("recipe", [Recipe(mixup=0), Recipe(cutmix=0)], ids=["cutmix", "mixup"])
def test_targets_say_what_the_pixels_hold(recipe: Recipe) -> None:
    # Image i is the i-th coordinate axis, so that the mean over pixels is the share of each image: what a target says
    torch.manual_seed(5)
    mixing = Mixing(Recipe(mixup=recipe.mixup, cutmix=recipe.cutmix, label_smoothing=0), 5)
    for _ in range(20):
        images = torch.eye(5)[:, :3, None, None].repeat(1, 1, 16, 12)
        mixed, targets = mixing(images, torch.arange(5))
        torch.testing.assert_close(mixed.mean((2, 3)), targets[:, :3])
        assert mixed is images
        assert targets.max() <= 1


@pytest.mark.parametrize("box", [None, (2, 5, 0, 7)])
def test_middle_of_an_odd_batch_stays_itself(box: tuple[int, int, int, int] | None) -> None:
    images, labels = batch(5)
    before, targets = images.clone(), smooth_one_hot(labels, 5, 0.1)
    mix_images(images, Mix(0.3, box))
    torch.testing.assert_close(images[2], before[2])
    assert not torch.allclose(images[0], before[0])
    torch.testing.assert_close(mix_targets(targets, Mix(0.3, box))[2], targets[2])


def test_cutmix_box_is_clipped_and_rounded_as_in_the_papers() -> None:
    # A quarter of the area pasted: half of each side, here 8 and 6 pixels
    assert cutmix_box(16, 12, 0.75, (8, 6)) == (4, 12, 3, 9)
    assert cutmix_box(16, 12, 0.75, (0, 11)) == (0, 4, 8, 12)
    # 7.5 and 5.5 of 15 and 11 pixels: 7 and 5, and the odd pixel is lost
    assert cutmix_box(15, 11, 0.75, (7, 5)) == (4, 10, 3, 7)
    assert cutmix_box(16, 12, 1.0, (8, 6)) == (8, 8, 6, 6)


def test_cutmix_box_is_that_of_torchvision() -> None:
    from torchvision.transforms import v2

    theirs = v2.CutMix(num_classes=2)
    image = torch.zeros(2, 3, 37, 50)
    for seed in range(300):
        torch.manual_seed(seed)
        share = float(torch.rand(()))
        theirs._dist = SimpleNamespace(sample=lambda _, share=share: torch.tensor(share))
        torch.manual_seed(seed)
        params = theirs.make_params([image])
        torch.manual_seed(seed)
        column, row = int(torch.randint(50, (1,))), int(torch.randint(37, (1,)))
        top, bottom, left, right = cutmix_box(37, 50, share, (row, column))
        assert params["box"] == (left, top, right, bottom)


def test_draws_follow_the_recipe() -> None:
    # Bounds are four standard deviations of 4,000 draws; Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))
    torch.manual_seed(1)
    mixing = Mixing(Recipe(mix_prob=0.9, mix_switch=0.3), 10)
    drawn = [mixing.draw(20, 30) for _ in range(4000)]
    mixes = [mix for mix in drawn if mix is not None]
    assert abs(len(mixes) / 4000 - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 4000)
    pasted = [mix for mix in mixes if mix.box is not None]
    assert abs(len(pasted) / len(mixes) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(mixes))
    for mix in pasted:
        top, bottom, left, right = mix.box or (0, 0, 0, 0)
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / 600)
    shares = torch.tensor([mix.share for mix in mixes if mix.box is None])
    variance = 1 / (4 * (2 * 0.8 + 1))
    assert abs(float(shares.mean()) - 0.5) < 4 * math.sqrt(variance / len(shares))
    assert float(shares.var()) == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize(("recipe", "cutmix"), [(Recipe(mixup=0, mix_switch=0), True), (Recipe(cutmix=0), False)])
def test_one_of_the_two_alone_is_always_taken(recipe: Recipe, cutmix: bool) -> None:
    mixing = Mixing(recipe, 10)
    mixes = [mixing.draw(8, 8) for _ in range(50)]
    assert all(mix is not None and (mix.box is not None) == cutmix for mix in mixes)


def test_the_seed_decides() -> None:
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(Mixing(BOTH, 10)(*batch())[1])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


class TestAgainstTimm:
    """The same images and targets, bit for bit, when timm is made to draw what we drew."""

    @pytest.fixture(autouse=True)
    def _timm(self) -> None:
        self.mixup = pytest.importorskip("timm.data.mixup", reason="timm is not installed")

    def theirs(self, share: float, *, cutmix: bool) -> Any:
        class Fixed(self.mixup.Mixup):
            def _params_per_batch(self) -> tuple[float, bool]:
                return share, cutmix

        return Fixed(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)

    @pytest.mark.parametrize("share", [0.0, 0.1234567, 0.5, 0.97, 1.0])
    def test_mixup(self, share: float) -> None:
        class Ours(Mixing):
            def draw(self, height: int, width: int) -> Mix:  # noqa: ARG002
                return Mix(share, None)

        images, labels = batch()
        expected, expected_targets = self.theirs(share, cutmix=False)(images.clone(), labels)
        mixed, targets = Ours(BOTH, 10)(images, labels)
        assert torch.equal(mixed, expected)
        assert torch.equal(targets, expected_targets)
        assert torch.equal(targets, self.mixup.mixup_target(labels, 10, share, 0.1))

    @pytest.mark.parametrize("centre", [(0, 0), (7, 9), (4, 3)])
    @pytest.mark.parametrize("share", [0.0, 0.36, 0.84])
    def test_cutmix(self, share: float, centre: tuple[int, int]) -> None:
        # 20 x 10: sides of 20 and 10, 16 and 8, 8 and 4 pixels: even, where the two rules agree
        images, labels = batch(6, 20, 10)
        random = self.mixup.np.random
        for seed in range(10_000):  # timm draws the row, then the column
            random.seed(seed)
            if (random.randint(0, 20), random.randint(0, 10)) == centre:
                break
        random.seed(seed)
        expected, expected_targets = self.theirs(share, cutmix=True)(images.clone(), labels)
        box = cutmix_box(20, 10, share, centre)
        top, bottom, left, right = box
        mix = Mix(1 - (bottom - top) * (right - left) / 200, box)
        assert torch.equal(mix_images(images, mix), expected)
        assert torch.equal(mix_targets(smooth_one_hot(labels, 10, 0.1), mix), expected_targets)

    def test_law_of_the_share(self) -> None:
        # 3,000 draws a side; the distance passes 0.042 once in a hundred times. An even 64 x 64, where sides agree but
        # for the odd pixel, moves the share by at most 2 %, which 0.02 more allow for
        torch.manual_seed(2)
        self.mixup.np.random.seed(2)
        for recipe, slack in ((Recipe(cutmix=0), 0.0), (Recipe(mixup=0), 0.02)):
            theirs = self.mixup.Mixup(mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix)
            mixing, expected, drawn = Mixing(recipe, 10), [], []
            for _ in range(3000):
                share, cutmix = theirs._params_per_batch()
                if cutmix:
                    share = self.mixup.cutmix_bbox_and_lam((64, 64), share)[1]
                expected.append(float(share))
                mix = mixing.draw(64, 64)
                assert mix is not None
                drawn.append(mix.share)
            assert kolmogorov(torch.tensor(drawn), torch.tensor(expected)) < 0.042 + slack


def test_several_labels_are_mixed_as_the_pixels_are() -> None:
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    mixing = Mixing(Recipe(label_smoothing=0.1, cutmix=0.0, mixup=0.8), 3)
    torch.manual_seed(0)
    images, targets = mixing(labels[:, :, None, None].expand(4, 3, 8, 8).clone(), labels)
    assert torch.allclose(images[:, :, 0, 0], targets)  # each pixel has the label for its colour
    assert not torch.equal(targets, labels)
    with pytest.raises(DataError, match=r"labels of shape \(4, 2\)"):
        mixing(images, labels[:, :2])


# ---- as the authors' devices mix


def test_groups_of_images_have_a_draw_each() -> None:
    torch.manual_seed(0)
    mixing = Mixing(replace(BOTH, mix_size=4), 10)
    images, labels = batch(10)
    expected_images, expected_targets = images.clone(), []
    state = torch.get_rng_state()
    mixed, targets = mixing(images, labels)
    torch.set_rng_state(state)
    whole = Mixing(BOTH, 10)
    for part in ((0, 4), (4, 8), (8, 10)):
        _, wanted = whole(expected_images[slice(*part)], labels[slice(*part)])
        expected_targets.append(wanted)
    torch.testing.assert_close(mixed, expected_images)
    torch.testing.assert_close(targets, torch.cat(expected_targets))
    shares = [row.max() for row in (targets[0], targets[4], targets[8])]
    assert len({round(float(share), 6) for share in shares}) == 3


def test_erasing_after_mixing_leaves_whole_boxes_of_noise() -> None:
    """Before mixing, a box of noise would be halved with its image and have the partner's box beside it."""
    recipe = Recipe(mixup=0.8, cutmix=0.0, erase=1.0, erase_after_mixing=True)
    torch.manual_seed(0)
    images = torch.full((64, 3, 16, 16), 7.0)
    mixed, _ = Mixing(recipe, 10)(images, torch.arange(64) % 10)
    noise = (mixed - 7).abs() > 1e-5
    assert ((noise.any(dim=1).sum(dim=(1, 2)) > 0).float().mean()) > 0.9
    values = mixed[noise]
    assert abs(float(values.mean())) < 0.1
    assert float(values.std()) == pytest.approx(1, abs=0.05)
    for one in noise.any(dim=1)[:8]:
        rows, columns = one.any(dim=1), one.any(dim=0)
        assert int(one.sum()) == int(rows.sum() * columns.sum())  # one box
    unerased = TrainTransform(recipe, Preprocessing(resize=16, crop=(16, 16)), (16, 16))
    assert int(unerased(Image.new("RGB", (20, 20))).erase[2]) == 0
    still, _ = Mixing(replace(recipe, erase=0.0), 10)(torch.full((8, 3, 16, 16), 7.0), torch.arange(8))
    assert float((still - 7).abs().max()) < 1e-5
