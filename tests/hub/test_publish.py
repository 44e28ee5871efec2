"""What save_pretrained writes, timm, transformers and this package load with equal logits; push_to_hub and back."""

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny_models import LAYOUTS, answer, assert_same_answer, assert_same_state, published_files, randomise, refusal
from tiny_models import tiny_model as make

from deit_models import ConfigError, FetchError, SaveError, create_model, from_pretrained, transform_for
from deit_models.checkpoint import Preprocessing
from deit_models.formats import publish
from deit_models.models.deit import DeiT, DeiTConfig

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
MODELS = {
    "plain": lambda: randomise(create_model("deit_tiny_patch16_224")).eval(),
    "distilled": lambda: randomise(create_model("deit_tiny_distilled_patch16_224")).eval(),
    "small images": lambda: make("deit_micro_patch4_32"),
    "small images, distilled": lambda: make("deit_micro_distilled_patch4_32"),
    "not square": lambda: named(make("deit_tiny_patch16_224", num_classes=7, img_size=(96, 160))),
    "not square, distilled": lambda: named(
        make("deit_small_distilled_patch16_224", num_classes=7, img_size=(160, 96), mlp_ratio=3.0)
    ),
    "other size": lambda: named(make("deit_base_patch16_384", num_classes=7, img_size=128, qkv_bias=False)),
}


def named(model):
    model.origin = replace(model.origin, class_names=CLASSES, dataset="CIFAR-10", licence="Apache-2.0")
    return model


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def tiny():
    return named(make(num_classes=7))


def photo(width, height):
    """Smooth colours with some grain, as a camera would give."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.linspace(0, 9, height)[:, None], torch.linspace(0, 7, width)[None, :]
    smooth = torch.stack([torch.sin(rows * (1 + c)) * torch.cos(columns + c) for c in range(3)], dim=-1)
    grain = torch.randn(height, width, 3, generator=generator)
    return Image.fromarray((127 + 90 * smooth + 6 * grain).clamp(0, 255).to(torch.uint8).numpy(), "RGB")


# Folders


@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_folder_gives_back_the_model_and_what_belongs_to_it(model, tmp_path, layout):
    model.save_pretrained(tmp_path, layout=layout)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert loaded.origin.class_names == model.origin.class_names
    assert loaded.origin.preprocessing == model.origin.preprocessing
    if layout == "native":
        assert loaded.origin == replace(model.origin, source=str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [32, 160, 224, 256, 288, 384, 448, 512])
def test_evaluation_transform_survives_every_layout(layout, size, tmp_path):
    tiny = make("deit_tiny_patch16_224", img_size=size)
    tiny.save_pretrained(tmp_path, layout=layout)
    assert from_pretrained(tmp_path).origin.preprocessing == tiny.origin.preprocessing


@pytest.mark.parametrize("layout", LAYOUTS)
def test_squashing_transform_survives_every_layout(tiny, layout, tmp_path):
    squash = Preprocessing(resize=(36, 36), crop=(32, 32), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    tiny.origin = replace(tiny.origin, preprocessing=squash)
    tiny.save_pretrained(tmp_path, layout=layout)
    assert from_pretrained(tmp_path).origin.preprocessing == squash


def test_folder_holds_the_layouts_files(tiny):
    common = {"config.json", "model.safetensors", "README.md"}
    assert set(published_files(tiny)) == set(published_files(tiny, "timm")) == common
    assert set(published_files(tiny, "transformers")) == common | {"preprocessor_config.json"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtype_is_written_as_it_is(tiny, tmp_path, layout):
    tiny.bfloat16().save_pretrained(tmp_path, layout=layout)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_circle_through_three_folders_is_bit_identical(tiny, tmp_path):
    model = tiny
    for step, layout in enumerate(("transformers", "timm", "native")):
        model.save_pretrained(tmp_path / str(step), layout=layout)
        model = from_pretrained(tmp_path / str(step))
    assert_same_state(model.state_dict(), tiny.state_dict())
    assert model.config == tiny.config
    assert model.origin.class_names == CLASSES


def test_written_card_is_kept(tiny, tmp_path):
    (tmp_path / "README.md").write_text("my own words", encoding="utf-8")
    tiny.save_pretrained(tmp_path)
    tiny.save_pretrained(tmp_path, layout="timm")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "my own words"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_failing_write_leaves_the_old_files(tiny, tmp_path, layout, full_disk):
    tiny.save_pretrained(tmp_path, layout=layout)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = make(seed=1, num_classes=7)
    with full_disk(10_000):
        message = refusal(SaveError, lambda: other.save_pretrained(tmp_path, layout=layout))
    assert "model.safetensors" in message
    assert "File too large" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unknown_layout_is_refused_before_anything_is_written(tiny, tmp_path):
    message = refusal(ConfigError, lambda: tiny.save_pretrained(tmp_path / "out", layout="keras"))
    assert "'native', 'timm' or 'transformers'" in message
    assert not (tmp_path / "out").exists()


def test_file_in_place_of_the_folder_is_refused(tiny, tmp_path):
    (tmp_path / "out").write_text("x", encoding="utf-8")
    assert "is a file" in refusal(ConfigError, lambda: tiny.save_pretrained(tmp_path / "out"))
    refusal(SaveError, lambda: tiny.save_pretrained(tmp_path / "out" / "deeper"))
    assert (tmp_path / "out").read_text(encoding="utf-8") == "x"


def test_model_built_by_hand_is_refused(tmp_path):
    model = DeiT(DeiTConfig(embed_dim=16, depth=1, num_heads=2, img_size=32))
    assert "create_model" in refusal(ConfigError, lambda: model.save_pretrained(tmp_path / "out"))
    assert "create_model" in refusal(ConfigError, lambda: publish.model_card(model, "native"))
    assert not (tmp_path / "out").exists()


# timm


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
    assert "global_pool='avg'" in refusal(ConfigError, lambda: from_pretrained(tmp_path))


# transformers


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


# The Hub


@pytest.fixture
def hub(hub_server, hub_env):
    hub_env.login()
    return hub_server


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pushed_model_comes_back_equal(hub, tiny, layout):
    address = tiny.push_to_hub("tester/new", layout=layout)
    assert address.endswith("tester/new")
    loaded = from_pretrained("tester/new")
    assert_same_answer(tiny, loaded)
    assert loaded.origin.class_names == CLASSES
    assert loaded.origin.revision == hub.repos["tester/new"].branches["main"]


def test_second_push_replaces_the_weights_and_keeps_the_card(hub, tiny):
    tiny.push_to_hub("tester/new")
    hub.commit("tester/new", {"README.md": b"my own words"})
    other = make(seed=1, num_classes=7)
    other.push_to_hub("tester/new")
    assert hub.files("tester/new")["README.md"] == b"my own words"
    assert_same_answer(other, from_pretrained("tester/new"))


def test_private_push_is_private(hub, hub_env, tiny):
    tiny.push_to_hub("tester/secret", private=True)
    assert_same_answer(tiny, from_pretrained("tester/secret"))
    hub_env.logout()
    assert hub.repos["tester/secret"].private_token == hub.token
    message = refusal(FetchError, lambda: from_pretrained("tester/secret", cache_dir=hub_env.home / "empty"))
    assert "token" in message


def test_push_without_right_is_one_line(hub, hub_env, tiny):
    message = refusal(FetchError, lambda: tiny.push_to_hub("tester/new", token="hf_wrong"))
    assert "tester/new" in message
    assert "token" in message
    hub_env.logout()
    refusal(FetchError, lambda: tiny.push_to_hub("tester/new"))
    assert "tester/new" not in hub.repos


@pytest.mark.parametrize("repo_id", ["a/b/c", "spaces are not fine", ""])
def test_push_to_an_impossible_name_is_one_line(hub, tiny, repo_id):
    before = set(hub.repos)
    refusal(FetchError, lambda: tiny.push_to_hub(repo_id))
    assert set(hub.repos) == before


def test_push_to_a_broken_server_is_one_line(hub, tiny):
    hub.fail("/upload/", status=500, times=None)
    assert "could not push" in refusal(FetchError, lambda: tiny.push_to_hub("tester/new"))
    hub._httpd.server_close()
    refusal(FetchError, lambda: tiny.push_to_hub("tester/new"))


def test_push_offline_is_one_line(hub, hub_env, tiny):
    hub_env.go_offline()
    refusal(FetchError, lambda: tiny.push_to_hub("tester/new"))
    assert hub.requests == []


# The card


@pytest.mark.parametrize("layout", LAYOUTS)
def test_card_of_adapted_weights_names_what_they_come_from(hub, tiny, layout):
    hub.add_repo("me/base", published_files(tiny))
    adapted = from_pretrained("me/base", num_classes=3)
    card = ModelCard(publish.model_card(adapted, layout))
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "me/base"
    assert data["pipeline_tag"] == "image-classification"
    assert data["library_name"] == ("deit-models" if layout == "native" else layout)
    assert {"image-classification", "deit"} <= set(data["tags"])
    assert data["datasets"] == ["cifar-10"]
    assert "3 classes" in card.text
    assert "32x32" in card.text


def test_card_of_random_weights_claims_nothing():
    data = ModelCard(publish.model_card(make("deit_tiny_patch16_224"), "native")).data.to_dict()
    assert not {"license", "base_model", "datasets"} & set(data)
    assert "random, not trained" in publish.model_card(make(), "native")


def test_card_states_the_accuracy_of_unchanged_weights_only(tiny, tmp_path):
    tiny.origin = replace(tiny.origin, dataset="CIFAR-10", top1=81.5, top5=99.1)
    tiny.save_pretrained(tmp_path)
    same, changed = from_pretrained(tmp_path), from_pretrained(tmp_path, num_classes=3)
    results = ModelCard(publish.model_card(same, "native")).data.eval_results
    assert [(r.metric_name, r.metric_value, r.dataset_name) for r in results] == [
        ("top-1", 81.5, "CIFAR-10"),
        ("top-5", 99.1, "CIFAR-10"),
    ]
    assert not ModelCard(publish.model_card(changed, "native")).data.eval_results
    assert "81.5" not in publish.model_card(changed, "native")


def test_pushed_card_names_the_repository(hub, tiny):
    tiny.push_to_hub("tester/named")
    assert "from_pretrained('tester/named')" in hub.files("tester/named")["README.md"].decode()


def test_files_and_addresses_are_no_base_model(tiny):
    for source in ("weights/deit.safetensors", "https://example.org/deit.pth", "runs/last"):
        tiny.origin = replace(tiny.origin, source=source, revision=None)
        text = publish.model_card(tiny, "native")
        assert "base_model" not in ModelCard(text).data.to_dict()
        assert source in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_card_is_the_models(tiny, tmp_path, layout):
    tiny.save_pretrained(tmp_path, layout=layout)
    assert ModelCard.load(tmp_path / "README.md").data.license == "apache-2.0"
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert ("deit_models" in config, "pretrained_cfg" in config, "model_type" in config) == tuple(
        layout == kind for kind in LAYOUTS
    )
    assert answer(from_pretrained(tmp_path)).shape == (1, 7)
