"""The training transform: laws of its draws, and the same pictures as timm for the same draws."""

import math
import pickle
import random
from collections import Counter

import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as TF

from deit_models.augmentation.augment import ColorJitter, ThreeAugment, TrainTransform, covering
from deit_models.augmentation.levels import ErasingBox, Levels, TrainInput, paste
from deit_models.augmentation.randaugment import ENHANCE
from deit_models.checkpoint import Preprocessing
from deit_models.data.transforms import EvalInput, EvalTransform
from deit_models.errors import ConfigError
from deit_models.training.recipe import Recipe

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


def kolmogorov(one: list[float], two: list[float]) -> float:
    """Largest distance of two empirical distribution functions."""
    samples = [torch.tensor(values, dtype=torch.float64) for values in (one, two)]
    places = torch.cat(samples)
    shares = [torch.searchsorted(x.sort().values, places, right=True) / len(x) for x in samples]
    return float((shares[0] - shares[1]).abs().max())


def limit(count: int) -> float:
    """What the distance of two samples of `count` from one law passes once in a hundred times."""
    return 1.63 * math.sqrt(2 / count)


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


def test_three_augment_takes_its_operations_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    image, radii = picture(24, 20), []
    real = ImageFilter.GaussianBlur

    def blur(radius: float) -> ImageFilter.GaussianBlur:
        radii.append(radius)
        return real(radius)

    monkeypatch.setattr(ImageFilter, "GaussianBlur", blur)
    grey = image.convert("L").convert("RGB").tobytes()
    solarized = ImageOps.solarize(image, 128).tobytes()
    rng = random.Random(0)
    results = Counter({"grey": 0, "solarized": 0})
    for _ in range(1500):
        before = len(radii)
        result = ThreeAugment()(image, rng).tobytes()
        if len(radii) > before:
            assert result == image.filter(real(radii[-1])).tobytes()
        else:
            results["grey"] += result == grey
            results["solarized"] += result == solarized
    assert sum(results.values()) + len(radii) == 1500
    for count in (*results.values(), len(radii)):
        assert abs(count - 500) < 4 * math.sqrt(1500 * 2 / 9)
    uniform = [0.1 + 1.9 * (k + 0.5) / len(radii) for k in range(len(radii))]
    assert kolmogorov(radii, uniform) < limit(len(radii))


def test_color_jitter_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
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
    drawn: list[float] = []
    monkeypatch.setitem(ENHANCE, "Color", lambda image, factor: drawn.append(factor) or image)
    for _ in range(300):
        ColorJitter(1.5)(image, rng)
    assert kolmogorov(drawn, [2.5 * (k + 0.5) / 300 for k in range(300)]) < limit(300)  # never below 0


def erased(height: int, width: int, *, prob: float = 1.0, count: int = 1, seed: int = 0) -> torch.Tensor:
    """A batch of white images, erased; what is not noise is exactly 1."""
    box, rng = ErasingBox(prob), random.Random(seed)
    white = torch.full((3, height, width), 255, dtype=torch.uint8)
    to_input = TrainInput(Preprocessing(resize=8, crop=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3), torch.device("cpu"))
    return to_input(batch(*(Levels(white, torch.tensor(box(height, width, rng))) for _ in range(count))))


def test_erasing_changes_one_box_to_normal_noise() -> None:
    noise, changed = [], 0
    for image in erased(16, 20, prob=0.25, count=2000):
        hit = image != 1
        assert torch.equal(hit.all(0), hit.any(0))
        if hit.any():
            changed += 1
            rows, columns = hit[0].any(1), hit[0].any(0)
            assert int(hit[0].sum()) == int(rows.sum()) * int(columns.sum())
            assert not rows.all()  # a box as high as the image is drawn again, as in timm
            noise.append(image[hit])
    assert abs(changed - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)
    values = torch.cat(noise)
    expected = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    assert kolmogorov(values.tolist(), expected.tolist()) < limit(len(values))


def test_image_too_small_to_erase_stays() -> None:
    assert torch.equal(erased(1, 1), torch.ones(1, 3, 1, 1))


def test_noise_of_channels_and_images_is_independent() -> None:
    image, other = erased(64, 64, count=2)
    inside = image[:, image[0] != 1]
    correlation = torch.corrcoef(inside) - torch.eye(3)
    assert float(correlation.abs().max()) < 4 / math.sqrt(inside.shape[1])
    assert not torch.equal(inside.flatten()[:50], other[:, other[0] != 1].flatten()[:50])


def test_noise_follows_the_image_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    assert torch.equal(erased(16, 16, count=3)[:2], erased(16, 16, count=2))
    assert torch.equal(torch.get_rng_state(), state)


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
def test_crop_with_pillow_is_timms_picture(
    box: tuple[int, int, int, int], interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transforms = pytest.importorskip("timm.data.transforms", reason="timm is not installed")
    theirs = transforms.RandomResizedCropAndInterpolation((32, 24), interpolation=interpolation)
    monkeypatch.setattr(theirs, "get_params", lambda *_: box)
    crop = build((32, 24), interpolation=interpolation, pillow_resize=True).crop
    monkeypatch.setattr(crop, "draw", lambda *_: box)
    assert crop(picture(), random.Random(0)).tobytes() == theirs(picture()).tobytes()


def test_normalised_values_are_timms() -> None:
    data = pytest.importorskip("timm.data", reason="timm is not installed")
    theirs = data.create_transform(32, is_training=True, no_aug=True, interpolation="bicubic")
    image = picture(32, 32)
    ours = TrainInput(PREPROCESSING, torch.device("cpu"))(batch(Levels(TF.pil_to_tensor(image), torch.zeros(5).long())))
    torch.testing.assert_close(ours[0], theirs(image), rtol=0, atol=1e-6)


def test_evaluations_input_has_the_bits_of_its_transform() -> None:
    transform, pictures = EvalTransform(PREPROCESSING), [picture(), picture(40, 90), picture(32, 32)]
    levels = torch.stack([transform.levels(image) for image in pictures])
    together = EvalInput(PREPROCESSING, torch.device("cpu"))(levels)
    assert torch.equal(together, torch.stack([transform(image) for image in pictures]))
    assert EvalInput(PREPROCESSING, torch.device("cpu"), normalise=False)(levels) is levels


def test_noise_waits_for_no_device() -> None:
    # tensors of the device "meta" have no values: whatever would have to read one back fails
    images, noise = torch.empty(8, 3, 16, 16, device="meta"), torch.empty(2, 3, 16, 16, device="meta")
    paste(noise, images, torch.empty(2, dtype=torch.int64, device="meta"), torch.zeros(2, 5, device="meta").long())


def test_noise_fills_exactly_its_boxes() -> None:
    images, noise = torch.zeros(4, 3, 6, 7), torch.arange(2 * 3 * 6 * 7.0).view(2, 3, 6, 7) + 1
    boxes = [(0, 1, 2, 3), (3, 0, 3, 6)]
    paste(noise, images, torch.tensor([1, 3]), torch.tensor([(*box, 9) for box in boxes]))
    expected = torch.zeros(4, 3, 6, 7)
    for image, source, (top, left, height, width) in zip((1, 3), noise, boxes, strict=True):
        part = (..., slice(top, top + height), slice(left, left + width))
        expected[image][part] = source[part]
    assert torch.equal(images, expected)


def test_erased_boxes_follow_timms_law(monkeypatch: pytest.MonkeyPatch) -> None:
    erasing = pytest.importorskip("timm.data.random_erasing", reason="timm is not installed")
    monkeypatch.setattr(erasing, "_get_pixels", lambda *args, **_: torch.ones(args[2]))
    random.seed(0)
    rng = random.Random(1)
    count, theirs, ours = 3000, [], []
    erase = erasing.RandomErasing(probability=1.0, mode="pixel", device="cpu")
    while len(theirs) < count:
        hit = erase(torch.zeros(1, 40, 56))[0]
        if hit.any():
            rows, columns = hit.any(1).nonzero(), hit.any(0).nonzero()
            theirs.append((int(rows[0]), int(columns[0]), len(rows), len(columns)))
    while len(ours) < count:
        box = ErasingBox.draw(40, 56, rng)
        if box is not None:
            ours.append(box)
    for figure in (lambda b: b[0], lambda b: b[1], lambda b: b[2] * b[3], lambda b: b[2] / b[3]):
        assert kolmogorov([figure(box) for box in ours], [figure(box) for box in theirs]) < limit(count)
