"""T2T-ViT's files as its authors wrote them: the right payload of a training checkpoint, read safely and once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import answer, assert_same_answer, assert_same_state, refusal, tiny_model
from toy_manifest import put_checkpoints_in_force
from tracing import calls_of

from deit_models import CheckpointError, ConfigError, from_pretrained, register_model
from deit_models.checkpoint import ModelInfo, Preprocessing, Source, load_manifest
from deit_models.hub.weights import unpickle_tensors
from deit_models.models.layers import ImageClassifier

SHAPE: dict[str, Any] = {"token_dim": 16, "img_size": 64, "num_classes": 7}


def tiny_t2t(name: str = "t2t_vit_7", *, seed: int = 0, **overrides: Any) -> ImageClassifier:
    model = tiny_model(name, seed=seed, **{**SHAPE, **overrides})
    model.reset_positions()
    return model


def training_checkpoint(model: ImageClassifier, average: ImageClassifier | None) -> dict[str, Any]:
    """What timm's saver writes: weights, optimiser, arguments, and their average under another key."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.head.weight.sum().backward()
    optimizer.step()
    data = {
        "epoch": 309,
        "arch": "t2t_vit_7",
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(model="t2t_vit_7", lr=5e-4, mean=None, aug_splits=0, amp=True),
        "version": 2,
        "metric": 71.7,
    }
    if average is not None:
        data["state_dict_ema"] = {f"module.{name}": tensor for name, tensor in average.state_dict().items()}
    return data


@pytest.fixture
def own_model(own_registry: object) -> ImageClassifier:
    """A tiny T2T-ViT under a name of its own, so that a bare file can say what it is."""
    assert own_registry is None
    model = tiny_t2t()
    register_model("tiny_t2t", type(model), model.config, num_classes=1000, img_size=224)
    return model


@pytest.fixture
def path(own_model: ImageClassifier, tmp_path: Path, hub_env: object) -> Path:
    assert hub_env
    path = tmp_path / "71.7_T2T_ViT_7.pth.tar"
    torch.save(training_checkpoint(tiny_t2t(seed=1), own_model), path)
    return path


def test_averaged_weights_are_taken_from_a_training_checkpoint(path: Path, own_model: ImageClassifier) -> None:
    loaded = from_pretrained(path, model="tiny_t2t")
    assert_same_state(loaded.state_dict(), own_model.state_dict())
    assert_same_answer(own_model, loaded)
    assert loaded.config.img_size == 64
    assert loaded.num_classes == 7


def test_plain_weights_are_taken_where_there_are_no_averaged_ones(tmp_path: Path, path: Path) -> None:
    plain = tiny_t2t(seed=1)
    torch.save(training_checkpoint(plain, None), tmp_path / "plain.pth.tar")
    assert_same_answer(plain, from_pretrained(tmp_path / "plain.pth.tar", model="tiny_t2t"))
    assert path.exists()


def test_cifar_file_is_read_from_its_own_payload(tmp_path: Path, path: Path, own_model: ImageClassifier) -> None:
    state = {f"module.{name}": tensor for name, tensor in own_model.state_dict().items()}
    torch.save({"net": state, "acc": 98.3, "epoch": 57}, tmp_path / "cifar.pth")
    assert_same_answer(own_model, from_pretrained(tmp_path / "cifar.pth", model="tiny_t2t"))
    assert path.exists()


def test_file_is_converted_once(path: Path, own_model: ImageClassifier) -> None:
    first = from_pretrained(path, model="tiny_t2t")
    again = []
    assert calls_of(unpickle_tensors, lambda: again.append(from_pretrained(path, model="tiny_t2t"))) == 0
    assert_same_state(again[0].state_dict(), first.state_dict())
    assert_same_answer(own_model, first)


def test_other_classes_and_size_need_no_more_than_saying_so(path: Path, own_model: ImageClassifier) -> None:
    loaded = from_pretrained(path, model="tiny_t2t", num_classes=3, img_size=(48, 96))
    assert answer(loaded).shape[-1] == 3
    assert loaded.config.grid == (3, 6)
    state = loaded.state_dict()
    # torch.equal is False where the shapes differ
    changed = {name for name, tensor in own_model.state_dict().items() if not torch.equal(state[name], tensor)}
    assert changed == {"pos_embed", "head.weight", "head.bias"}
    assert not loaded.pos_embed.requires_grad


def test_frozen_tables_stay_frozen_after_loading(path: Path) -> None:
    loaded = from_pretrained(path, model="tiny_t2t")
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}


def test_file_of_another_variant_is_refused_with_the_names(path: Path) -> None:
    message = refusal(CheckpointError, lambda: from_pretrained(path, model="t2t_vit_t_14"))
    assert "71.7_T2T_ViT_7.pth.tar: not the weights of this model" in message
    assert "tokens_to_token.attention1.kqv.weight" in message


def test_released_file_falls_under_the_manifest(
    hub_server: Any, path: Path, own_model: ImageClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_model("released_t2t", type(own_model), own_model.config)
    checkpoint = ModelInfo(
        name="released_t2t",
        family="t2t_vit",
        params=1,
        macs=1,
        input_size=64,
        num_classes=7,
        preprocessing=Preprocessing(resize=71, crop=(64, 64)),
        sources=(Source(url=hub_server.add_file(path.name, path.read_bytes()), layout="native"),),
    )
    put_checkpoints_in_force({"released_t2t": checkpoint}, monkeypatch)
    loaded = from_pretrained("released_t2t")
    assert_same_answer(own_model, loaded)
    assert loaded.origin.preprocessing.resize == 71
    assert answer(from_pretrained("released_t2t", num_classes=2, img_size=96)).shape[-1] == 2


def test_releases_of_the_manifest_name_no_payload_but_cifars() -> None:
    """An averaged state is preferred, a plain one accepted; only the CIFAR files have a payload of their own."""
    payloads = {
        name: source.payload
        for name, checkpoint in load_manifest().items()
        for source in checkpoint.sources
        if checkpoint.family == "t2t_vit"
    }
    assert len(payloads) == 15
    assert {name for name, payload in payloads.items() if payload == "net"} == {n for n in payloads if "cifar" in n}
    assert {payload for name, payload in payloads.items() if "cifar" not in name} == {None}


@pytest.mark.parametrize("layout", ["timm", "transformers"])
def test_layout_that_no_library_has_is_refused_before_anything_is_written(layout: str, tmp_path: Path) -> None:
    message = refusal(ConfigError, lambda: tiny_t2t().save_pretrained(tmp_path / "out", layout=layout))
    assert "layout='native'" in message
    assert not (tmp_path / "out").exists()
