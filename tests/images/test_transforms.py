"""The evaluation transform to the last bit, and its faster form to the last level."""

import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms.v2 import functional as TF
from tracing import calls_of

from deit_models import create_model
from deit_models.checkpoint import Preprocessing
from deit_models.errors import ConfigError, ImageError
from deit_models.images.decoding import decode_reduced
from deit_models.images.transforms import EvalInput, EvalTransform, seen_box, transform_for
from deit_models.models.deit import DeiT, DeiTConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet_sample"


def gradient(width: int = 60, height: int = 40) -> PIL.Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL.Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def authors_transform(size: int) -> Compose:
    """What the authors evaluate with, from torchvision's own classes."""
    resize = Resize(int(size / 0.875), interpolation=InterpolationMode.BICUBIC)
    return Compose([resize, CenterCrop(size), ToTensor(), Normalize(MEAN, STD)])


@pytest.mark.parametrize("width_height", [(500, 333), (333, 500), (256, 256), (90, 400), (224, 20)])
def test_eval_transform_is_the_authors_bit_for_bit(width_height: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*width_height[::-1], 3), dtype=np.uint8)
    image = PIL.Image.fromarray(noise)
    ours = EvalTransform(Preprocessing(resize=256, crop=(224, 224)))(image)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, authors_transform(224)(image))


def test_eval_transform_of_a_photo_is_the_authors_bit_for_bit() -> None:
    image = PIL.Image.fromarray(pytest.importorskip("skimage.data").chelsea())
    assert torch.equal(EvalTransform(Preprocessing(resize=438, crop=(384, 384)))(image), authors_transform(384)(image))


def test_eval_transform_of_imagenet_photos_is_the_authors_bit_for_bit() -> None:
    photos = sorted(PHOTOS.glob("*.JPEG"))[:5]
    if not photos:
        pytest.skip("no ../shared/data/imagenet_sample beside this checkout")
    transform = transform_for(create_model("deit_tiny_patch16_224", device="meta"))
    for photo in photos:
        assert torch.equal(transform(photo), authors_transform(224)(PIL.Image.open(photo).convert("RGB"))), photo.name


def photo(width: int, height: int, **options: object) -> bytes:
    """A JPEG with fine and coarse detail."""
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.resize((width, height), PIL.Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("resize", [256, (256, 256), (240, 280)])
@pytest.mark.parametrize("width_height", [(500, 375), (375, 500), (2063, 1537), (1537, 2063)])
def test_fast_pixels_are_nearly_the_same(width_height: tuple[int, int], resize: int | tuple[int, int]) -> None:
    spec = Preprocessing(resize=resize, crop=(224, 224))
    data = photo(*width_height)
    ours = EvalTransform(spec, fast_pixels=True).levels(data).int()
    difference = (ours - EvalTransform(spec).levels(data).int()).abs()
    assert ours.shape == (3, 224, 224)
    assert difference.max() <= 3
    assert difference.float().mean() < 0.2, "the picture lies aside"


def test_fast_pixels_decode_a_large_jpeg_smaller_and_an_exact_transform_does_not() -> None:
    spec, data = Preprocessing(resize=32, crop=(32, 32)), photo(640, 512)
    for fast in (False, True):
        assert calls_of(decode_reduced, lambda fast=fast: EvalTransform(spec, fast_pixels=fast)(data)) == fast
    reduced = decode_reduced(data, side=2 * 32)
    assert reduced.image.size == (80, 64), "twice the side to resize to is left"
    expected = reduced.image.resize((40, 32), PIL.Image.Resampling.BICUBIC, reduced.box).crop((4, 0, 36, 32))
    found = EvalTransform(spec, fast_pixels=True).levels(data)
    assert torch.equal(found, TF.pil_to_tensor(expected))


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize("form", ["file", "image", "array"])
def test_fast_pixels_take_every_interpolation_and_form(interpolation: str, form: str) -> None:
    spec = Preprocessing(resize=64, crop=(64, 64), interpolation=interpolation)
    data = photo(640, 512)
    image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    given = {"file": data, "image": image, "array": np.asarray(image)}[form]
    ours = EvalTransform(spec, fast_pixels=True).levels(given).int()
    tolerance = 0.5 if interpolation != "nearest" else 8
    assert (ours - EvalTransform(spec).levels(given).int()).abs().float().mean() < tolerance


def test_a_batch_is_normalised_to_the_same_bits_as_each_image() -> None:
    transform = EvalTransform(Preprocessing(resize=256, crop=(224, 224)))
    images = [gradient(300, 280), gradient(260, 400)]
    levels = torch.stack([transform.levels(image) for image in images])
    assert levels.dtype == torch.uint8
    before = levels.clone()
    assert torch.equal(transform.to_input(levels), torch.stack([transform(image) for image in images]))
    assert torch.equal(levels, before)


@pytest.mark.parametrize("width_height", [(300, 200), (200, 300)])
def test_non_square_crops_equal_torchvisions(width_height: tuple[int, int]) -> None:
    image = gradient(*width_height)
    reference = Compose(
        [Resize(150, interpolation=InterpolationMode.BICUBIC), CenterCrop((96, 144)), ToTensor(), Normalize(MEAN, STD)]
    )
    ours = EvalTransform(Preprocessing(resize=150, crop=(96, 144)))(image)
    assert ours.shape == (3, 96, 144)
    assert torch.equal(ours, reference(image))


def test_exact_resize_gives_up_the_aspect() -> None:
    transform = EvalTransform(Preprocessing(resize=(64, 64), crop=(64, 64)))
    reference = Compose([Resize((64, 64), interpolation=InterpolationMode.BICUBIC), ToTensor(), Normalize(MEAN, STD)])
    assert torch.equal(transform(gradient(200, 50)), reference(gradient(200, 50)))


def test_unknown_interpolation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'cubic'.*bicubic"):
        EvalTransform(Preprocessing(resize=256, crop=(224, 224), interpolation="cubic"))


@pytest.mark.parametrize("std", [(0.2, 0.0, 0.2), (0.2, 0.2)])
def test_a_deviation_that_cannot_be_is_refused(std: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"std=\(0.2, .*expected one each a channel, no 0"):
        EvalTransform(Preprocessing(resize=256, crop=(224, 224), mean=MEAN, std=std))


def test_eval_transform_says_what_it_does_and_can_be_pickled() -> None:
    transform = EvalTransform(Preprocessing(resize=256, crop=(224, 224)))
    assert "shorter side to 256 (bicubic), centre crop 224x224" in repr(transform)
    assert "to 64x32" in repr(EvalTransform(Preprocessing(resize=(64, 32), crop=(32, 32))))
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(again(gradient()), transform(gradient()))


@pytest.mark.parametrize(
    ("name", "overrides", "resize", "crop"),
    [
        ("deit_small_patch16_224", {}, 256, (224, 224)),
        ("deit_base_patch16_384", {}, 438, (384, 384)),
        ("deit_base_distilled_patch16_384", {}, 438, (384, 384)),
        ("deit_tiny_patch16_224", {"img_size": 384}, 438, (384, 384)),
        ("deit_tiny_patch16_224", {"img_size": (224, 448)}, 512, (224, 448)),
        ("deit_micro_patch4_32", {}, 32, (32, 32)),
    ],
)
def test_transform_for_follows_the_authors_sizes(
    name: str, overrides: dict[str, object], resize: int, crop: tuple[int, int]
) -> None:
    spec = transform_for(create_model(name, device="meta", **overrides)).preprocessing
    assert (spec.resize, spec.crop) == (resize, crop)


@pytest.mark.parametrize(
    ("name", "style", "resize"),
    [
        ("deit_tiny_patch16_224", "timm", 248),
        ("deit_base_patch16_384", "timm", 384),
        ("deit_tiny_patch16_224", "transformers", (256, 256)),
        ("deit_base_patch16_384", "transformers", (438, 438)),
    ],
)
def test_styles_resize_as_their_library_does(name: str, style: str, resize: int | tuple[int, int]) -> None:
    model = create_model(name, device="meta")
    spec = transform_for(model, style=style).preprocessing
    assert spec.resize == resize
    assert replace(spec, resize=transform_for(model).preprocessing.resize) == transform_for(model).preprocessing


def test_unknown_style_is_refused() -> None:
    with pytest.raises(ConfigError, match="style='keras'; expected 'checkpoint'"):
        transform_for(create_model("deit_micro_patch4_32", device="meta"), style="keras")


def test_model_built_by_hand_has_no_transform() -> None:
    with pytest.raises(ConfigError, match="build an EvalTransform by hand"):
        transform_for(DeiT(DeiTConfig(embed_dim=8, depth=1, num_heads=1, img_size=16)))


def test_evaluations_input_has_the_bits_of_its_transform() -> None:
    preprocessing, cpu = Preprocessing(resize=36, crop=(32, 32)), torch.device("cpu")
    transform, pictures = EvalTransform(preprocessing), [gradient(), gradient(40, 90), gradient(32, 32)]
    levels = torch.stack([transform.levels(image) for image in pictures])
    together = EvalInput(preprocessing, cpu)(levels)
    assert torch.equal(together, torch.stack([transform(image) for image in pictures]))
    assert EvalInput(preprocessing, cpu, normalise=False)(levels) is levels


# Other shapes and channel counts


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize(("width", "height", "form"), [(60_000, 1, "PNG"), (1, 9_000, "JPEG"), (1_000_000, 2, "PNG")])
def test_strip_that_would_grow_beyond_memory_is_refused_by_name(
    tmp_path: Path, width: int, height: int, form: str, fast: bool
) -> None:
    transform = EvalTransform(Preprocessing(resize=256, crop=(224, 224)), fast_pixels=fast)
    PIL.Image.new("L", (width, height)).save(tmp_path / "strip", form)
    with pytest.raises(ImageError, match=rf"strip: {width}x{height} pixels, which become \d+x\d+ when resized"):
        transform(tmp_path / "strip")
    assert EvalTransform(Preprocessing(resize=(256, 256), crop=(224, 224)))(tmp_path / "strip").shape == (3, 224, 224)


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
def test_strip_that_would_grow_on_its_way_to_a_small_square_is_refused(fast: bool) -> None:
    transform = EvalTransform(Preprocessing(resize=(64, 64), crop=(32, 32)), fast_pixels=fast)
    with pytest.raises(ImageError, match="which become 64x1000000 when resized"):
        transform(PIL.Image.new("L", (1, 1_000_000)))
    assert transform(PIL.Image.new("L", (1_000_000, 1))).shape == transform(PIL.Image.new("L", (1, 9000))).shape


def test_long_but_sensible_picture_is_read() -> None:
    spec = Preprocessing(resize=36, crop=(32, 32))
    assert EvalTransform(spec)(PIL.Image.new("RGB", (3000, 20), "red")).shape == (3, 32, 32)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_every_channel_is_resized_as_a_grey_picture(channels: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 40, channels), dtype=np.uint8)
    spec = Preprocessing(resize=36, crop=(32, 24)).for_channels(channels)
    found = EvalTransform(spec)(noise)
    grey = EvalTransform(spec.for_channels(1), fast_pixels=True)
    assert torch.equal(found, torch.cat([grey(noise[..., number]) for number in range(channels)]))
    assert torch.equal(found, EvalTransform(spec, fast_pixels=True)(torch.from_numpy(noise).permute(2, 0, 1)))
    with pytest.raises(ConfigError, match=f"takes {channels} channels"):
        EvalTransform(spec)(gradient())


def test_one_channel_takes_every_form_of_image_as_greys(tmp_path: Path) -> None:
    transform = transform_for(create_model("deit_micro_patch4_32", depth=1, in_chans=1, device="meta"))
    gradient().convert("L").save(tmp_path / "grey.png")
    levels = transform.levels(tmp_path / "grey.png")
    assert levels.shape == (1, 32, 32)
    for image in (gradient(), gradient().convert("L"), np.asarray(gradient()), np.asarray(gradient().convert("L"))):
        assert torch.equal(transform.levels(image), levels)
    assert len(transform.preprocessing.mean) == len(transform.preprocessing.std) == 1
    colours = transform_for(create_model("deit_micro_patch4_32", depth=1, device="meta")).preprocessing.mean
    assert transform.preprocessing.mean[0] == pytest.approx(sum(colours) / 3)


@pytest.mark.parametrize("width_height", [(250, 180), (161, 240), (200, 200)])
@pytest.mark.parametrize("rounding", ["even", "down"])
@pytest.mark.parametrize(
    ("resize", "fit"),
    [(72, "squash"), (None, "squash"), ((64, 90), "squash"), ((64, 90), "cover"), ((70, 61), "cover")],
)
def test_the_box_that_is_seen_is_where_the_pixels_come_from(
    width_height: tuple[int, int], rounding: str, resize: int | tuple[int, int] | None, fit: str
) -> None:
    width, height = width_height
    # the level of a pixel says where it lies: its column in red, its row in green
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    picture = np.stack([columns, rows, rows], axis=2)
    spec = Preprocessing(resize=resize, fit=fit, crop=(64, 61), rounding=rounding, interpolation="bilinear")
    levels = EvalTransform(spec).levels(picture).double()
    left, top, right, bottom = seen_box(spec, height, width)
    expected_columns = left + (np.arange(61) + 0.5) * (right - left) / 61 - 0.5
    expected_rows = top + (np.arange(64) + 0.5) * (bottom - top) / 64 - 0.5
    assert np.abs(levels[0, 30].numpy() - expected_columns)[1:-1].max() < 1.1
    assert np.abs(levels[1, :, 30].numpy() - expected_rows)[1:-1].max() < 1.1


@pytest.mark.parametrize("rounding", ["even", "down"])
@pytest.mark.parametrize("width_height", [(20, 31), (50, 20), (21, 64)])
def test_the_box_that_is_seen_reaches_into_the_border_of_a_small_image(
    width_height: tuple[int, int], rounding: str
) -> None:
    width, height = width_height
    spec = Preprocessing(resize=None, crop=(32, 30), rounding=rounding)
    levels = EvalTransform(spec).levels(np.full((height, width, 3), 255, np.uint8))[0]
    left, top, right, bottom = seen_box(spec, height, width)
    assert (right - left, bottom - top) == (30, 32)
    white_columns, white_rows = levels.amax(0).nonzero().flatten(), levels.amax(1).nonzero().flatten()
    assert (white_columns.min(), white_columns.max()) == (max(0, -left), min(30, width - left) - 1)
    assert (white_rows.min(), white_rows.max()) == (max(0, -top), min(32, height - top) - 1)
