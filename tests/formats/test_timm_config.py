"""timm and this package load each other's folders with equal logits."""

import json
import re
from dataclasses import replace

import pytest
import torch
from tiny_models import assert_same_answer, photo, randomise, refusal
from tiny_models import tiny_model as make

from deit_models import CheckpointError, ConfigError, from_pretrained, transform_for


def test_timm_loads_the_folder_with_equal_logits(model, tmp_path):
    timm = pytest.importorskip("timm")
    model.save_pretrained(tmp_path, layout="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same_answer(model, theirs, config=model.config, atol=1e-4)
    assert theirs.num_classes == model.num_classes
    names = theirs.pretrained_cfg.get("label_names")
    assert (names and tuple(names)) == model.origin.class_names


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(32, 64), (64, 32), (48, 64), (32, 32)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0, 0.61])
def test_transform_of_timm_gives_the_same_pixels(tmp_path, mode, size, crop_pct):
    timm = pytest.importorskip("timm")
    model = make("deit_tiny_patch16_224", img_size=size)
    model.save_pretrained(tmp_path, layout="timm")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"] |= {"crop_mode": mode, "crop_pct": crop_pct}
    config.pop("preprocessing", None)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(config["pretrained_cfg"]))
    ours = from_pretrained(tmp_path)
    for width, height in ((100, 120), (120, 100), (333, 50), (50, 333), (37, 31), (64, 64)):
        image = photo(width, height)
        assert (transform_for(ours)(image) - theirs(image)).abs().max() < 1e-5
    for layout in ("timm", "native"):
        ours.save_pretrained(tmp_path / layout, layout=layout)
        assert from_pretrained(tmp_path / layout).origin.preprocessing == ours.origin.preprocessing


def test_style_of_timm_covers_an_input_that_is_no_square():
    timm = pytest.importorskip("timm")
    model, image = make("deit_tiny_patch16_224", img_size=(64, 128)), photo(201, 317)
    theirs = timm.data.create_transform((3, 64, 128), crop_pct=0.9, interpolation="bicubic")
    assert (transform_for(model, style="timm")(image) - theirs(image)).abs().max() < 1e-5
    fast = transform_for(model, style="timm")
    fast.fast_pixels = True
    assert (fast(image) - theirs(image)).abs().mean() < 0.1


def test_transform_that_timm_lacks_is_kept_and_told(tmp_path, caplog):
    model = make("deit_tiny_patch16_224", img_size=(64, 128))
    model.save_pretrained(tmp_path, layout="timm")
    assert "timm has no transform like 'resize shorter side to 146" in caplog.text
    assert from_pretrained(tmp_path).origin.preprocessing == model.origin.preprocessing


@pytest.mark.parametrize(("pool", "loads"), [("token", True), (None, True), ("avg", False), ("avgmax", False)])
def test_pooling_beside_the_architecture_counts(tmp_path, pool, loads):
    make("deit_tiny_patch16_224", img_size=32, num_classes=3).save_pretrained(tmp_path, layout="timm")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "global_pool": pool}), encoding="utf-8")
    if loads:
        assert from_pretrained(tmp_path).num_classes == 3
    else:
        assert "global_pool" in refusal(CheckpointError, lambda: from_pretrained(tmp_path))
    assert from_pretrained(tmp_path, num_classes=5).num_classes == 5


def test_timm_reads_the_evaluation_transform(tmp_path):
    timm = pytest.importorskip("timm")
    tiny = make("deit_tiny_patch16_224", img_size=(96, 160))
    tiny.save_pretrained(tmp_path, layout="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    data = timm.data.resolve_model_data_config(theirs)
    spec = tiny.origin.preprocessing
    assert data["input_size"] == (3, 96, 160)
    assert (tuple(data["mean"]), tuple(data["std"])) == (spec.mean, spec.std)
    assert data["interpolation"] == spec.interpolation
    square = make("deit_tiny_patch16_224")
    square.save_pretrained(tmp_path / "square", layout="timm")
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'square'}", pretrained=True))
    image = photo(320, 240)
    difference = timm.data.create_transform(**data, is_training=False)(image) - transform_for(square)(image)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({}, "img_size", 224),
        ({"img_size": 64, "drop_path_rate": 0.1}, "img_size", 64),
        ({"img_size": (64, 96)}, "img_size", (64, 96)),
        ({"dynamic_img_size": True}, "dynamic_img_size", True),
    ],
)
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_timms_own_folder_loads_here(tmp_path, name, options, field, value):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, num_classes=7, depth=2, embed_dim=16, num_heads=2, **options)
    timm.models.save_for_hf(randomise(theirs).eval(), tmp_path, safe_serialization=True)
    loaded = from_pretrained(tmp_path)
    assert (loaded.num_classes, loaded.config.embed_dim, getattr(loaded.config, field)) == (7, 16, value)
    assert_same_answer(loaded, theirs, config=loaded.config)


def test_timm_model_that_pools_otherwise_is_refused(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("deit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2, global_pool="avg")
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    message = refusal(CheckpointError, lambda: from_pretrained(tmp_path))
    assert "global_pool='avg'" in message
    assert "num_classes=N" in message


def timm_folder(folder, **fields):
    """A tiny DeiT's folder in timm's layout, with these fields in its pretrained_cfg."""
    make("deit_tiny_patch16_224", img_size=32).save_pretrained(folder, layout="timm")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"crop_mode": "squash", "crop_pct": 0.9},
        {"crop_pct": 0.77, "interpolation": "hamming"},
        {"crop_pct": 1.2, "interpolation": "box"},
        {"mean": [0.5], "std": [0.25], "interpolation": "nearest"},
        {"mean": None, "std": None, "crop_pct": None, "interpolation": "", "crop_mode": None},
    ],
)
def test_fields_of_the_transform_give_timms_own_pixels_also_when_written_again(tmp_path, fields):
    timm = pytest.importorskip("timm")
    folder, image = timm_folder(tmp_path, **fields), photo(71, 50)
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    theirs = timm.data.create_transform(**data, is_training=False)(image)
    model = from_pretrained(folder)
    assert (transform_for(model)(image) - theirs).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "again", layout="timm")
    assert from_pretrained(tmp_path / "again").origin.preprocessing == model.origin.preprocessing


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_mode", "border"),
        ("crop_pct", "most"),
        ("crop_pct", True),
        ("crop_pct", -0.9),
        ("crop_pct", 1e-9),
        ("crop_pct", 99),
        ("interpolation", "random"),
        ("interpolation", ["bicubic"]),
        ("label_offset", 1),
        ("mean", [0.5, 0.5]),
        ("mean", ["a", "b", "c"]),
        ("std", [0.1, 0, 0.1]),
    ],
)
def test_a_transform_that_we_cannot_follow_is_refused_when_the_model_is_loaded(tmp_path, field, value):
    named = {"crop_pct": "crop_pct|resize", "mean": "mean", "std": "std"}.get(field, field)
    assert re.search(named, refusal(ConfigError, lambda: from_pretrained(timm_folder(tmp_path, **{field: value}))))


@pytest.mark.parametrize("resize", [None, (40, 33)])
def test_a_transform_that_timm_has_not_is_not_written(tmp_path, resize):
    tiny = make("deit_micro_patch4_32")
    tiny.origin = replace(tiny.origin, preprocessing=replace(tiny.origin.preprocessing, resize=resize))
    assert "timm has no transform" in refusal(ConfigError, lambda: tiny.save_pretrained(tmp_path, layout="timm"))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "levit_128s"])
def test_timm_model_without_classes_gives_its_features(tmp_path, name):
    timm = pytest.importorskip("timm")
    small = {} if name.startswith("levit") else {"depth": 2, "embed_dim": 16, "num_heads": 2}
    theirs = timm.create_model(name, num_classes=0, **small).eval()
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    loaded = from_pretrained(tmp_path)
    x = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(loaded(x), theirs(x), atol=1e-4, rtol=0)
    loaded.save_pretrained(tmp_path / "again", layout="timm")
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    torch.testing.assert_close(again(x), theirs(x), atol=1e-4, rtol=0)
    assert from_pretrained(tmp_path, num_classes=3)(x).shape == (1, 3)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_timm_model_that_pools_otherwise_gets_a_new_head(tmp_path, pool):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("deit_tiny_patch16_224", depth=1, embed_dim=16, num_heads=2, global_pool=pool)
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    loaded = from_pretrained(tmp_path, num_classes=1000)
    assert torch.equal(loaded.norm.weight, theirs.fc_norm.weight)
    assert not torch.equal(loaded.head.weight, theirs.head.weight)
