"""The training transform: laws of its draws, and the same pictures as timm for the same draws."""

import math
import pickle
import random
from collections import Counter

import pytest
import torch
from laws import kolmogorov, limit
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as TF

from deit_models.augmentation.augment import ColorJitter, RandomResizedCrop, ThreeAugment, TrainTransform, covering
from deit_models.augmentation.levels import Levels, TrainInput
from deit_models.checkpoint import Preprocessing
from deit_models.errors import ConfigError, ImageError
from deit_models.images.transforms import EvalTransform
from deit_models.recipes.recipe import Recipe

PREPROCESSING = Preprocessing(resize=36, crop=(32, 32))
PLAIN = {"augment": "none", "color_jitter": 0.0, "hflip": 0.0, "erase": 0.0}
CROPS = ["random_resized", "pad", "simple", "none"]


def picture(width: int = 61, height: int = 47) -> Image.Image:
    """Soft colours with sharp edges and all levels, the same every time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 6, 7, generator=generator)
    levels = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0] * 300 - 22
    levels += 25 * torch.randn(3, height, width, generator=generator)
    levels[:, height // 3 : height // 2, width // 4 : width // 2] = 255
    return TF.to_pil_image(levels.clamp(0, 255).to(torch.uint8))


def coordinates(size: int = 32) -> Image.Image:
    """A square image whose red is the column, green the row, and blue 255."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return TF.to_pil_image(torch.stack([column, row, torch.full_like(row, 255)]).to(torch.uint8))


def build(size: tuple[int, int] = (32, 32), *, pillow_resize: bool = False, **changes: object) -> TrainTransform:
    recipe = Recipe(**{**PLAIN, **changes})  # type: ignore[arg-type]
    transform = TrainTransform(recipe, PREPROCESSING, size)
    if pillow_resize:
        transform.crop.resize.pillow = True
    return transform


def batch(*images: Levels) -> Levels:
    return Levels(*(torch.stack(parts) for parts in zip(*images, strict=True)))


def model_input(transform: TrainTransform, image: Image.Image) -> torch.Tensor:
    return TrainInput(PREPROCESSING, torch.device("cpu"))(batch(transform(image)))[0]


def levels(image: Image.Image) -> torch.Tensor:
    return TF.pil_to_tensor(image).int()


# The whole


@pytest.mark.parametrize("augmentation", ["rand-m9-mstd0.5-inc1", "3-augment", "none"])
@pytest.mark.parametrize("crop", CROPS)
def test_any_image_becomes_a_float_tensor_of_the_size(crop: str, augmentation: str) -> None:
    transform = build((32, 24), crop=crop, augment=augmentation, color_jitter=0.3, hflip=0.5, erase=1.0)
    for width, height in ((61, 47), (1, 1), (1, 40), (40, 1), (3, 2), (24, 32)):
        image = picture(width, height)
        before = image.tobytes()
        drawn = transform(image)
        assert drawn.values.shape == (3, 32, 24)
        assert drawn.values.dtype == torch.uint8
        tensor = model_input(transform, image)
        assert tensor.shape == (3, 32, 24)
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert bool(tensor.isfinite().all())
        assert image.tobytes() == before


def test_torch_seed_alone_decides() -> None:
    transform = build(augment="rand-m9-mstd0.5-inc1", interpolation="random", hflip=0.5, erase=0.25)
    image, results = picture(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(torch.stack([model_input(transform, image) for _ in range(8)]))
        random.random()
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    state = random.getstate()
    transform(image)
    assert random.getstate() == state


@pytest.mark.parametrize("crop", CROPS)
def test_workers_that_start_afresh_get_the_same_transform(crop: str) -> None:
    transform = build(crop=crop, augment="3-augment", color_jitter=0.3)
    results = []
    for each in (transform, pickle.loads(pickle.dumps(transform))):
        torch.manual_seed(3)
        results.append(each(picture()).values)
    assert torch.equal(*results)


def test_parts_follow_the_recipe() -> None:
    default = TrainTransform(Recipe(), PREPROCESSING, (32, 32))
    assert "rand-m9-mstd0.5" in repr(default)
    assert "jitter" not in repr(default)  # timm drops it beside RandAugment
    assert default.changes[0].fill == (124, 116, 104)  # type: ignore[attr-defined]
    assert [repr(part) for part in build(augment="none", color_jitter=0.3).changes] == ["color jitter 0.3"]
    assert [repr(part) for part in build(augment="3-augment", color_jitter=0.3).changes] == [
        "3-augment",
        "color jitter 0.3",
    ]
    assert build(erase=0.3).erase.prob == 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"augment": "trivial"}, "3-augment"), ({"augment": "rand-m9"}, "inc1"), ({"crop_scale": 1.5}, "at most 1")],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


# Crops


def test_crop_none_is_the_evaluation_transform() -> None:
    for image in (picture(), picture(40, 90)):
        # The offset is multiplied out: equal but for rounding
        torch.testing.assert_close(
            model_input(build(crop="none"), image), EvalTransform(PREPROCESSING)(image), rtol=0, atol=1e-6
        )
    larger = model_input(build((64, 64), crop="none"), picture())
    torch.testing.assert_close(larger, EvalTransform(PREPROCESSING.at_size((64, 64)))(picture()), rtol=0, atol=1e-6)


def test_padded_crop_takes_every_place_of_the_padded_image() -> None:
    crop, padded, seen = build(crop="pad").crop, torch.zeros(3, 40, 40, dtype=torch.int32), Counter()
    padded[:, 4:36, 4:36] = levels(coordinates())
    rng = random.Random(0)
    for _ in range(1500):
        part = levels(crop(coordinates(), rng))
        # The middle shows where the crop was taken: 4 pixels of padding, 16 of the way in
        left, top = (int(part[k, 16, 16]) - 16 + 4 for k in (0, 1))
        assert torch.equal(part, padded[:, top : top + 32, left : left + 32])
        seen[top, left] += 1
    # 81 places, 18.5 times each: a chi-square of 80 degrees passes 125 once in a thousand times
    assert len(seen) == 81
    assert sum((count - 1500 / 81) ** 2 / (1500 / 81) for count in seen.values()) < 125


def test_simple_crop_mirrors_four_pixels_at_the_border() -> None:
    crop = build(crop="simple").crop
    rng = random.Random(0)
    for _ in range(50):
        part = levels(crop(coordinates(), rng))
        left, top = (int(part[k, 16, 16]) - 16 for k in (0, 1))
        for channel, start in ((0, left), (1, top)):
            places = (torch.arange(32) + start).abs()
            places = torch.where(places > 31, 62 - places, places).int()
            assert torch.equal(part[channel], places.expand(32, 32) if channel == 0 else places[:, None].expand(32, 32))


def test_image_is_resized_to_cover_the_crop() -> None:
    assert covering((32, 32), 47, 61) == (32, 41)
    assert covering((32, 32), 61, 47) == (41, 32)
    assert covering((32, 24), 47, 61) == (32, 41)
    assert covering((24, 32), 61, 47) == (41, 32)
    assert covering((32, 32), 32, 32) == (32, 32)
    assert covering((32, 32), 40, 1) == (1280, 32)


def test_interpolation_is_drawn_for_each_image() -> None:
    crop = build((20, 20), crop="simple", interpolation="random", pillow_resize=True).crop
    image, shape = picture(61, 47), (25, 20)
    bilinear, bicubic = (image.resize(shape, kind) for kind in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    rng = random.Random(0)
    drawn = [crop.resize(image, (20, 25), rng).tobytes() for _ in range(400)]  # type: ignore[attr-defined]
    assert set(drawn) == {bilinear.tobytes(), bicubic.tobytes()}
    assert abs(drawn.count(bilinear.tobytes()) - 200) < 4 * 10  # four standard deviations


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(61, 47), (47, 90), (20, 30)])
def test_torchs_resize_is_pillows_within_two_levels(size: tuple[int, int], interpolation: str) -> None:
    image = picture(*size)
    kind = Image.Resampling[interpolation.upper()]
    # Rows first, as Pillow did before release 13 and torch does
    expected = image.resize((32, image.height), kind).resize((32, 32), kind)
    resized = build(interpolation=interpolation).crop.resize(image, (32, 32), random.Random(0))  # type: ignore[attr-defined]
    difference = (levels(resized) - levels(expected)).abs()
    assert int(difference.max()) <= 2
    assert float((difference > 0).double().mean()) < 0.02


# Flip, 3-Augment, erasing


def test_mirroring_keeps_its_probability() -> None:
    image = coordinates()
    straight = build(crop="none")(image).values
    assert torch.equal(build(crop="none", hflip=1.0)(image).values, straight.flip(2))
    transform = build(crop="none", hflip=0.3)
    torch.manual_seed(0)
    mirrored = sum(not torch.equal(transform(image).values, straight) for _ in range(600))
    assert abs(mirrored - 180) < 4 * math.sqrt(600 * 0.3 * 0.7)


class Noting(random.Random):
    """Notes what it draws from an interval."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.drawn: list[float] = []

    def uniform(self, a: float, b: float) -> float:
        self.drawn.append(super().uniform(a, b))
        return self.drawn[-1]


def test_three_augment_takes_its_operations_equally_often() -> None:
    image, rng = picture(24, 20), Noting(0)
    radii = rng.drawn
    grey = image.convert("L").convert("RGB").tobytes()
    solarized = ImageOps.solarize(image, 128).tobytes()
    results = Counter({"grey": 0, "solarized": 0})
    for _ in range(1500):
        before = len(radii)
        result = ThreeAugment()(image, rng).tobytes()
        if len(radii) > before:
            assert result == image.filter(ImageFilter.GaussianBlur(radii[-1])).tobytes()
        else:
            results["grey"] += result == grey
            results["solarized"] += result == solarized
    assert sum(results.values()) + len(radii) == 1500
    for count in (*results.values(), len(radii)):
        assert abs(count - 500) < 4 * math.sqrt(1500 * 2 / 9)
    uniform = [0.1 + 1.9 * (k + 0.5) / len(radii) for k in range(len(radii))]
    assert kolmogorov(radii, uniform) < limit(len(radii))


def test_color_jitter_is_torchvisions() -> None:
    image, orders, factors = picture(24, 20), Counter(), []
    names = {"Brightness": TF.adjust_brightness, "Contrast": TF.adjust_contrast, "Color": TF.adjust_saturation}
    rng = random.Random(0)
    for _ in range(1200):
        before = rng.getstate()
        result = ColorJitter(0.3)(image, rng)
        rng.setstate(before)
        order = rng.sample(list(names), 3)
        expected = image
        for name in order:
            factors.append(rng.uniform(0.7, 1.3))
            expected = names[name](expected, factors[-1])
        assert result.tobytes() == expected.tobytes()
        orders[tuple(order)] += 1
    assert len(orders) == 6
    assert all(abs(count - 200) < 4 * math.sqrt(1200 * 5 / 36) for count in orders.values())
    noting = Noting(0)
    for _ in range(100):
        ColorJitter(1.5)(image, noting)
    assert kolmogorov(noting.drawn, [2.5 * (k + 0.5) / 300 for k in range(300)]) < limit(300)  # never below 0


# Beside timm


@pytest.mark.parametrize(("width", "height"), [(500, 375), (60, 200), (300, 40)])
def test_crop_boxes_follow_timms_law(width: int, height: int) -> None:
    transforms = pytest.importorskip("timm.data.transforms", reason="timm is not installed")
    image = Image.new("RGB", (width, height))
    random.seed(0)
    crop, count, rng = build().crop, 4000, random.Random(1)
    ours = [crop.draw(height, width, rng) for _ in range(count)]  # type: ignore[attr-defined]
    theirs = [
        transforms.RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        for _ in range(count)
    ]
    for figure in (lambda b: b[0], lambda b: b[1], lambda b: b[2] * b[3], lambda b: b[2] / b[3]):
        assert kolmogorov([figure(box) for box in ours], [figure(box) for box in theirs]) < limit(count)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000)])
def test_image_no_box_fits_gives_timms_centre(size: tuple[int, int]) -> None:
    transforms = pytest.importorskip("timm.data.transforms", reason="timm is not installed")
    image = Image.new("RGB", size)
    expected = transforms.RandomResizedCropAndInterpolation.get_params(image, (0.9, 1.0), (3 / 4, 4 / 3))
    drawn = build(crop_scale=0.9).crop.draw(*size[::-1], random.Random(0))  # type: ignore[attr-defined]
    assert drawn == expected


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("box", [(3, 5, 40, 50), (0, 0, 47, 61), (10, 7, 20, 33), (1, 30, 45, 12)])
def test_crop_with_pillow_is_timms_picture(box: tuple[int, int, int, int], interpolation: str) -> None:
    transforms = pytest.importorskip("timm.data.transforms", reason="timm is not installed")

    class Theirs(transforms.RandomResizedCropAndInterpolation):
        @staticmethod
        def get_params(*_: object) -> tuple[int, int, int, int]:
            return box

    class Ours(RandomResizedCrop):
        def draw(self, *_: object) -> tuple[int, int, int, int]:
            return box

    resize = build((32, 24), interpolation=interpolation, pillow_resize=True).crop.resize
    crop = Ours((32, 24), 0.08, resize)
    expected = Theirs((32, 24), interpolation=interpolation)(picture())
    assert crop(picture(), random.Random(0)).tobytes() == expected.tobytes()


def test_normalised_values_are_timms() -> None:
    data = pytest.importorskip("timm.data", reason="timm is not installed")
    theirs = data.create_transform(32, is_training=True, no_aug=True, interpolation="bicubic")
    image = picture(32, 32)
    ours = TrainInput(PREPROCESSING, torch.device("cpu"))(batch(Levels(TF.pil_to_tensor(image), torch.zeros(5).long())))
    torch.testing.assert_close(ours[0], theirs(image), rtol=0, atol=1e-6)


# Other channel counts


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("crop", CROPS)
def test_every_channel_is_changed_alike(channels: int, crop: str) -> None:
    changes = {"augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "hflip": 0.5, "erase": 1.0, "crop": crop}
    recipe, spec = Recipe(**{**PLAIN, **changes}), PREPROCESSING.for_channels(channels)  # type: ignore[arg-type]
    grey = TF.pil_to_tensor(picture().convert("L"))
    for seed in range(8):
        found = TrainTransform(recipe, spec, (32, 32))(grey.expand(channels, -1, -1), random.Random(seed))
        alone = TrainTransform(recipe, spec.for_channels(1), (32, 32))(picture().convert("L"), random.Random(seed))
        assert torch.equal(found.values, alone.values.expand(channels, -1, -1))
        assert TrainInput(spec, torch.device("cpu"))(batch(found, found)).shape == (2, channels, 32, 32)


def test_transparent_tensor_is_trained_on_as_colours() -> None:
    image = TF.pil_to_tensor(picture())
    opaque = torch.cat([image, torch.full_like(image[:1], 255)])
    assert torch.equal(build()(opaque, random.Random(0)).values, build()(picture(), random.Random(0)).values)


@pytest.mark.parametrize("crop", ["pad", "simple", "none"])
def test_strip_is_refused_before_it_is_resized(crop: str) -> None:
    with pytest.raises(ImageError, match="image: 2000000x1 pixels, which become"):
        build(crop=crop)(Image.new("RGB", (2_000_000, 1)))
    assert build(crop="random_resized")(Image.new("RGB", (2_000_000, 1))).values.shape == (3, 32, 32)
