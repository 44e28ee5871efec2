"""Label maps: what is kept of the teacher's numbers, the cut along with the crop, targets of patches, refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from small_sets import distributions, write_maps
from tiny import Pictures
from torch import Tensor

from deit_models.augmentation.augment import TrainTransform, drawn_rng, sample_rng
from deit_models.augmentation.label_maps import LabelMaps, cut_maps, packed, row_type
from deit_models.augmentation.mixing import Mix, Mixing, TokenLabels, mixed_targets
from deit_models.augmentation.samples import TrainingSamples
from deit_models.batches.memory import keep_in_memory
from deit_models.checkpoint import Preprocessing
from deit_models.data.records import ArrayRecords, SubsetRecords
from deit_models.errors import ConfigError, DataError
from deit_models.recipes.recipe import Recipe

CPU = torch.device("cpu")


# On disk


def test_five_likeliest_classes_come_back_in_half_precision(tmp_path: Path) -> None:
    pictures, given = Pictures(6, classes=9), distributions(6, 9, 2, 3)
    maps = LabelMaps(write_maps(tmp_path / "maps", pictures, given), pictures)
    found = maps.dense(torch.tensor([4, 0, 4]), CPU)
    for row, number in enumerate([4, 0, 4]):
        for place in np.ndindex(2, 3):
            cell, kept = (maps[(slice(None), *place)] for maps in (given[number], found[row]))
            likeliest = sorted(range(9), key=lambda k, cell=cell: -float(cell[k]))[:5]
            assert set(kept.nonzero().flatten().tolist()) == set(likeliest)
            assert [float(kept[k]) for k in likeliest] == [float(np.float16(cell[k])) for k in likeliest]


def test_a_cell_takes_four_bytes_a_class_and_six_where_classes_are_many() -> None:
    assert packed(distributions(2, 3, 4, 4)).nbytes == 2 * 3 * 16 * 4
    assert packed(distributions(1, 40_000, 1, 2)).nbytes == 5 * 2 * 6
    assert row_type(32_768)["class"] == np.int16
    many = torch.zeros(1, 40_000, 1, 1)
    many[0, 39_999] = 1
    assert packed(many)["class"].max() == 39_999


def others(pictures: Pictures) -> Iterator[tuple[Any, str]]:
    yield SubsetRecords(pictures, range(5)), "has maps of 6 images, expected 5: noise"
    renamed = ArrayRecords("noise", pictures.levels.numpy(), pictures.labels.tolist(), ["kind 0", "kind 1", "wombat"])
    yield renamed, r"has maps of other classes \(kind 2 and wombat\) than noise"
    turned = ArrayRecords("noise", pictures.levels.numpy(), pictures.labels.tolist(), pictures.classes[::-1])
    yield turned, "the same in another order"
    yield Pictures(6, shift=1), "has maps of other images .*make maps of these images with `deit-models label-maps`"


@pytest.mark.parametrize("number", range(4))
def test_maps_of_other_images_or_classes_are_refused_by_name(tmp_path: Path, number: int) -> None:
    pictures = Pictures(6)
    folder = write_maps(tmp_path / "maps", pictures, distributions(6, 3, 2, 2))
    records, text = list(others(pictures))[number]
    with pytest.raises(DataError, match=text) as caught:
        LabelMaps(folder, records)
    assert str(folder) in str(caught.value)


def test_folders_without_whole_maps_are_refused(tmp_path: Path) -> None:
    pictures = Pictures(6)
    with pytest.raises(ConfigError, match=r"holds no label maps .*`deit-models label-maps` makes them"):
        LabelMaps(tmp_path, pictures)
    with pytest.raises(ConfigError, match=r"maps.npy does not fit about.json"):
        LabelMaps(write_maps(tmp_path / "grid", pictures, distributions(6, 3, 2, 2), grid=[4, 2]), pictures)
    folder = write_maps(tmp_path / "cut", pictures, distributions(6, 3, 2, 2))
    content = (folder / "maps.npy").read_bytes()
    (folder / "maps.npy").write_bytes(content[:-5])
    with pytest.raises(ConfigError, match="holds no label maps"):
        LabelMaps(folder, pictures)
    (folder / "maps.npy").write_bytes(content)
    (folder / "about.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no label maps"):
        LabelMaps(folder, pictures)


# The cut


def box(*sides: float, mirrored: bool = False) -> Tensor:
    return torch.tensor([[*sides, float(mirrored)]])


@pytest.mark.parametrize("mirrored", [False, True])
def test_crop_of_whole_cells_is_these_cells(mirrored: bool) -> None:
    maps = distributions(1, 4, 6, 8)
    top, left, height, width = 1, 3, 4, 5
    found = cut_maps(maps, box(top / 6, left / 8, (top + height) / 6, (left + width) / 8, mirrored=mirrored), (4, 5))
    for row in range(height):
        for column in range(width):
            place = width - 1 - column if mirrored else column
            expected = maps[0, :, top + row, left + place]
            torch.testing.assert_close(found[0, row * width + column], expected, atol=1e-6, rtol=0)


def test_patch_over_several_cells_has_their_mean_and_one_between_two_the_middle() -> None:
    maps = distributions(1, 4, 4, 4)
    whole = cut_maps(maps, box(0, 0, 1, 1), (2, 2))
    quarters = [maps[0, :, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2)]
    expected = torch.stack([quarter.mean((1, 2)) for quarter in quarters])
    torch.testing.assert_close(whole[0], expected, atol=1e-6, rtol=0)
    between = cut_maps(maps, box(0, 1 / 8, 1 / 4, 3 / 8), (1, 1))
    torch.testing.assert_close(between[0, 0], (maps[0, :, 0, 0] + maps[0, :, 0, 1]) / 2, atol=1e-6, rtol=0)


def test_outside_of_the_image_there_is_no_label() -> None:
    maps = distributions(1, 4, 8, 8)
    # a cell and a half above, two cells beside the image
    found = cut_maps(maps, box(-1.5 / 8, 2 / 8, 6.5 / 8, 10 / 8), (8, 8))[0].unflatten(0, (8, 8))
    inside = found.sum(dim=2)
    rows = torch.tensor([0, 0.5, 1, 1, 1, 1, 1, 1])
    columns = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0])
    torch.testing.assert_close(inside, rows[:, None] * columns)
    mirrored = cut_maps(maps, box(-1.5 / 8, 2 / 8, 6.5 / 8, 10 / 8, mirrored=True), (8, 8))[0].unflatten(0, (8, 8))
    assert torch.equal(mirrored, found.flip(1))


def test_what_the_top_classes_leave_is_shared_by_them_and_images_without_labels_keep_zeros() -> None:
    maps = torch.zeros(2, 3, 2, 2)
    maps[0, :2] = torch.tensor([0.6, 0.2])[:, None, None]
    found = cut_maps(maps, box(0, 0, 1, 1).repeat(2, 1), (2, 2))
    torch.testing.assert_close(found[0, 3], torch.tensor([0.75, 0.25, 0]))
    assert not found[1].any()


# The same crop as the image's


class Ramps(ArrayRecords):
    """Images whose red grows with the column and whose green with the row."""

    def __init__(self, height: int, width: int) -> None:
        red = np.broadcast_to(np.linspace(0, 255, width)[None, :], (height, width))
        green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
        pixels = np.stack([red, green, red], axis=-1).round().astype(np.uint8)
        super().__init__("ramps", np.stack([pixels] * 4), [0] * 4, ["a"])


@pytest.mark.parametrize("crop", ["random_resized", "pad", "simple", "none"])
@pytest.mark.parametrize("size", [(48, 80), (32, 32)], ids=str)
def test_place_of_a_sample_is_where_its_pixels_come_from(crop: Any, size: tuple[int, int]) -> None:
    spec = Preprocessing(resize=36, crop=(32, 32))
    recipe = Recipe(crop=crop, augment="none", color_jitter=0, erase=0.5, crop_scale=0.3)
    samples = TrainingSamples(Ramps(*size), TrainTransform(recipe, spec, (32, 32)), located=True)
    flips = set()
    for seed in range(40):
        levels, _, _, place = samples[seed % 4, seed]
        number, top, left, bottom, right, mirrored = place.tolist()
        assert number == seed % 4
        flips.add(mirrored)
        centre = levels.values[:, 12:20, 12:20].float().mean((1, 2))  # inside the image for every crop here
        column, row = (left + right) / 2, (top + bottom) / 2
        # 32 pixels on a ramp that begins and ends at the middle of a pixel
        for value, where, side in ((centre[0], column, size[1]), (centre[1], row, size[0])):
            assert float(value) == pytest.approx(255 * (where * side - 0.5) / (side - 1), abs=4)
        slope = float((levels.values[0, 12:20, 20].float() - levels.values[0, 12:20, 12].float()).mean())
        expected = 255 * (right - left) * 8 / 32 * (-1 if mirrored else 1)
        assert slope == pytest.approx(expected, abs=5)
    assert flips == {0.0, 1.0}


def test_images_cut_at_once_have_the_places_of_single_ones() -> None:
    spec = Preprocessing(resize=8, crop=(8, 8))
    pictures = Pictures(6, broken=(2,))
    cached = keep_in_memory(pictures, "ram", workers=0)
    for changes in ({}, {"augment": "rand-m9-mstd0.5-inc1"}):
        transform = TrainTransform(Recipe(crop="pad", color_jitter=0, **{"augment": "none", **changes}), spec, (8, 8))
        keys = [(index, 100 + index) for index in range(6)]
        alone = TrainingSamples(pictures, transform, located=True).batch(keys)
        together = TrainingSamples(cached, transform, located=True).batch(keys)
        planned = TrainingSamples(cached, transform, located=True, planned=not changes).batch(keys)
        assert alone[3].shape == (6, 6)
        assert torch.equal(alone[3], together[3])
        assert torch.equal(alone[3], planned[3])
        assert torch.equal(alone[0].values, together[0].values)
        assert alone[3][2, 0] == 3  # the next image, in the place of the broken one
        assert len(TrainingSamples(cached, transform).batch(keys)) == 3


def test_images_that_draw_while_they_are_read_have_the_right_place() -> None:
    class Draws(Ramps):
        def __getitem__(self, index: int) -> tuple[PIL.Image.Image, Any]:
            torch.rand(3)
            return super().__getitem__(index)

    spec = Preprocessing(resize=8, crop=(8, 8))
    transform = TrainTransform(Recipe(crop="random_resized", augment="none"), spec, (8, 8))
    place = TrainingSamples(Draws(20, 20), transform, located=True)[0, 5][3]
    assert place[1:].tolist() != list(transform.seen(20, 20, sample_rng(5)))
    torch.manual_seed(5)
    torch.rand(3)
    assert place[1:].tolist() == list(transform.seen(20, 20, drawn_rng()))


# Targets


class Given:
    """Maps that are cut already."""

    def __init__(self, patches: Tensor) -> None:
        self.patches = patches

    def cut(self, places: Tensor, grid: tuple[int, int], device: torch.device) -> Tensor:  # noqa: ARG002
        return self.patches[places[:, 0].long()].clone()


OFF: dict[str, Any] = {"mixup": 0, "cutmix": 0, "token_labels": 0.5}


def mixing(patches: Tensor, tokens: tuple[int, int] = (4, 4), **fields: Any) -> Mixing:
    side = round(patches.shape[1] ** 0.5)
    labels = TokenLabels(Given(patches), tokens=tokens, patches=(side, side))  # type: ignore[arg-type]
    return Mixing(Recipe(**{**OFF, **fields}), patches.shape[2], tokens=labels)


def patch_targets(images: int, patches: int, classes: int) -> Tensor:
    return distributions(images * patches, classes).view(images, patches, classes)


PLACES = torch.arange(4.0)[:, None].repeat(1, 6)
LABELS = torch.tensor([0, 1, 2, 0])


def test_class_target_is_the_mean_of_the_map_or_the_label() -> None:
    patches = patch_targets(4, 16, 3)
    patches[0, :4] = 0  # outside of the image
    images = torch.randn(4, 3, 8, 8)
    _, found = mixing(patches, label_smoothing=0)(images, LABELS, PLACES)
    assert torch.equal(found.patches, patches)
    torch.testing.assert_close(found.labels[0], patches[0, 4:].mean(dim=0))
    torch.testing.assert_close(found.labels[1], patches[1].mean(dim=0))
    assert found.exchanged is None
    _, found = mixing(patches, label_smoothing=0, class_target="label")(images, LABELS, PLACES)
    assert found.labels.argmax(dim=1).tolist() == LABELS.tolist()


def test_smoothing_spreads_a_part_of_what_there_is() -> None:
    patches = patch_targets(4, 16, 3)
    patches[0, 0] *= 0.25
    _, found = mixing(patches, label_smoothing=0.3)(torch.randn(4, 3, 8, 8), LABELS, PLACES)
    torch.testing.assert_close(found.patches[0, 0], 0.7 * patches[0, 0] + 0.25 * 0.1)
    torch.testing.assert_close(found.patches[2, 5], 0.7 * patches[2, 5] + 0.1)
    torch.testing.assert_close(found.labels[2], 0.7 * patches[2].mean(dim=0) + 0.1)


def test_mixtoken_leaves_images_and_gives_each_patch_the_label_of_its_token() -> None:
    patches, images = patch_targets(4, 16, 3), torch.randn(4, 3, 8, 8)
    mixes = mixing(patches, mix_token=True, label_smoothing=0)
    areas = set()
    for seed in range(30):
        torch.manual_seed(seed)
        mixed, found = mixes(images.clone(), LABELS, PLACES)
        assert torch.equal(mixed, images)
        taken = found.exchanged.view(4, 4)
        inside = taken.nonzero()
        if len(inside):  # a box
            (top, left), (bottom, right) = inside.amin(0).tolist(), inside.amax(0).tolist()
            assert taken.sum() == (bottom - top + 1) * (right - left + 1)
        areas.add(int(taken.sum()))
        for image in range(4):
            for place in range(16):
                origin = 3 - image if found.exchanged[place] else image
                torch.testing.assert_close(found.patches[image, place], patches[origin, place])
            share = float(taken.float().mean())
            expected = (1 - share) * patches[image].mean(0) + share * patches[3 - image].mean(0)
            torch.testing.assert_close(found.labels[image], expected)
    assert len(areas) == 3  # sides of 0 or 2 tokens, some of them clipped


def test_mixtoken_of_a_finer_grid_gives_a_patch_labels_by_area() -> None:
    patches = patch_targets(4, 4, 3)
    mix = Mix(1 - 6 / 16, (0, 3, 1, 3))  # rows 0 to 2, columns 1 and 2
    labels, mixed = mixed_targets([patches.mean(1), patches], mix, (4, 4), (2, 2))
    for place, share in enumerate([2 / 4, 2 / 4, 1 / 4, 1 / 4]):
        torch.testing.assert_close(mixed[0, place], (1 - share) * patches[0, place] + share * patches[3, place])
    torch.testing.assert_close(labels[1], (10 * patches[1].mean(0) + 6 * patches[2].mean(0)) / 16)


@pytest.mark.parametrize("way", ["mixup", "cutmix"])
def test_labels_of_patches_follow_mixed_pixels(way: str) -> None:
    """Images are their patches' labels, so that what the pixels become can be read off."""
    labels = distributions(4 * 16, 3).view(4, 4, 4, 3)
    images = labels.permute(0, 3, 1, 2).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).contiguous()
    mixes = mixing(labels.flatten(1, 2), label_smoothing=0, **{way: 1.0})
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, found = mixes(images.clone(), LABELS, PLACES)
        expected = torch.nn.functional.avg_pool2d(mixed, 2).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found.patches, expected)
        torch.testing.assert_close(found.labels.sum(dim=1), torch.ones(4))
        assert found.exchanged is None


def test_mix_size_draws_for_groups_and_mix_prob_leaves_batches_alone() -> None:
    patches = patch_targets(4, 16, 3)
    torch.manual_seed(0)
    _, found = mixing(patches, mixup=1.0, mix_size=2, label_smoothing=0)(torch.randn(4, 3, 8, 8), LABELS, PLACES)
    both = torch.stack([patches[0], patches[1]])
    share = ((found.patches[0] - both[1]) / (both[0] - both[1])).mean()
    torch.testing.assert_close(found.patches[0], share * both[0] + (1 - share) * both[1], atol=1e-4, rtol=0)
    _, found = mixing(patches, mix_token=True, mix_prob=0.0, label_smoothing=0)(torch.randn(4, 3, 8, 8), LABELS, PLACES)
    assert found.exchanged is None
    assert torch.equal(found.patches, patches)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"token_labels": 0, "mix_token": True}, "mix_token mixes labels of patches; pass token_labels above 0"),
        ({"mix_token": True, "mixup": 0.8}, "mix_token takes the place of mixup, cutmix and mix_size"),
        ({"mix_token": True, "mix_size": 4}, "mix_token takes the place of mixup, cutmix and mix_size"),
        ({"mix_token": True, "distillation": "hard"}, "mix_token mixes no images that a teacher could see"),
        ({"loss": "bce", "label_smoothing": 0}, "token_labels are probabilities, which loss='bce'"),
        ({"cosub": True}, "cosub has a loss of its own, without token_labels"),
        ({"mix_mode": "patch"}, "token_labels have a loss of their own; pass mix_mode='batch'"),
        ({"patch_drop_rate": 0.5}, "token_labels need every patch"),
        ({"train_mode": False}, "token_labels train in training mode"),
        ({"token_labels": -0.5}, "token_labels=-0.5; expected 0 or more"),
        ({"class_target": "mean"}, "class_target='mean'; expected one of map, label"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Recipe(**{**OFF, **changes})


def test_several_labels_an_image_are_refused() -> None:
    with pytest.raises(ConfigError, match="token_labels are of one class for each image"):
        Recipe(**OFF).for_several_labels()
