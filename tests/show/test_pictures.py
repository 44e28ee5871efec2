"""Pictures show the crop that the model gets, and colours whose lightness follows the heat."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_models import photo, refusal

from deit_models.checkpoint import Preprocessing
from deit_models.errors import ConfigError, ImageError
from deit_models.images.transforms import EvalTransform
from deit_models.predict import Prediction
from deit_models.show.pictures import (
    LEAST_SIDE,
    MOST_SIDE,
    MapRow,
    _drawable,
    coloured,
    explanation,
    overlay,
    view,
    with_groups,
)


def transform(**changes: object) -> EvalTransform:
    return EvalTransform(Preprocessing(**{"resize": 256, "crop": (224, 224), **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize("width_height", [(600, 400), (300, 900), (37, 30)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"resize": 32, "crop": (32, 32)}, {"resize": (300, 260), "fit": "cover"}, {"resize": None, "crop": (64, 48)}],
)
def test_view_is_the_crop_of_the_model(width_height: tuple[int, int], changes: dict[str, object]) -> None:
    picture, seen = photo(*width_height), transform(**changes)
    shown = view(seen, picture)
    height, width = seen.preprocessing.crop
    assert LEAST_SIDE <= max(shown.size) <= MOST_SIDE
    assert shown.width / shown.height == pytest.approx(width / height, rel=0.02)
    again = np.asarray(shown.resize((width, height), PIL.Image.Resampling.BICUBIC), dtype=float)
    levels = seen.levels(picture).permute(1, 2, 0).numpy().astype(float)
    assert levels.std() > 20
    assert np.abs(again - levels)[1:-1, 1:-1].mean() < 6
    assert np.corrcoef(again.flatten(), levels.flatten())[0, 1] > 0.98


def test_view_keeps_the_aspect_that_a_model_gives_up() -> None:
    shown = view(transform(resize=(224, 224), fit="squash"), photo(800, 400))
    assert shown.size == (800, 400)


def test_view_in_grey_of_a_model_of_one_channel_and_refuses_others() -> None:
    grey = view(transform(mean=(0.5,), std=(0.5,)), photo(300, 300))
    assert grey.mode == "RGB"
    assert grey.getpixel((5, 5)) == (grey.getpixel((5, 5))[0],) * 3
    many = transform(mean=(0.5,) * 5, std=(0.5,) * 5)
    assert "5 channels" in refusal(ConfigError, lambda: view(many, torch.zeros(5, 8, 8)))
    assert "no.jpg" in refusal(ImageError, lambda: view(transform(), "no.jpg"))


def lightness(colour: torch.Tensor) -> float:
    """CIE L* of an sRGB colour with levels up to 255."""
    linear = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in (colour.double() / 255).tolist()]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_equal_steps_of_heat_are_equal_steps_of_lightness() -> None:
    colours = coloured(torch.linspace(0, 1, 33)[None])[:, 0].T
    steps = np.diff([lightness(colour) for colour in colours])
    assert steps.min() > 1.5
    assert steps.max() < 4.5
    assert np.diff([lightness(colour) for colour in colours[::4]]).std() < 0.5


def test_overlay_is_hot_where_the_map_is() -> None:
    heat = torch.zeros(4, 4)
    heat[0, 3] = 1.0
    grey = PIL.Image.new("RGB", (80, 60), (100, 100, 100))
    shown = np.asarray(overlay(grey, heat)).astype(int)
    assert shown.shape == (60, 80, 3)
    assert np.unravel_index(shown.sum(2).argmax(), (60, 80)) == (0, 79) or shown[0, 79].sum() == shown.sum(2).max()
    assert tuple(shown[0, 79]) == tuple((100 + c) // 2 for c in (255, 245, 109))
    assert tuple(shown[59, 0]) == tuple((100 + c) // 2 for c in (22, 0, 62))
    assert np.array_equal(np.asarray(overlay(grey, heat, strength=0)), np.asarray(grey))


@pytest.mark.parametrize(
    "heat", [torch.zeros(1, 4, 4), torch.zeros(0, 4), torch.full((4, 4), 1.1), torch.full((2, 2), torch.nan)]
)
def test_overlay_refuses_what_is_no_map(heat: torch.Tensor) -> None:
    assert "expected (H, W)" in refusal(ConfigError, lambda: overlay(photo(8, 8), heat))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "half"])
def test_overlay_refuses_a_strength_that_is_no_share(strength: float) -> None:
    message = refusal(ConfigError, lambda: overlay(photo(8, 8), torch.zeros(2, 2), strength=strength))
    assert "strength=" in message


def test_patches_of_one_token_have_one_colour_and_lines_between_tokens() -> None:
    grey = PIL.Image.new("RGB", (60, 40), (100, 100, 100))
    shown = np.asarray(with_groups(grey, torch.tensor([[0, 0, 1], [2, 3, 1]]))).astype(int)
    centres = {(row, column): tuple(shown[10 + 20 * row, 10 + 20 * column]) for row in range(2) for column in range(3)}
    assert centres[0, 0] == centres[0, 1] != centres[0, 2] == centres[1, 2]
    assert centres[1, 0] == centres[1, 1] == (100, 100, 100)
    white = (shown == 255).all(2)
    assert white[10].nonzero()[0].tolist() == [39, 40, 41]  # none between the two patches of one token
    assert white[30].nonzero()[0].tolist() == [19, 20, 21, 39, 40, 41]
    assert not white[20, 50]


# Explanations


def predictions(*labels: str) -> list[Prediction]:
    return [Prediction(label, 0.5 / 2**i, i) for i, label in enumerate(labels)]


def drawn(*labels: str, rows: int = 1, size: tuple[int, int] = (300, 300), **changes: Any) -> np.ndarray:
    picture = PIL.Image.new("RGB", size, (0, 90, 0))
    some = [
        MapRow(f"row {number}", overlay(picture, torch.linspace(0, 1, 64).view(8, 8)), **changes)
        for number in range(rows)
    ]
    return np.asarray(explanation(picture, some, predictions(*labels), title="a title")).astype(int)


def test_an_explanation_has_the_photograph_in_each_row_and_a_bar_a_class() -> None:
    page = drawn("cat", "dog", rows=2, target=1)
    photograph = (page == (0, 90, 0)).all(2)
    assert (photograph.sum(1) == 300).sum() == 2 * 300
    # a plain bar of a half and a marked bar of a quarter of 360 pixels, in two rows
    plain, marked = ((page == colour).all(2).sum(1) for colour in ((110, 128, 150), (176, 0, 102)))
    assert sorted(set(plain)) == [0, 180]
    assert (plain == 180).sum() == (marked >= 90).sum() == 2 * 11


@pytest.mark.parametrize("size", [(300, 40), (40, 300), (2000, 1000)])
def test_an_explanation_of_a_picture_of_any_shape_keeps_its_aspect(size: tuple[int, int]) -> None:
    photograph = (drawn("cat", "dog", "elk", "fox", "gnu", size=size) == (0, 90, 0)).all(2)
    width, height = photograph.any(0).sum(), photograph.any(1).sum()
    assert max(width, height) == 300
    assert width / height == pytest.approx(size[0] / size[1], rel=0.05)


def test_labels_in_other_letters_are_told_apart_by_number() -> None:
    assert _drawable("Kätzchen") == "Katzchen"
    assert _drawable("猫\n") == "?\\n"
    assert not np.array_equal(drawn("猫", "犬"), drawn("犬"))
    with_number, without = drawn("x", "猫"), drawn("x", "?")
    assert (with_number < 100).all(2).sum() > (without < 100).all(2).sum()
    drawn("a label that is much too long for the place that it has, " * 9, "")
