"""config.json: its layout is told from its contents, and each layout's files are written."""

from typing import Any

import pytest
from tiny_models import LAYOUTS, named, refusal
from tiny_models import tiny_model as make

from deit_models import CheckpointError, ConfigError, UnknownModelError, create_model
from deit_models.formats.layouts import layouts_of, read_config, write_config
from deit_models.models.deit import DeiT, DeiTConfig

FILES = {layout: ["config.json"] for layout in LAYOUTS}
FILES["transformers"].append("preprocessor_config.json")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["deit_micro_patch4_32", "levit_128s"])
def test_written_config_is_read_back(name: str, layout: str) -> None:
    model = named(create_model(name, num_classes=7, device="meta"))
    files = write_config(model, layout)
    assert list(files) == FILES[layout]
    said = read_config(files["config.json"], files.get("preprocessor_config.json"))
    assert (said.layout, said.family) == (layout, model.family)
    # the names of dropout and the like are not in other libraries' files
    for field in ("num_classes", "image_hw", "depth", "embed_dim"):
        assert getattr(said.config, field) == getattr(model.config, field)
    assert said.origin.class_names == model.origin.class_names
    assert said.origin.preprocessing == model.origin.preprocessing


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ({}, CheckpointError, "neither deit_models, architecture nor model_type"),
        ({"deit_models": 99}, CheckpointError, "has format 99"),
        ({"deit_models": 1}, CheckpointError, "lacks or misuses a field"),
        ({"architecture": "vgg16"}, UnknownModelError, "vgg16"),
        ({"model_type": "swin"}, ConfigError, "loads 'deit', 'vit', 'levit'"),
    ],
)
def test_config_of_another_kind_is_refused(data: dict[str, Any], kind: type[Exception], message: str) -> None:
    assert message in refusal(kind, lambda: read_config(data))


def test_family_that_no_library_has_is_native_alone() -> None:
    layouts = layouts_of("t2t_vit")
    assert layouts.family == "t2t_vit"
    assert layouts.tell_naming(["anything"]) == "native"
    assert "t2t_vit" in refusal(ConfigError, lambda: layouts.write_transformers(None))
    assert "timm" in refusal(ConfigError, lambda: layouts.write_timm("t2t_vit_7", None))


def test_unknown_layout_and_model_without_origin_are_refused() -> None:
    assert "expected 'native', 'timm' or 'transformers'" in refusal(ConfigError, lambda: write_config(make(), "keras"))
    assert "no origin" in refusal(ConfigError, lambda: write_config(DeiT(DeiTConfig(depth=1)), "native"))
