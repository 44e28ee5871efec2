"""DeiT's tensor names in timm and transformers."""

import pytest
import torch
from formats.deit_names import read, renamed
from tiny_models import assert_same_state, refusal, tiny_model

from deit_models import CheckpointError, create_model
from deit_models.formats.layouts import FAMILIES
from deit_models.models.deit import DeiTConfig

DEIT = FAMILIES["deit"]
PLAIN, DISTILLED = DeiTConfig(), DeiTConfig(distilled=True)
TRANSFORMERS = ("transformers", "transformers-5")


@pytest.fixture(params=["deit_micro_patch4_32", "deit_micro_distilled_patch4_32"], ids=["plain", "distilled"])
def model(request):
    return tiny_model(request.param)


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "deit3_huge_patch14_224", "deit3_base_patch16_384"])
def test_deit3_has_the_authors_and_timms_names(name):
    model = tiny_model(name, depth=12)
    timm = DEIT.from_native(model.state_dict(), naming="timm", config=model.config)
    assert len(timm) == 14 * 12 + 8  # as many as in published files
    assert {"blocks.0.ls1.gamma", "blocks.11.ls2.gamma"} <= set(timm)
    for tensors, naming in ((timm, "timm"), (model.state_dict(), "native")):
        assert DEIT.tell_naming(tensors) == naming
        mapped = read(model, tensors)
        assert mapped[1:] == ([], [], [])
        assert_same_state(mapped.tensors, model.state_dict())


def test_deit3_file_is_not_taken_for_deit_nor_the_other_way_round():
    three, one = tiny_model("deit3_small_patch16_224"), tiny_model("deit_small_patch16_224")
    assert read(one, renamed(three, "timm")).unexpected
    assert read(three, one.state_dict()).missing == [f"blocks.{i}.gamma_{j}" for i in (0, 1) for j in (1, 2)]


@pytest.mark.parametrize(("name", "count"), [("deit_tiny_patch16_224", 200), ("deit_tiny_distilled_patch16_224", 203)])
def test_classic_names_are_as_many_as_in_published_files(name, count):
    assert len(renamed(create_model(name, device="meta"), "transformers")) == count


def test_names_are_those_transformers_uses():
    known = {
        ("transformers", "cls_token"): ("embeddings.cls_token",),
        ("transformers", "blocks.3.attn.proj.bias"): ("encoder.layer.3.attention.output.dense.bias",),
        ("transformers", "blocks.11.mlp.fc2.weight"): ("encoder.layer.11.output.dense.weight",),
        ("transformers-5", "blocks.3.attn.proj.bias"): ("layers.3.attention.o_proj.bias",),
        ("transformers-5", "blocks.0.attn.qkv.weight"): tuple(f"layers.0.attention.{p}_proj.weight" for p in "qkv"),
    }
    for (naming, native), names in known.items():
        assert DEIT.other_names(native, naming, PLAIN) == names
    assert DEIT.other_names("head.weight", "transformers", PLAIN) == ("classifier.weight",)
    assert DEIT.other_names("head.bias", "transformers", DISTILLED) == ("cls_classifier.bias",)


@pytest.mark.parametrize("naming", TRANSFORMERS)
def test_pooler_is_ignored(model, naming):
    tensors = renamed(model, naming, "vit.") | {
        "vit.pooler.dense.weight": torch.zeros(2),
        "pooler.dense.bias": torch.zeros(2),
    }
    mapped = read(model, tensors)
    assert mapped[1:] == ([], [], [])
    assert_same_state(mapped.tensors, model.state_dict())


def test_tensor_without_a_place_in_the_layout_is_refused():
    message = refusal(CheckpointError, lambda: DEIT.other_names("gamma", "transformers", PLAIN))
    assert "no name for gamma" in message


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_in_one_part_of_a_projection_are_refused(model, part, kind):
    tensors = renamed(model, "transformers", "vit.")
    name = f"vit.encoder.layer.1.attention.attention.{part}.weight"
    tensors[name] = tensors[name].to(kind)
    message = refusal(CheckpointError, lambda: read(model, tensors))
    assert f"attention.{part}.weight is {kind}, not floating point" in message


def test_two_names_of_one_tensor_are_refused(model):
    tensors = renamed(model, "transformers", "vit.")
    tensors["embeddings.cls_token"] = tensors["vit.embeddings.cls_token"] + 1
    assert "two names of one tensor" in refusal(CheckpointError, lambda: read(model, tensors))
