"""Tensor names: there and back without a changed bit, and refusals that speak the file's own language."""

import re

import pytest
import torch
from formats.deit_names import read, renamed
from tiny_models import answer, assert_same_state, refusal, tiny_model

from deit_models import CheckpointError, create_model
from deit_models.formats.layouts import FAMILIES
from deit_models.models.deit import DeiTConfig

PUBLISHED = [
    f"deit_{size}{distilled}_patch16_224" for size in ("tiny", "small", "base") for distilled in ("", "_distilled")
] + ["deit_base_patch16_384", "deit_base_distilled_patch16_384"]
NAMINGS = ("native", "timm", "transformers", "transformers-5")
TRANSFORMERS = ("transformers", "transformers-5")
DEIT = FAMILIES["deit"]
PLAIN, DISTILLED = DeiTConfig(), DeiTConfig(distilled=True)


@pytest.fixture(params=["deit_micro_patch4_32", "deit_micro_distilled_patch4_32"], ids=["plain", "distilled"])
def model(request):
    return tiny_model(request.param)


def assert_circle_closes(model):
    state = model.state_dict()
    for naming in ("transformers", "timm", "transformers-5", "native"):
        mapped = read(model, DEIT.from_native(state, naming=naming, config=model.config))
        assert mapped[1:] == ([], [], [])
        state = mapped.tensors
    assert_same_state(state, model.state_dict())


@pytest.mark.parametrize("name", PUBLISHED)
def test_round_trip_through_all_layouts_is_bit_identical(name):
    depth = create_model(name, device="meta").config.depth
    assert_circle_closes(tiny_model(name, depth=depth))


def test_round_trip_of_a_full_size_model_is_bit_identical():
    assert_circle_closes(create_model("deit_tiny_distilled_patch16_224"))


@pytest.mark.parametrize("prefix", ["vit.", "deit.", ""])
@pytest.mark.parametrize("naming", TRANSFORMERS)
def test_both_generations_are_read_under_any_prefix(model, naming, prefix):
    tensors = renamed(model, naming, prefix)
    body = [name for name in tensors if "classifier" not in name]
    assert all(name.startswith(prefix) for name in body)
    assert not any(name.startswith(("vit.", "deit.")) for name in set(tensors) - set(body))
    assert DEIT.tell_naming(tensors) == naming
    mapped = read(model, tensors)
    assert mapped[1:] == ([], [], [])
    assert_same_state(mapped.tensors, model.state_dict())


@pytest.mark.parametrize("naming", TRANSFORMERS)
def test_fused_rows_are_query_key_value(model, naming):
    tensors = renamed(model, naming)
    names = DEIT.other_names("blocks.1.attn.qkv.weight", naming, model.config)
    assert [re.search(r"(query|key|value|[qkv]_proj)", name)[0][0] for name in names] == ["q", "k", "v"]
    width = model.config.embed_dim
    for part, name in enumerate(names):
        fused = model.state_dict()["blocks.1.attn.qkv.weight"]
        assert torch.equal(tensors[name], fused[part * width : (part + 1) * width])
    before = answer(model)
    tensors[names[0]], tensors[names[2]] = tensors[names[2]], tensors[names[0]]
    model.load_state_dict(read(model, tensors).tensors)
    assert (answer(model) - before).abs().max() > 1e-3


def test_parts_of_different_shape_are_told_and_not_joined(model):
    tensors = renamed(model, "transformers", "vit.")
    query, key = (f"vit.encoder.layer.0.attention.attention.{part}.weight" for part in ("query", "key"))
    tensors[query], tensors[key] = torch.zeros(17, 16), torch.zeros(15, 16)  # together the right number of rows
    mapped = read(model, tensors)
    assert "blocks.0.attn.qkv.weight" not in mapped.tensors
    assert len(mapped.uneven) == 1
    assert f"{query} is (17, 16), {key} is (15, 16)" in mapped.uneven[0]
    assert mapped[1:3] == ([], [])


@pytest.mark.parametrize("naming", NAMINGS)
def test_missing_and_unexpected_are_told_in_the_files_own_names(model, naming):
    prefix = "vit." if naming in TRANSFORMERS else ""
    tensors = renamed(model, naming, prefix)
    lost = [n for n in tensors if "1." in n and n.endswith(("norm1.bias", "layernorm_before.bias"))]
    lost += [n for n in tensors if n.endswith(("head.bias", "classifier.bias"))]
    for name in lost:
        del tensors[name]
    tensors[f"{prefix}extra.weight"] = tensors["other"] = torch.zeros(1)
    mapped = read(model, tensors)
    assert len(lost) >= 2
    assert sorted(mapped.missing) == sorted(name.removeprefix("vit.") for name in lost)
    assert mapped.unexpected == sorted([f"{prefix}extra.weight", "other"])


def test_one_lost_part_of_a_fused_tensor_is_named_alone(model):
    tensors = renamed(model, "transformers")
    del tensors["encoder.layer.0.attention.attention.key.bias"]
    mapped = read(model, tensors)
    assert mapped[1:] == (["encoder.layer.0.attention.attention.key.bias"], [], [])
    assert "blocks.0.attn.qkv.bias" not in mapped.tensors


def test_unknown_names_are_refused_with_examples():
    message = refusal(
        CheckpointError, lambda: DEIT.tell_naming(["layer1.0.conv1.weight", "fc.bias", "bn1.weight", "zzz"])
    )
    assert "bn1.weight, fc.bias, layer1.0.conv1.weight" in message
    assert "zzz" not in message
    assert "none at all" in refusal(CheckpointError, lambda: DEIT.tell_naming([]))


@pytest.mark.parametrize(
    ("names", "library"),
    [
        (["cls_token", "layers.0.ln1.weight", "layers.0.attn.qkv.weight"], "mmpretrain"),
        (["backbone.pos_embed", "backbone.layers.0.ffn.layers.1.bias", "head.layers.head.weight"], "mmpretrain"),
        (["class_token", "encoder.layers.encoder_layer_0.mlp.0.weight"], "torchvision"),
        (["module.visual.transformer.resblocks.0.ln_1.weight"], "open_clip"),
        (["Transformer/encoderblock_0/LayerNorm_0/bias"], "JAX"),
    ],
)
def test_names_of_a_library_that_is_not_read_are_refused_with_its_name(names, library):
    assert f"tensor names of {library}" in refusal(CheckpointError, lambda: DEIT.tell_naming(names))


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    "extra",
    [
        ["mask_token", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.bias", "decoder_pos_embed"],
        ["masked_embed"],
        ["pooler.dense.weight", "embeddings.mask_token", "decoder.0.weight"],
        ["total_ops", "blocks.0.mlp.fc1.total_params", "head.total_ops"],
    ],
    ids=lambda names: names[0],
)
def test_parts_of_pretraining_and_counters_are_passed_over(model, naming, extra):
    tensors = {**renamed(model, naming), **{name: torch.zeros(2) for name in extra}}
    assert read(model, tensors)[1:] == ([], [], [])


@pytest.mark.parametrize("extra", ["register_tokens", "rel_pos.mask_tokens", "blocks.0.decoder.weight", "fc_norm.bias"])
def test_parts_that_change_the_result_are_not_passed_over(model, extra):
    assert read(model, {**renamed(model, "native"), extra: torch.zeros(2)}).unexpected == [extra]


def test_renamed_tensors_share_no_rows(model):
    tensors = renamed(model, "transformers")
    assert all(tensor.is_contiguous() for tensor in tensors.values())
