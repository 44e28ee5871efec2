"""timm and this package load each other's folders with equal logits."""

import pytest
from tiny_models import assert_same_answer, photo, randomise, refusal
from tiny_models import tiny_model as make

from deit_models import CheckpointError, from_pretrained, transform_for


def test_timm_loads_the_folder_with_equal_logits(model, tmp_path):
    timm = pytest.importorskip("timm")
    model.save_pretrained(tmp_path, layout="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_same_answer(model, theirs, config=model.config, atol=1e-4)
    assert theirs.num_classes == model.num_classes
    names = theirs.pretrained_cfg.get("label_names")
    assert (names and tuple(names)) == model.origin.class_names


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
