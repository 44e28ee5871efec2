"""transformers and this package load each other's folders with equal logits, and prepare photos alike."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import CLASSES, assert_same_answer, photo, randomise, refusal
from tiny_models import tiny_model as make

from deit_models import Classifier, ConfigError, from_pretrained, transform_for
from deit_models.formats.layouts import read_config


def test_transformers_loads_the_folder_with_equal_logits(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path, layout="transformers")
    theirs, report = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_answer(model, theirs.eval(), config=model.config, atol=1e-4)
    assert theirs.config.num_labels == model.num_classes
    if model.origin.class_names is not None:
        assert tuple(theirs.config.id2label.values()) == model.origin.class_names
        assert theirs.config.label2id["cat"] == 2
    if model.config.distilled:
        heads = model.forward_heads(torch.ones(1, 3, *model.config.image_hw))
        out = theirs(torch.ones(1, 3, *model.config.image_hw))
        torch.testing.assert_close(out.cls_logits, heads.cls, atol=1e-4, rtol=0)
        torch.testing.assert_close(out.distillation_logits, heads.dist, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (200, 200)])
def test_transformers_image_processor_prepares_a_photo_as_we_do(tmp_path, size):
    transformers = pytest.importorskip("transformers")
    tiny = make("deit_tiny_patch16_224")
    tiny.save_pretrained(tmp_path, layout="transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = photo(*size)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = transform_for(tiny)(image)
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.01  # Pillow rounds between its two passes; one grey level is 0.017
    assert (theirs - ours).abs().max() < 0.06


@pytest.mark.parametrize("distilled", [False, True])
def test_transformers_own_folder_loads_here(tmp_path, distilled):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    kind = "DeiT" if distilled else "ViT"
    head = "DeiTForImageClassificationWithTeacher" if distilled else "ViTForImageClassification"
    config = getattr(transformers, f"{kind}Config")(
        **shape, image_size=32, patch_size=8, id2label=dict(enumerate(CLASSES)), layer_norm_eps=1e-6
    )
    theirs = randomise(getattr(transformers, head)(config)).eval()
    theirs.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert (loaded.config.distilled, loaded.config.mlp_ratio, loaded.num_classes) == (distilled, 3.0, 7)
    assert loaded.origin.class_names == CLASSES
    assert_same_answer(loaded, theirs, config=loaded.config)


SQUARE = {"height": 32, "width": 32}
PROCESSORS = {
    "neither rescaled nor normalised": ("ViT", {"do_rescale": False, "do_normalize": False, "size": SQUARE}),
    "rescaled to 0..2, not normalised": ("ViT", {"rescale_factor": 2 / 255, "do_normalize": False, "size": SQUARE}),
    "normalised on the scale of pixels": (
        "DeiT",
        {"do_rescale": False, "image_mean": [120, 110, 100], "image_std": [60.5, 50, 40], "crop_size": 32},
    ),
    "one mean for all colours": ("ViT", {"image_mean": 0.4, "image_std": 0.3, "size": 32}),
    "size as a list, lanczos": ("ViT", {"size": [32, 32], "resample": 1}),
    "resized, not cropped": ("DeiT", {"size": SQUARE, "do_center_crop": False, "crop_size": 99}),
    "cropped, not resized": ("DeiT", {"do_resize": False, "crop_size": {"height": 32, "width": 32}}),
    "a crop wider than the image": ("Levit", {"size": {"height": 24, "width": 40}, "crop_size": 32}),
    "LeViT's shorter side as a number": ("Levit", {"size": 30, "crop_size": 32}),
    "another model's processor": ("Bit", {"size": {"shortest_edge": 40}, "crop_size": 32, "resample": 2}),
}


def with_processor(folder, **fields):
    """A tiny ViT's folder in the layout of transformers, with these fields in its preprocessor_config.json alone."""
    make("deit_tiny_patch16_224", img_size=32).save_pretrained(folder, layout="transformers")
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("case", PROCESSORS)
def test_settings_of_an_image_processor_give_its_own_pixels(tmp_path, case):
    transformers = pytest.importorskip("transformers")
    kind, settings = PROCESSORS[case]
    folder = with_processor(tmp_path, image_processor_type=f"{kind}ImageProcessor", **settings)
    image = photo(61, 48)
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"][0]
    model = from_pretrained(folder)
    ours = transform_for(model)(image)
    span = theirs.float().std()
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.02 * span
    model.save_pretrained(tmp_path / "again", layout="transformers")
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "again")(image, return_tensors="pt")
    assert (again["pixel_values"][0] - theirs).abs().mean() < 1e-5 * span
    model.save_pretrained(tmp_path / "native")
    assert torch.equal(transform_for(from_pretrained(tmp_path / "native"))(image), ours)


def test_fields_without_effect_and_those_switched_off_are_no_reason_to_refuse(tmp_path):
    names = {
        "processor_class": "ViTProcessor",
        "_valid_processor_keys": ["images"],
        "auto_map": {"AutoProcessor": "x.y"},
    }
    off = {"do_pad": False, "rescale_offset": None, "do_flip_channel_order": False, "pad_size": SQUARE}
    plain = transform_for(from_pretrained(with_processor(tmp_path, size=SQUARE)))
    full = transform_for(from_pretrained(with_processor(tmp_path, size=SQUARE, **names, **off)))
    assert plain.preprocessing == full.preprocessing
    assert plain.preprocessing.interpolation == "bilinear"  # that of the model's own processor


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"rescale_offset": True}, "rescale_offset"),
        ({"crop_pct": 0.9}, "crop_pct"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "ConvNextImageProcessor"),
        ({"do_normalize": "no"}, "do_normalize='no'"),
        ({"resample": 6}, "resample=6"),
        ({"resample": True}, "resample=True"),
        ({"rescale_factor": 0}, "rescale_factor=0"),
        ({"size": {"longest_edge": 32}}, "longest_edge"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "longest_edge"),
        ({"size": {"shortest_edge": 32}}, "do_center_crop"),
        ({"do_resize": False}, "do_center_crop"),
        ({"do_center_crop": True}, "crop=(None, None)"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 32}}, "crop=(None, None)"),
        ({"size": {"height": 32.5, "width": 32}}, "32.5"),
        ({"size": -1}, "-1"),
        ({"size": 64}, "(64, 64)"),
        ({"image_std": [0, 1, 1]}, "std=(0, 1, 1)"),
        ({"image_mean": [0.5, 0.5]}, "mean=(0.5, 0.5)"),
        ({"image_mean": "half"}, "'half'"),
        ({"image_mean": [1e7, 0, 0]}, "mean=(10000000.0, 0, 0)"),
    ],
)
def test_a_processor_that_we_cannot_follow_is_refused_by_name_when_the_model_is_loaded(tmp_path, fields, named):
    folder = with_processor(tmp_path, **{"size": SQUARE, **fields})
    assert named in refusal(ConfigError, lambda: from_pretrained(folder))


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(5, "multi_label_classification"), (3, "regression"), (1, None), (1, "multi_label_classification"), (3, None)],
)
@pytest.mark.parametrize("layout", ["transformers", "native", "timm"])
def test_scores_are_those_of_transformers_pipeline(tmp_path, labels, problem, layout):
    transformers = pytest.importorskip("transformers")
    ours = make("deit_tiny_patch16_224", img_size=32, num_classes=labels)
    ours.origin = replace(ours.origin, problem_type=problem)
    ours.save_pretrained(tmp_path, layout="transformers")
    image = photo(40, 40)
    theirs = transformers.pipeline("image-classification", str(tmp_path))(image)
    from_pretrained(tmp_path).save_pretrained(tmp_path / layout, layout=layout)
    found = Classifier(tmp_path / layout)(image).predictions
    assert [prediction.index for prediction in found] == [int(row["label"].removeprefix("LABEL_")) for row in theirs]
    for prediction, row in zip(found, theirs, strict=True):
        assert prediction.probability == pytest.approx(row["score"], abs=0.01)


def test_an_unknown_problem_type_is_refused(tmp_path):
    folder = with_processor(tmp_path, size=SQUARE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "ranking"}))
    assert "problem_type='ranking'" in refusal(ConfigError, lambda: from_pretrained(folder))


def test_class_names_come_from_label2id_where_it_is_alone(tmp_path):
    make("deit_tiny_patch16_224", img_size=32, num_classes=3).save_pretrained(tmp_path, layout="transformers")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": None, "label2id": {"cat": 2, "ant": 0, "bee": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path).origin.class_names == ("ant", "bee", "cat")
    (tmp_path / "config.json").write_text(json.dumps(config | {"label2id": {"cat": 0, "ant": 0, "bee": 1}}))
    assert "label2id" in refusal(ConfigError, lambda: from_pretrained(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_labels": 4}))
    assert "num_labels=4" in refusal(ConfigError, lambda: from_pretrained(tmp_path))


@pytest.mark.parametrize("named", [True, False])
def test_deit_with_one_head_is_read_trained_and_written_as_such(tmp_path, named):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.DeiTConfig(**shape, image_size=32, patch_size=8, id2label=dict(enumerate(CLASSES)))
    theirs = randomise(transformers.DeiTForImageClassification(config)).eval()
    theirs.save_pretrained(tmp_path)
    if not named:
        data = json.loads((tmp_path / "config.json").read_text())
        del data["architectures"]
        (tmp_path / "config.json").write_text(json.dumps(data))
    loaded = from_pretrained(tmp_path)
    assert loaded.config.distilled == "token"
    assert_same_answer(loaded, theirs, config=loaded.config)
    assert loaded.train()(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    loaded.eval().save_pretrained(tmp_path / "again", layout="transformers")
    again, report = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert type(again) is transformers.DeiTForImageClassification
    assert not report["missing_keys"]
    assert_same_answer(loaded, again.eval(), config=loaded.config)
    loaded.save_pretrained(tmp_path / "native")
    assert_same_answer(loaded, from_pretrained(tmp_path / "native"))
    assert "timm" in refusal(ConfigError, lambda: loaded.save_pretrained(tmp_path / "timm", layout="timm"))


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Levit"])
def test_model_of_transformers_without_a_head_is_a_backbone(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    options |= {"image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(**({} if kind == "Levit" else options))
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    theirs.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.num_classes == 0
    x = torch.rand(1, 3, *loaded.config.image_hw)
    out = theirs(x).last_hidden_state
    count = {"ViT": 1, "DeiT": 2, "Levit": out.shape[1]}[kind]
    torch.testing.assert_close(loaded(x), out[:, :count].mean(dim=1), atol=1e-4, rtol=0)
    assert from_pretrained(tmp_path, num_classes=5)(x).shape == (1, 5)


def test_exact_gelu_goes_by_two_names(tmp_path):
    make("deit_micro_patch4_32").save_pretrained(tmp_path, layout="transformers")
    data = json.loads((tmp_path / "config.json").read_text())
    expected = from_pretrained(tmp_path)
    for name in ("gelu_python", "gelu_fast", "silu"):
        (tmp_path / "config.json").write_text(json.dumps(data | {"hidden_act": name}))
        if name == "gelu_python":
            assert_same_answer(expected, from_pretrained(tmp_path))
        else:
            assert name in refusal(ConfigError, lambda: from_pretrained(tmp_path))


@pytest.mark.parametrize(("width", "hidden"), [(60, 980), (60, 492), (60, 2020), (192, 768)])
def test_width_of_the_mlp_is_the_configs_whatever_the_quotient(width, hidden):
    data = {"model_type": "vit", "hidden_size": width, "intermediate_size": hidden, "num_attention_heads": 4}
    config = read_config(data).config
    assert int(config.embed_dim * config.mlp_ratio) == hidden
