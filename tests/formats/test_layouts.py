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


def _native(name: str, **fields: Any) -> dict[str, Any]:
    data = write_config(create_model(name, device="meta"), "native")["config.json"]
    return {**data, "config": {key: value for key, value in (data["config"] | fields).items() if value is not ...}}


@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("deit_micro_patch4_32", field) for field in ("num_heads", "norm_eps", "qkv_bias", "distilled", "mlp_ratio")),
        *(("levit_128s", field) for field in ("key_dim", "distilled", "num_heads")),
        *(("t2t_vit_7", field) for field in ("tokens_type", "pos_resize")),
        *(("vit_resnas_tiny", field) for field in ("stem", "patch_head", "stages")),
    ],
)
def test_native_config_without_a_field_is_refused(name: str, field: str) -> None:
    read_config(_native(name))
    assert f"lacks the fields {field}" in refusal(CheckpointError, lambda: read_config(_native(name, **{field: ...})))


def test_native_config_of_an_older_version_is_read() -> None:
    later = ("patch_drop_rate", "layer_scale", "prefix_positions", "drop_path_uniform")
    written = _native("deit_micro_patch4_32")
    assert read_config(_native("deit_micro_patch4_32", **dict.fromkeys(later, ...))) == read_config(written)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("deit_micro_patch4_32", {"depth": 10**6}),
        ("deit_micro_patch4_32", {"prefix_positions": "no"}),
        ("deit_micro_patch4_32", {"img_size": [4, 2**40]}),
        ("deit_micro_patch4_32", {"layer_scale": False}),
        ("levit_128s", {"depth": [10**4, 1, 1]}),
        ("levit_128s", {"img_size": 4096}),
        ("levit_128s", {"distilled": 1}),
        ("t2t_vit_7", {"token_head": None}),
        ("t2t_vit_7", {"norm_eps": 1e9}),
        ("vit_resnas_tiny", {"stages": "four"}),
        ("vit_resnas_tiny", {"stem_dim": 2**33}),
    ],
)
def test_native_config_of_no_possible_model_is_refused(name: str, fields: dict[str, Any]) -> None:
    assert next(iter(fields)) in refusal(ConfigError, lambda: read_config(_native(name, **fields)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("top1", "81"), ("top5", True), ("top1", 120.0), ("licence", ["MIT"]), ("dataset", 3), ("architecture", None)],
)
def test_facts_of_a_native_config_have_their_type(key: str, value: Any) -> None:
    data = _native("deit_micro_patch4_32")
    assert key in refusal(ConfigError, lambda: read_config({**data, key: value})).replace("name", "architecture")


@pytest.mark.parametrize("count", [1, 9, 11])
def test_class_names_are_as_many_as_the_classes(count: int) -> None:
    data = write_config(create_model("deit_micro_patch4_32", num_classes=10, device="meta"), "native")["config.json"]
    names = {str(index): f"class {index}" for index in range(count)}
    assert f"{count} class names" in refusal(CheckpointError, lambda: read_config({**data, "id2label": names}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": [32, 40]}, "images of (32, 40), the model takes (32, 32)"),
        ({"crop": None}, "crop=None"),
        ({"resize": {}}, "resize={}"),
        ({"mean": [0.5], "std": [0.5]}, "mean=(0.5,)"),
        ({"std": [0.2, 0.2, "x"]}, "std=(0.2, 0.2, 'x')"),
        ({"colour": "grey"}, "colour"),
    ],
)
def test_preprocessing_of_a_native_config_is_checked_when_read(change: dict[str, Any], message: str) -> None:
    data = write_config(make("deit_micro_patch4_32"), "native")["config.json"]
    assert message in refusal(
        ConfigError, lambda: read_config({**data, "preprocessing": data["preprocessing"] | change})
    )
    assert "preprocessing" in refusal(ConfigError, lambda: read_config({**data, "preprocessing": "as usual"}))
