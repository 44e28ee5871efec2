"""The manifest: what is refused and how, where it is found, and preprocessing at other sizes."""

from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from deit_models import ConfigError, ManifestError
from deit_models.checkpoint import (
    Origin,
    Preprocessing,
    Source,
    _weights_of,
    find_repo,
    load_manifest,
    parse_manifest,
    weights_dir,
)

GOOD = """
schema = 1
[model.toy]
family = "deit"
params = 10
macs = 20
input_size = 32
num_classes = 2
class_names = ["cat", "dog"]
eval = { resize = 36, crop = [32, 32] }
[[model.toy.source]]
repo = "me/toy"
layout = "timm"
"""


def test_table_becomes_a_frozen_record() -> None:
    toy = parse_manifest(GOOD)["toy"]
    assert (toy.name, toy.family, toy.params, toy.macs) == ("toy", "deit", 10, 20)
    assert toy.class_names == ("cat", "dog")
    assert toy.preprocessing == Preprocessing(resize=36, crop=(32, 32))
    assert toy.sources == (Source(repo="me/toy", layout="timm"),)
    assert toy.sources[0].revision == "main"
    assert toy.top1 is None
    with pytest.raises(AttributeError):
        toy.params = 11


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema = 1", "schema = = 1", "not valid TOML"),
        ("family =", "family = 'deit'\nfamily =", "not valid TOML"),
        ("schema = 1", "schema = 2", "schema 2; this version reads 1"),
        ("schema = 1", "", "schema None; this version reads 1"),
        ("params = 10", "params = 10\nparam = 10", r"model\.toy: .*param"),
        ("params = 10", "", r"model\.toy: .*params"),
        ("eval =", "# eval =", r"model\.toy: .*eval"),
        ("resize = 36", "resise = 36", r"model\.toy: .*resise"),
        ("crop = [32, 32]", "crop = [32, 32], size = 3", r"model\.toy: .*size"),
        ('layout = "timm"', "", r"model\.toy: .*layout"),
        ('layout = "timm"', 'layout = "timm"\nsha = "12"', r"model\.toy: .*sha"),
        ('repo = "me/toy"', 'repo = "me/toy"\nurl = "https://x"', r"model\.toy: a source needs exactly one of"),
        ('repo = "me/toy"', "", r"model\.toy: a source needs exactly one of"),
    ],
)
def test_broken_manifest_is_refused(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ManifestError, match=message):
        parse_manifest(GOOD.replace(old, new))


# Finding it


def test_checkout_has_its_manifest_beside_the_package() -> None:
    assert (weights_dir() / "manifest.toml").is_file()


def test_manifest_inside_the_package_goes_before_one_beside_it(tmp_path: Path) -> None:
    package = tmp_path / "package"
    with pytest.raises(ManifestError, match=r"no weights/manifest\.toml in or beside .*reinstall"):
        _weights_of(package)
    for folder in (tmp_path / "weights", tmp_path / "package" / "weights"):
        folder.mkdir(parents=True)
        (folder / "manifest.toml").touch()
        assert _weights_of(package) == folder


def test_every_shipped_file_is_there() -> None:
    files = [source.file for checkpoint in load_manifest().values() for source in checkpoint.sources if source.file]
    assert [file for file in files if not (weights_dir() / file).is_file()] == []


def test_repository_leads_to_its_checkpoint() -> None:
    checkpoint, source = find_repo("facebook/deit-tiny-distilled-patch16-224")
    assert checkpoint.name == "deit_tiny_distilled_patch16_224"
    assert source.layout == "transformers"
    assert find_repo("facebook/deit") is None


def test_no_place_is_listed_twice() -> None:
    places = [str(source) for checkpoint in load_manifest().values() for source in checkpoint.sources]
    assert len(places) == len(set(places))


def test_source_says_where_it_is_and_what_is_known_of_its_bytes() -> None:
    assert str(Source(layout="native", file="toy.safetensors")) == "weights/toy.safetensors"
    assert str(Source(layout="native", url="https://x/y.pth")) == "https://x/y.pth"
    assert str(Source(layout="timm", repo="me/toy")) == "me/toy"
    assert Source(layout="timm", repo="me/toy").digest is None
    assert Source(layout="native", url="u", sha256_prefix="ab").digest == "ab"
    assert Source(layout="native", url="u", sha256_prefix="ab", sha256="abcd").digest == "abcd"


# Preprocessing


@pytest.mark.parametrize("size", [32, 160, 224, 288, 384, 448])
def test_deit_at_another_size_resizes_as_the_authors_do(size: int) -> None:
    at_size = Preprocessing(resize=256, crop=(224, 224)).at_size((size, size))
    assert (at_size.resize, at_size.crop) == (int(size / 0.875), (size, size))


def test_crop_always_fits_into_the_resized_image() -> None:
    for preprocessing in (Preprocessing(resize=256, crop=(224, 224)), Preprocessing(resize=32, crop=(32, 32))):
        for crop in ((224, 448), (448, 224), (16, 16), (33, 65)):
            at_size = preprocessing.at_size(crop)
            assert at_size.crop == crop
            assert at_size.resize >= max(crop)


def test_exact_resize_scales_each_side() -> None:
    squash = Preprocessing(resize=(256, 512), crop=(224, 224), interpolation="bilinear", mean=(0.5,), std=(0.25,))
    assert squash.at_size((112, 448)) == Preprocessing(
        resize=(128, 1024), crop=(112, 448), interpolation="bilinear", mean=(0.5,), std=(0.25,)
    )


def test_same_size_is_the_same_preprocessing() -> None:
    preprocessing = Preprocessing(resize=438, crop=(384, 384))
    assert preprocessing.at_size((384, 384)) is preprocessing


@pytest.mark.parametrize("resize", [256, (256, 300)])
def test_preprocessing_survives_plain_values(resize: int | tuple[int, int]) -> None:
    preprocessing = Preprocessing(resize=resize, crop=(224, 196), mean=(0.1, 0.2, 0.3))
    plain = preprocessing.to_dict()
    assert not any(isinstance(value, tuple) for value in plain.values())
    assert Preprocessing.from_dict(plain) == preprocessing


@pytest.mark.parametrize("data", [{"resize": 256}, {"resize": 256, "crop": [224, 224], "crop_pct": 0.9}, {}])
def test_preprocessing_with_other_fields_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="preprocessing has fields"):
        Preprocessing.from_dict(data)


def test_downloads_have_file_names_of_their_own() -> None:
    names = [PurePosixPath(s.url).name for c in load_manifest().values() for s in c.sources if s.url is not None]
    assert len(names) == len(set(names))  # the cache keeps a plain download under its file name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resize", True),
        ("resize", 224.0),
        ("resize", (256,)),
        ("resize", (256, 0)),
        ("crop", 224),
        ("crop", (224, "224")),
        ("crop", (224, 10**9)),
        ("interpolation", "nearest-exact"),
        ("interpolation", 3),
        ("rounding", "up"),
        ("mean", (0.5, 0.5, float("nan"))),
        ("mean", (0.5, 0.5)),
        ("mean", 0.5),
        ("mean", (1e300, 0, 0)),
        ("std", (0.2, 0.2, False)),
        ("std", (0.2, 0.2, 1e-300)),
        ("std", "abc"),
    ],
)
def test_preprocessing_that_no_image_could_pass_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}=.*expected"):
        Preprocessing(**{"resize": 256, "crop": (224, 224), field: value})


def test_images_that_are_not_resized_are_cropped_at_any_size_and_written_without_null():
    fixed = Preprocessing(resize=None, crop=(32, 48), mean=[0, 0, 0], std=[1, 1, 1], rounding="down")
    assert fixed.at_size((64, 64)) == replace(fixed, crop=(64, 64))
    assert fixed.to_dict()["resize"] == "none"
    assert Preprocessing.from_dict(fixed.to_dict()) == fixed
    assert str(fixed) == "no resize, centre crop 32x48"


def test_a_problem_type_is_one_of_transformers_and_goes_with_its_heads():
    origin = Origin(name="toy", preprocessing=Preprocessing(resize=36, crop=(32, 32)), problem_type="regression")
    same, new = (
        origin.adapted((64, 64), class_names=None, dataset=None, new_heads=new_heads) for new_heads in (False, True)
    )
    assert (same.problem_type, new.problem_type, origin.trained("x", class_names=None).problem_type) == (
        "regression",
        None,
        None,
    )
    new.check_labels(False, "training")
    with pytest.raises(ConfigError, match="for regression, training needs one class"):
        same.check_labels(False, "training")
    with pytest.raises(ConfigError, match="problem_type='detection'"):
        replace(origin, problem_type="detection")
