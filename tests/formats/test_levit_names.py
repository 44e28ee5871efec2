"""LeViT's tensor names in timm and transformers, by stage, and back."""

import pytest
import torch
from tiny_models import assert_same_state, refusal

from deit_models import CheckpointError, ConfigError, create_model
from deit_models.formats.layouts import FAMILIES
from deit_models.models.levit import LeViT, ScoredAttention

LEVIT = FAMILIES["levit"]
NAMINGS = ("native", "timm", "timm-conv", "transformers")


@pytest.fixture(scope="module")
def model() -> LeViT:
    return create_model("levit_128s", num_classes=3)


@pytest.mark.parametrize("naming", NAMINGS)
def test_names_close_the_circle(model: LeViT, naming: str) -> None:
    state = model.state_dict()
    renamed = LEVIT.from_native(state, config=model.config, naming=naming)
    assert LEVIT.tell_naming(renamed) == naming.removesuffix("-conv")
    mapped = LEVIT.to_native(renamed, state, config=model.config)
    assert mapped[1:] == ([], [], [])
    assert_same_state(mapped.tensors, state)


def test_names_are_those_of_the_other_libraries(model: LeViT) -> None:
    known = {
        ("timm", "patch_embed.0.c.weight"): "stem.conv1.linear.weight",
        ("timm", "blocks.0.m.attention_biases"): "stages.0.blocks.0.attn.attention_biases",
        ("timm", "blocks.4.kv.bn.weight"): "stages.1.downsample.attn_downsample.kv.bn.weight",
        ("transformers", "patch_embed.0.bn.bias"): "patch_embeddings.embedding_layer_1.batch_norm.bias",
        ("transformers", "blocks.1.m.0.c.weight"): "encoder.stages.0.layers.1.module.linear_up.linear.weight",
        ("transformers", "blocks.4.q.1.c.weight"): "encoder.stages.0.layers.4.queries.linear.weight",
        ("transformers", "head_dist.l.weight"): "classifier_distill.linear.weight",
    }
    for (naming, native), name in known.items():
        assert native in model.state_dict()
        assert LEVIT.other_names(native, naming, model.config) == (name,)


def test_convolutions_have_two_more_axes(model: LeViT) -> None:
    native = "blocks.1.m.0.c.weight"
    flat, conv = (
        LEVIT.from_native(model.state_dict(), config=model.config, naming=naming) for naming in ("timm", "timm-conv")
    )
    name = LEVIT.other_names(native, "timm", model.config)[0]
    assert conv[name].shape == (*flat[name].shape, 1, 1)


def test_index_buffers_of_the_authors_are_ignored(model: LeViT) -> None:
    state = model.state_dict()
    extra = {"blocks.0.m.attention_bias_idxs": torch.zeros(16, 16)}
    assert LEVIT.to_native(state | extra, state, config=model.config).unexpected == []


def test_tensor_without_a_place_and_impossible_config_are_refused(model: LeViT) -> None:
    assert "no name for gamma" in refusal(CheckpointError, lambda: LEVIT.other_names("gamma", "timm", model.config))
    wide = create_model("levit_128s", img_size=(224, 256), device="meta").config
    assert "squares only" in refusal(ConfigError, lambda: LEVIT.write_transformers(wide))


@pytest.mark.parametrize("img_size", [224, 128, 96])
def test_native_file_holds_the_authors_index_buffers(img_size: int) -> None:
    model = create_model("levit_128s", img_size=img_size)
    named = LEVIT.from_native(model.state_dict(), config=model.config, naming="native")
    own = {name: module.offsets for name, module in model.named_modules() if isinstance(module, ScoredAttention)}
    assert len(named) == len(model.state_dict()) + len(own) == 336
    for name, offsets in own.items():
        assert torch.equal(named[f"{name}.attention_bias_idxs"], offsets)
