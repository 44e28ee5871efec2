"""What save_pretrained writes, timm, transformers and this package load with equal logits; push_to_hub and back."""

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_models import CLASSES, LAYOUTS, answer, assert_same_answer, assert_same_state, published_files, refusal
from tiny_models import tiny_model as make

from deit_models import ConfigError, SaveError, from_pretrained
from deit_models.checkpoint import Preprocessing
from deit_models.formats import publish
from deit_models.models.deit import DeiT, DeiTConfig


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


def test_files_and_addresses_are_no_base_model(tiny):
    for source in ("weights/deit.safetensors", "https://example.org/deit.pth", "runs/last"):
        tiny.origin = replace(tiny.origin, source=source, revision=None)
        text = publish.model_card(tiny, "native")
        assert "base_model" not in ModelCard(text).data.to_dict()
        assert source in text


@pytest.mark.parametrize(
    "name", ["<script>x</script>", "a | b", "two\n---\nlicense: mit", "[x](http://y)", "caf\udce9"]
)
def test_names_in_a_card_are_no_markup(tiny, tmp_path, name):
    tiny.origin = replace(tiny.origin, name=name, dataset=name, source=name, top1=50.0)
    tiny.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    for markup in ("<script>", "[x](", " | ", "\n---\nlicense"):
        assert markup not in card.text
    assert card.data.license == tiny.origin.licence.lower()
    assert from_pretrained(tmp_path).origin.dataset == name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_card_is_the_models(tiny, tmp_path, layout):
    tiny.save_pretrained(tmp_path, layout=layout)
    assert ModelCard.load(tmp_path / "README.md").data.license == "apache-2.0"
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert ("deit_models" in config, "pretrained_cfg" in config, "model_type" in config) == tuple(
        layout == kind for kind in LAYOUTS
    )
    assert answer(from_pretrained(tmp_path)).shape == (1, 7)


def test_tied_and_overlapping_tensors_are_saved(tmp_path):
    tied, overlapping = make(), make()
    tied.head_dist = tied.head
    rows = torch.randn(15, 16)
    overlapping.head.weight = torch.nn.Parameter(rows[:10])
    overlapping.head_dist.weight = torch.nn.Parameter(rows[5:])
    for number, model in enumerate((tied, overlapping)):
        for layout in LAYOUTS:
            model.save_pretrained(tmp_path / f"{number}{layout}", layout=layout)
            assert_same_answer(model, from_pretrained(tmp_path / f"{number}{layout}"))


def test_model_without_plain_tensors_is_refused_by_name(tmp_path):
    empty, sparse, adapted = make().to("meta"), make(), make()
    sparse.head.weight = torch.nn.Parameter(sparse.head.weight.detach().to_sparse())
    adapted.head = torch.nn.Sequential(adapted.head)
    for model, message in ((empty, "cls_token is on the meta"), (sparse, "sparse"), (adapted, "adapters")):
        assert message in refusal(ConfigError, lambda: model.save_pretrained(tmp_path / "out"))  # noqa: B023
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dataset", "on_the_hub"),
    [("photos", None), ("CIFAR-100", "uoft-cs/cifar100"), ("cifar10", "uoft-cs/cifar10"), ("my imagenet", None)],
)
def test_card_links_data_that_the_hub_has(tiny, dataset, on_the_hub):
    tiny.origin = replace(tiny.origin, dataset=dataset, top1=90.0, top5=None)
    data = ModelCard(publish.model_card(tiny, "native"), ignore_metadata_errors=False).data
    assert data.datasets == (None if on_the_hub is None else [on_the_hub])
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_name) == (on_the_hub or "imagefolder", dataset)


def test_card_names_the_repository_that_fine_tuning_began_with(tiny, tmp_path):
    tiny.origin = replace(tiny.origin, source="facebook/deit-tiny", revision="0" * 40)
    for start in (tiny.origin, tiny.origin.trained("photos", class_names=None)):  # trained once, and once more
        tiny.origin = start.trained("photos", class_names=None, top1=90.0)
        tiny.save_pretrained(tmp_path / "best")
        loaded = from_pretrained(tmp_path / "best")
        (tmp_path / "best" / "README.md").unlink()
        assert ModelCard(publish.model_card(loaded, "native")).data.base_model == "facebook/deit-tiny"
    tiny.origin = replace(tiny.origin, source=None, base=None).trained("photos", class_names=None)
    assert ModelCard(publish.model_card(tiny, "timm")).data.base_model is None
