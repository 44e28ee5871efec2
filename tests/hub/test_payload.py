"""The state dict of the named model is found among all that a training script saved, or the file asks which."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import assert_same_state, refusal, tiny_model
from torch import Tensor

from deit_models import CheckpointError, register_model
from deit_models.formats.layouts import layouts_of
from deit_models.hub.fetch import Access
from deit_models.hub.load import from_pretrained
from deit_models.hub.payload import Expected
from deit_models.hub.weights import read_tensors
from deit_models.models.layers import ImageClassifier

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> ImageClassifier:
    return tiny_model()


@pytest.fixture
def state(model: ImageClassifier) -> State:
    return dict(model.state_dict())


@pytest.fixture
def expected(model: ImageClassifier) -> Expected:
    return Expected(model, layouts_of("deit"), model.config)


def read(
    tmp_path: Path, contents: Any, expected: Expected, *, suffix: str = ".pth", payload: str | None = None
) -> State:
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        save_file(contents, path)
    else:
        torch.save(contents, path)
    return read_tensors(path, Access(cache_dir=tmp_path), source="x", payload=payload, expected=expected)[0]


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def other(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "prefix",
    ["net.", "encoder.student.", "model._orig_mod.module.", "_fsdp_wrapped_module.", "vit_backbone.0.", "a.b.c.d."],
)
def test_common_prefix_is_taken_off(tmp_path: Path, state: State, expected: Expected, prefix: str, suffix: str) -> None:
    assert_same_state(read(tmp_path, under(prefix, state), expected, suffix=suffix), state)


def test_wrappers_inside_the_model_are_taken_off(tmp_path: Path, state: State, expected: Expected) -> None:
    wrapped = {name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t for name, t in state.items()}
    assert_same_state(read(tmp_path, under("module.", wrapped), expected), state)


def test_prefix_of_transformers_is_no_wrapper(tmp_path: Path, model: ImageClassifier, expected: Expected) -> None:
    theirs = layouts_of("deit").from_native(model.state_dict(), naming="transformers", config=model.config)
    assert_same_state(read(tmp_path, under("net.", theirs), expected), theirs)
    assert_same_state(read(tmp_path, theirs, expected, suffix=".safetensors"), theirs)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"weights": s, "epoch": 3},
        lambda s: {"ema": under("module.", s), "optimizer": {"exp_avg": s}},
        lambda s: {"checkpoint": {"network": s}},
        lambda s: {"state_dict": {**under("model.", s), "criterion.weight": torch.ones(3)}},
        lambda s: {"student": s, "teacher": {"fc.weight": torch.ones(3)}},
        lambda s: {"student": {name: torch.zeros(5, 5) for name in s}, "best": s},
    ],
)
def test_the_one_state_dict_that_fits_is_found_under_any_key(
    tmp_path: Path, state: State, expected: Expected, wrap: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # read, and from the converted copy
        caplog.clear()
        assert_same_state(read(tmp_path, wrap(state), expected), state)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "payload=" in caplog.text


@pytest.mark.parametrize(
    ("first", "second"), [("model", "model_ema"), ("state_dict_ema", "state_dict"), ("teacher", "student")]
)
def test_known_scripts_evaluate_one_of_two(
    tmp_path: Path, state: State, expected: Expected, first: str, second: str, caplog: pytest.LogCaptureFixture
) -> None:
    contents = {second: under("module.", other(state)), first: state}
    assert_same_state(read(tmp_path, contents, expected), state)
    assert f"'{first}'" in caplog.text
    assert f"payload='{second}'" in caplog.text
    caplog.clear()
    assert_same_state(read(tmp_path, contents, expected, payload=second), other(state))
    assert not caplog.records


def test_teachers_of_self_distillation_keep_their_projection_heads_to_themselves(
    tmp_path: Path, state: State, expected: Expected, caplog: pytest.LogCaptureFixture
) -> None:
    student = {**under("module.backbone.", other(state)), "module.head.mlp.weight": torch.ones(2)}
    contents = {"student": student, "teacher": {**under("backbone.", state), "head.mlp.weight": torch.ones(2)}}
    assert_same_state(read(tmp_path, contents, expected), state)
    assert "1 tensors beside it are left out, such as 'head.mlp.weight'" in caplog.text
    assert "payload='student.module.backbone'" in caplog.text
    assert_same_state(read(tmp_path, contents, expected, payload="student"), other(state))


def test_several_that_fit_without_a_rule_are_named(tmp_path: Path, state: State, expected: Expected) -> None:
    contents = {"ema": state, "raw": {"weights": other(state)}}
    message = refusal(CheckpointError, lambda: read(tmp_path, contents, expected))
    assert "'ema', 'raw.weights'" in message
    assert "payload=" in message
    assert_same_state(read(tmp_path, contents, expected, payload="raw.weights"), other(state))
    assert_same_state(read(tmp_path, contents, expected, payload="raw"), other(state))


def test_payload_names_a_prefix_too(tmp_path: Path, state: State, expected: Expected) -> None:
    flat = {**under("model.", state), **under("ema_model.", other(state))}
    assert "'state_dict.ema_model'" in refusal(CheckpointError, lambda: read(tmp_path, {"state_dict": flat}, expected))
    found = read(tmp_path, {"state_dict": flat}, expected, payload="state_dict.ema_model")
    assert_same_state(found, other(state))
    assert_same_state(read(tmp_path, flat, expected, payload="model", suffix=".safetensors"), state)
    message = refusal(CheckpointError, lambda: read(tmp_path, {"state_dict": flat}, expected, payload="swa"))
    assert "'swa'; it has 'state_dict'" in message


def test_keys_with_dots_and_numbers_are_keys(tmp_path: Path, state: State, expected: Expected) -> None:
    assert_same_state(read(tmp_path, {"a.b": state, 3: other(state)}, expected, payload="a.b"), state)
    twice = {**state, 1: torch.zeros(1), "1": torch.ones(1)}
    assert "two tensors have the name" in refusal(CheckpointError, lambda: read(tmp_path, twice, expected))
    twice = {**under("_orig_mod.", state), "head.bias": state["head.bias"]}
    refusal(CheckpointError, lambda: read(tmp_path, twice, expected))


@pytest.mark.usefixtures("own_registry")
def test_option_reaches_the_file_and_labels_stay(tmp_path: Path, model: ImageClassifier, state: State) -> None:
    register_model("tiny", type(model), model.config, num_classes=10, img_size=32)
    averaged = other(state)
    torch.save({"model": state, "model_ema": averaged}, tmp_path / "x.ckpt")
    options: dict[str, Any] = {"model": "tiny", "cache_dir": tmp_path}
    assert_same_state(from_pretrained(tmp_path / "x.ckpt", **options).state_dict(), state)
    loaded = from_pretrained(tmp_path / "x.ckpt", payload="model_ema", **options)
    assert_same_state(loaded.state_dict(), averaged)
    assert loaded.origin is not None


@pytest.mark.parametrize("prefix", ["module.base_encoder.", "base_encoder."])
def test_moco_v3_needs_its_twelve_heads(tmp_path: Path, own_registry: None, prefix: str) -> None:
    assert own_registry is None
    shape = {"embed_dim": 384, "depth": 1, "img_size": 32}
    twelve = tiny_model("deit_small_patch16_224", **{**shape, "num_heads": 12})
    register_model("as_in_deit", type(twelve), twelve.config, num_heads=6)
    register_model("as_in_moco", type(twelve), twelve.config)
    body = {name: tensor for name, tensor in twelve.state_dict().items() if not name.startswith("head")}
    torch.save({"arch": "vit_small", "state_dict": under(prefix, body)}, tmp_path / "x.pth")
    options = {"num_classes": 4, "cache_dir": tmp_path}
    for payload in (None, "state_dict", "state_dict." + prefix[:-1]):
        message = refusal(
            CheckpointError,
            lambda payload=payload: from_pretrained(tmp_path / "x.pth", model="as_in_deit", payload=payload, **options),
        )
        assert "num_heads=12" in message
    loaded = from_pretrained(tmp_path / "x.pth", model="as_in_moco", **options).state_dict()
    assert_same_state({name: loaded[name] for name in body}, body)
