"""Architectures in files: there and back for every family, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch

from deit_models import ConfigError, create_model, model_info
from deit_models.formats.architecture import Architecture, read_architecture
from deit_models.registry import model_spec

FAMILIES = ("deit_tiny_distilled_patch16_224", "levit_128s", "t2t_vit_7", "vit_resnas_tiny")


def written(path: Path, name: str) -> Path:
    config = model_spec(name).config
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    record = Architecture(
        name="mine", family=model_info(name).family, settings=settings, preprocessing=model_info(name).preprocessing
    )
    path.write_text(record.to_toml(), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "mine.toml", name)
    with torch.device("meta"):
        model = create_model(str(path))
    assert model.config == model_spec(name).config
    assert model.origin is not None
    assert (model.origin.name, model.origin.preprocessing) == ("mine", model_info(name).preprocessing)


def test_options_replace_fields_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.toml", "vit_resnas_tiny")
    model = create_model(str(path), device="meta", num_classes=7, img_size=280)
    assert (model.num_classes, model.config.image_hw) == (7, (280, 280))
    assert model.origin is not None
    assert model.origin.preprocessing.crop == (280, 280)
    assert model.origin.preprocessing.resize == 320
    with pytest.raises(ConfigError, match="unknown option 'clases'"):
        create_model(str(path), device="meta", clases=7)


def test_file_without_preprocessing_gets_deits(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(Architecture(name="mine", family="deit", settings={"img_size": 32, "patch_size": 4}).to_toml())
    model = create_model(str(path), device="meta")
    assert model.origin is not None
    assert (model.origin.preprocessing.resize, model.origin.preprocessing.crop) == (36, (32, 32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("architecture = 1", "it has architecture; expected architecture, family"),
        ('name = "x"', "no line `architecture = 1`"),
        ('architecture = 2\nname = "x"\nfamily = "deit"\n[settings]', "no line `architecture = 1`"),
        (
            'architecture = 1\nname = "x"\nfamily = "deit"\n[settings]\n[preprocessing]\ncrop = [1, 1]',
            "preprocessing has",
        ),
        ("architecture =", "is not an architecture"),
        ('architecture = 1\nname = "x"\nfamily = "deit"\nsettings = 3', "its settings are no table"),
    ],
)
def test_other_files_are_refused_and_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        read_architecture(path)
    assert "mine.toml" in str(caught.value)


def test_missing_file_and_unknown_family_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        create_model(str(tmp_path / "none.toml"))
    path = tmp_path / "mine.toml"
    path.write_text(Architecture(name="mine", family="vgg", settings={}).to_toml(), encoding="utf-8")
    with pytest.raises(
        ConfigError, match="unknown model family 'vgg'; known: cait, deit, levit, resmlp, t2t_vit, vit_resnas"
    ):
        create_model(str(path))
