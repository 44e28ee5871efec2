"""DINO's backbones beside timm and transformers: the same features on equal weights, both ways, in every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import assert_same_state, randomise, refusal
from torch import Tensor, nn

import deit_models
from deit_models import CheckpointError, ConfigError, create_model, from_pretrained, list_models, model_info
from deit_models.errors import UnknownModelError
from deit_models.formats.layouts import layouts_of, read_config
from deit_models.models.deit import DeiT
from deit_models.models.layers import ImageClassifier
from deit_models.registry import meta_model

TIMM = {
    "dino_vits16": "vit_small_patch16_224",
    "dino_vits8": "vit_small_patch8_224",
    "dino_vitb16": "vit_base_patch16_224",
    "dino_vitb8": "vit_base_patch8_224",
}
SHORT = {"depth": 2, "img_size": 64}
LAYOUTS = ("native", "timm", "transformers")


def images(model: ImageClassifier) -> Tensor:
    return torch.randn(2, 3, *model.config.image_hw, generator=torch.Generator().manual_seed(1))


def short(name: str, **options: Any) -> ImageClassifier:
    return randomise(create_model(name, **{**SHORT, **options}).eval())


def test_names_are_those_of_timms_repositories() -> None:
    assert list(TIMM) == list_models("dino_*") == list_models("dino_*", pretrained=True)
    for name, architecture in TIMM.items():
        info = model_info(name)
        assert [source.repo for source in info.sources if source.layout == "timm"] == [f"timm/{architecture}.dino"]
        assert (info.num_classes, info.top1, set(info.accuracies)) == (0, None, {"k-NN top-1", "linear-probe top-1"})


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "depth", "img_size"),
    [
        *((name, 2, 64) for name in TIMM),
        ("dino_vits16", 12, 64),
        *(pytest.param(name, 12, 224, marks=pytest.mark.slow) for name in TIMM),
    ],
)
def test_features_are_timms_both_ways(name: str, depth: int, img_size: int) -> None:
    timm = pytest.importorskip("timm")
    options = {"depth": depth, "img_size": img_size}
    theirs = randomise(timm.create_model(f"{TIMM[name]}.dino", pretrained=False, **options)).eval()
    ours = create_model(name, **options).eval()
    assert theirs.pretrained_cfg["num_classes"] == ours.num_classes == 0
    mapped = layouts_of("deit").to_native(theirs.state_dict(), ours.state_dict(), config=ours.config)
    assert mapped[1:] == ([], [], [])
    ours.load_state_dict(mapped.tensors)
    assert len(ours.state_dict()) == 12 * depth + 6
    x = images(ours)
    assert ours(x).shape == (2, ours.config.embed_dim)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-4, rtol=1e-4)
    again = timm.create_model(f"{TIMM[name]}.dino", pretrained=False, **options).eval()
    again.load_state_dict(layouts_of("deit").from_native(ours.state_dict(), config=ours.config, naming="timm"))
    torch.testing.assert_close(again(x), ours(x), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", TIMM)
def test_folders_of_timm_load_and_ours_load_there(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.create_model(f"{TIMM[name]}.dino", pretrained=False, **SHORT)).eval()
    timm.models.save_for_hf(theirs, tmp_path / "theirs", model_args=SHORT)
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["pretrained_cfg"]["tag"] == "dino"
    ours = from_pretrained(tmp_path / "theirs")
    assert (ours.num_classes, ours.origin.name) == (0, name)
    assert deit_models.transform_for(ours).preprocessing.crop == (64, 64)
    torch.testing.assert_close(ours(images(ours)), theirs(images(ours)), atol=1e-4, rtol=1e-4)

    ours.save_pretrained(tmp_path / "ours", layout="timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    assert type(back) is type(theirs)
    torch.testing.assert_close(back(images(ours)), ours(images(ours)), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", TIMM)
def test_folders_of_transformers_load_and_ours_load_there(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = short(name)
    config = transformers.ViTConfig(
        hidden_size=ours.config.embed_dim, num_hidden_layers=2, num_attention_heads=ours.config.num_heads,
        intermediate_size=4 * ours.config.embed_dim, patch_size=ours.config.patch_size, image_size=64,
    )  # fmt: skip
    theirs = randomise(transformers.ViTModel(config)).eval()  # with a pooler, which nobody uses
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = from_pretrained(tmp_path / "theirs")
    assert loaded.num_classes == 0
    torch.testing.assert_close(loaded(images(ours)), theirs(images(ours))[0][:, 0], atol=1e-4, rtol=1e-4)

    ours.save_pretrained(tmp_path / "ours", layout="transformers")
    assert "AutoModel.from_pretrained(" in (tmp_path / "ours" / "README.md").read_text(encoding="utf-8")
    back = transformers.AutoModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False).eval()
    torch.testing.assert_close(back(images(ours))[0], ours.forward_features(images(ours)), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_backbone_comes_back_under_its_name_with_or_without_a_head(
    num_classes: int, layout: Any, tmp_path: Path
) -> None:
    for name in TIMM:
        model = short(name, num_classes=num_classes, depth=12, embed_dim=48, num_heads=3)
        model.save_pretrained(tmp_path / name, layout=layout)
        loaded = from_pretrained(tmp_path / name)
        assert loaded.config == model.config
        assert_same_state(loaded.state_dict(), model.state_dict())
        assert layout == "transformers" or loaded.origin.name == name


def test_shape_of_a_headless_vit_names_a_backbone_of_dino(tmp_path: Path) -> None:
    """A folder in transformers' layout holds no name."""
    for name in ("dino_vits16", "deit_small_patch16_224"):
        create_model(name, dtype=torch.bfloat16).save_pretrained(tmp_path / name, layout="transformers")
        assert from_pretrained(tmp_path / name).origin.name == name


def test_bare_files_load_with_or_without_a_head_that_somebody_trained(tmp_path: Path, own_registry: None) -> None:
    assert own_registry is None
    plain = short("dino_vits16")
    deit_models.register_model("short_dino", type(plain), plain.config)
    for path, model in (("body.pth", plain), ("whole.pth", short("dino_vits16", num_classes=7))):
        torch.save(model.state_dict(), tmp_path / path)
        loaded = from_pretrained(tmp_path / path, model="short_dino", cache_dir=tmp_path)
        assert_same_state(loaded.state_dict(), model.state_dict())
    with_head = from_pretrained(tmp_path / "body.pth", model="short_dino", num_classes=3, cache_dir=tmp_path)
    assert with_head(images(plain)).shape == (2, 3)


def full_checkpoint(model: nn.Module, other: nn.Module) -> dict[str, Any]:
    """What DINO's training saves: student and teacher, each with the head of the projection, which nobody loads."""
    head = {"head.mlp.0.weight": torch.rand(8, 8), "head.last_layer.weight_v": torch.rand(9, 8)}

    def of(network: nn.Module, prefix: str) -> dict[str, Tensor]:
        body = {f"{prefix}backbone.{name}": tensor for name, tensor in network.state_dict().items()}
        return body | {f"{prefix}{name}": tensor for name, tensor in head.items()}

    loss = {"center": torch.zeros(1, 9)}
    return {"student": of(other, "module."), "teacher": of(model, ""), "epoch": 3, "dino_loss": loss}


def test_full_checkpoints_give_the_teacher_or_the_student(
    tmp_path: Path, own_registry: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert own_registry is None
    teacher, student = short("dino_vits16"), randomise(create_model("dino_vits16", **SHORT), seed=1)
    deit_models.register_model("short_dino", type(teacher), teacher.config)
    torch.save(full_checkpoint(teacher, student), tmp_path / "full.pth")
    options: dict[str, Any] = {"model": "short_dino", "cache_dir": tmp_path}
    assert_same_state(from_pretrained(tmp_path / "full.pth", **options).state_dict(), teacher.state_dict())
    assert "payload='student.module.backbone' takes another" in caplog.text
    chosen = from_pretrained(tmp_path / "full.pth", payload="student.module.backbone", **options)
    assert_same_state(chosen.state_dict(), student.state_dict())


# timm's other plain ViTs


@pytest.mark.parametrize(
    ("architecture", "tag", "name"),
    [
        ("vit_tiny_patch16_224", "augreg_in21k_ft_in1k", "deit_tiny_patch16_224"),
        ("vit_small_patch16_384", "augreg_in1k", "deit_small_patch16_224"),
        ("vit_base_patch16_224", "augreg2_in21k_ft_in1k", "deit_base_patch16_224"),
        ("vit_base_patch16_384", "augreg_in1k", "deit_base_patch16_384"),
        ("vit_base_patch32_224", "sam_in1k", "vit_base_patch32_224"),
        ("vit_large_patch14_224", "untrained", "vit_large_patch14_224"),
    ],
)
def test_plain_vits_of_timm_load_by_their_shape(architecture: str, tag: str, name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(architecture, pretrained=False, num_classes=4)
    timm.models._hub.save_config_for_hf(theirs, tmp_path / "config.json")
    data = json.loads((tmp_path / "config.json").read_text())
    data["pretrained_cfg"]["tag"] = tag
    described = read_config(data)
    assert described.origin.name == name
    assert described.config.image_hw == theirs.patch_embed.img_size
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    model = meta_model(DeiT, described.config)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes


@torch.inference_mode()
def test_logits_of_a_plain_vit_are_timms(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    options = {"depth": 2, "img_size": 64, "num_classes": 4}
    theirs = randomise(timm.create_model("vit_small_patch32_224", pretrained=False, **options)).eval()
    timm.models.save_for_hf(theirs, tmp_path, model_args={"depth": 2, "img_size": 64})
    ours = from_pretrained(tmp_path)
    torch.testing.assert_close(ours(images(ours)), theirs(images(ours)), atol=1e-4, rtol=1e-4)
    assert deit_models.transform_for(ours).preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_small_patch16_18x2_224", {}),
        ("vit_small_patch16_224", {"reg_tokens": 4}),
        ("vit_small_patch16_224", {"class_token": False}),
    ],
)
def test_other_vits_of_timm_are_refused_by_name(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    cfg = {"tag": "x", "input_size": [3, 224, 224], "num_classes": 0}
    data = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": cfg, "model_args": options}
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "model.safetensors").write_bytes(b"")
    kind = ConfigError if options else UnknownModelError
    assert (next(iter(options), architecture)) in refusal(kind, lambda: from_pretrained(tmp_path))


# Without a head


def test_new_head_does_not_take_the_names_of_the_data_without_labels(tmp_path: Path) -> None:
    model = short("dino_vits16", embed_dim=24, num_heads=3)
    model.origin = replace(model.origin, dataset="ImageNet-1k")
    model.save_pretrained(tmp_path)
    assert deit_models.Classifier(from_pretrained(tmp_path, num_classes=1000)).labels[7] == "class 7"
    adapted = deit_models.adapt_head(from_pretrained(tmp_path), num_classes=1000)
    assert deit_models.Classifier(adapted).labels[7] == "class 7"
    model.reset_classifier(1000)
    assert deit_models.Classifier(model).labels[7] == "class 7"


def test_damaged_backbone_is_no_classifier(tmp_path: Path) -> None:
    short("dino_vits16", num_classes=5).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_classes": 5', '"num_classes": 0'))
    assert "head.weight" in refusal(CheckpointError, lambda: from_pretrained(tmp_path))
