"""adapt_head: new heads for other classes, kept names, rows that begin warm, another size."""

from dataclasses import replace

import pytest
import torch
from coloured import atom

import deit_models
from deit_models.errors import ConfigError
from deit_models.finetuning.adapt import only_trained, trained_names
from deit_models.scoring.evaluation import class_labels, class_names_of
from deit_models.training.optim import layer_of_parameter

PETS = ("Pug", "tiger_cat", "ibex")


def named(model, names):
    model.origin = replace(model.origin, class_names=tuple(names))
    return model


@pytest.mark.parametrize("distilled", [False, True])
def test_heads_are_new_and_the_body_is_the_same(distilled):
    model = atom(distilled=distilled)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert deit_models.adapt_head(model, num_classes=7) is model
    assert model.num_classes == model.config.num_classes == 7
    heads = [head for head in (model.head, model.head_dist) if head is not None]
    assert len(heads) == 1 + distilled
    for head in heads:
        assert head.weight.shape == (7, 16)
        assert 0.01 < head.weight.std() < 0.03
        assert not head.bias.any()
    for name, tensor in model.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(tensor, before[name]), name
    model.train()
    output = model(torch.zeros(2, 3, 16, 16))
    assert [part.shape for part in (output if distilled else [output])] == [(2, 7)] * (1 + distilled)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("layout", ["native", "timm", "transformers"])
def test_class_names_are_kept_in_the_config(tmp_path, layout):
    model = deit_models.adapt_head(atom(), class_names=PETS)
    model.save_pretrained(tmp_path, layout=layout)
    assert deit_models.from_pretrained(tmp_path).origin.class_names == PETS


def test_accuracy_of_the_old_classes_is_forgotten():
    model = atom()
    old = {"top1": 80.0, "top5": 95.0, "notes": "old", "class_names": ("a",) * 10, "sha256": "0" * 64}
    model.origin = replace(model.origin, dataset="ImageNet-1k", **old)
    deit_models.adapt_head(model, num_classes=3)
    origin = model.origin
    assert (origin.top1, origin.top5, origin.notes, origin.class_names) == (None, None, None, None)
    assert (origin.sha256, origin.dataset) == (None, "ImageNet-1k")


def test_as_many_new_classes_are_not_called_by_the_old_names():
    model = atom(num_classes=1000)
    model.origin = replace(model.origin, dataset="ImageNet-1k")
    assert class_labels(model)[0] == "tench"
    deit_models.adapt_head(model, num_classes=1000)
    assert class_labels(model)[0] == "class 0"


@pytest.mark.parametrize("distilled", [False, True])
def test_warm_rows_are_those_of_the_class_of_the_same_name(distilled):
    model = named(atom(distilled=distilled, num_classes=4), ["tench, Tinca tinca", "pug, pug-dog", "Tiger Cat", "ibex"])
    old = {name: getattr(model, name).weight.clone() for name in model.head_names if getattr(model, name) is not None}
    with torch.no_grad():
        model.head.bias.copy_(torch.arange(4.0))
    deit_models.adapt_head(model, class_names=("zebra", "tiger-cat", "Pug", "tinca tinca"), warm_start=True)
    for name, weight in old.items():
        new = getattr(model, name).weight
        assert torch.equal(new[1:], weight[[2, 1, 0]])
        assert not torch.isin(new[0], weight).any()
    assert model.head.bias.tolist() == [0, 2, 1, 0]


def test_batchnorm_inside_a_head_is_taken_over_with_the_warm_rows():
    small = {"img_size": 32, "embed_dim": (16, 16, 16), "depth": (1, 1, 1), "num_heads": (1, 1, 1)}
    model = named(deit_models.create_model("levit_128s", num_classes=2, **small), ["ant", "bee"])
    with torch.no_grad():
        model.head.bn.running_mean.fill_(3.0)
    old = model.head.l.weight.clone()
    deit_models.adapt_head(model, class_names=("cow", "bee"), warm_start=True)
    assert torch.equal(model.head.l.weight[1], old[1])
    assert not torch.isin(model.head.l.weight[0], old).any()
    assert (model.head.bn.running_mean == 3).all()
    deit_models.adapt_head(model, class_names=("ant", "cow"))
    assert not model.head.bn.running_mean.any()


def test_without_warm_start_no_row_is_taken_over():
    model = named(atom(num_classes=2), ["ant", "bee"])
    old = model.head.weight.clone()
    deit_models.adapt_head(model, class_names=("ant", "cow"))
    assert not torch.isin(model.head.weight, old).any()


def test_the_same_classes_in_another_order_keep_their_rows():
    model = named(atom(num_classes=3), ["ant", "bee", "cow"]).eval()
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    deit_models.adapt_head(model, class_names=("cow", "ant", "bee"))
    assert torch.allclose(model(x), before[:, [2, 0, 1]])


def test_imagenet_names_are_known_without_being_in_the_checkpoint():
    model = atom(num_classes=1000)
    assert class_names_of(model) is None
    model.origin = replace(model.origin, dataset="ImageNet-1k")
    assert class_names_of(model)[0] == "tench"
    row = model.head.weight[0].clone()
    deit_models.adapt_head(model, class_names=("newt", "Tench"), warm_start=True)
    assert torch.equal(model.head.weight[1], row)


def test_another_size_interpolates_the_positions_as_loading_does(tmp_path):
    model = atom(distilled=True)
    model.save_pretrained(tmp_path)
    loaded = deit_models.from_pretrained(tmp_path, num_classes=4, img_size=(32, 48))
    deit_models.adapt_head(model, num_classes=4, img_size=(32, 48))
    assert torch.equal(model.pos_embed, loaded.pos_embed)
    assert model.origin.preprocessing == loaded.origin.preprocessing
    assert model.config == loaded.config
    assert model.eval()(torch.zeros(1, 3, 32, 48)).shape == (1, 4)


def test_size_alone_keeps_the_heads():
    model = named(atom(num_classes=3), ["ant", "bee", "cow"])
    head = model.head.weight.clone()
    deit_models.adapt_head(model, img_size=32)
    assert torch.equal(model.head.weight, head)
    assert model.origin.class_names == ("ant", "bee", "cow")


def test_mode_and_type_stay():
    model = atom().to(torch.bfloat16).eval()
    deit_models.adapt_head(model, num_classes=3)
    assert not model.training
    assert not model.head.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_twenty_thousand_classes(tmp_path):
    names = [f"species {number}" for number in range(20_000)]
    model = deit_models.adapt_head(atom(num_classes=1000), class_names=names)
    model.save_pretrained(tmp_path)
    assert deit_models.from_pretrained(tmp_path).origin.class_names == tuple(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to adapt to; pass num_classes, class_names or img_size"),
        ({"num_classes": 3, "class_names": ("a", "b")}, "num_classes=3, but 2 class_names"),
        ({"class_names": ("a", "b", "a")}, "class_names has 'a' twice"),
        ({"num_classes": 3, "warm_start": True}, "warm_start goes by names"),
        ({"class_names": ("a", "b"), "warm_start": True}, "warm_start goes by names"),
        ({"num_classes": 3, "img_size": 20}, "img_size=20 is not a multiple of patch_size=8; use 16 or 24"),
        ({"num_classes": 0}, "num_classes=0 is not a whole number above 0"),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(options, message):
    model = atom()
    before = model.head
    with pytest.raises(ConfigError, match=message):
        deit_models.adapt_head(model, **options)
    assert model.head is before
    assert model.num_classes == 10


def test_model_built_by_hand_is_refused():
    model = atom()
    model.origin = None
    with pytest.raises(ConfigError, match="has no origin"):
        deit_models.adapt_head(model, num_classes=3)


# The part that learns


@pytest.mark.parametrize(("mode", "layer"), [("full", 0), ("last-2", 1), ("last-1", 2), ("last-0", 3), ("head", 3)])
def test_mode_names_the_lowest_layer_that_learns(mode, layer):
    model = atom()
    layers = {name: layer_of_parameter(model, name) for name, _ in model.named_parameters()}
    assert trained_names(mode, model) == {name for name in layers if layers[name] >= layer}


def test_attention_mode_is_the_authors_list():
    """main.py of the authors, line 310: parameters with .attn. in their name, the head, the positions."""
    model = deit_models.create_model("deit3_small_patch16_224", depth=2)
    expected = {
        "head.weight", "head.bias", "pos_embed",
        *(f"blocks.{i}.attn.{part}.{kind}" for i in (0, 1) for part in ("qkv", "proj") for kind in ("weight", "bias")),
    }  # fmt: skip
    assert trained_names("attention", model) == expected
    distilled = deit_models.create_model("deit_micro_distilled_patch4_32", depth=2)
    assert trained_names("attention", distilled) == expected | {"head_dist.weight", "head_dist.bias"}
    with pytest.raises(ConfigError, match="the parameters of LeViT name no attention; use 'full'"):
        trained_names("attention", deit_models.create_model("levit_micro_cifar10"))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("heads", "mode='heads'; expected 'full', 'head', 'attention', or 'last-N' with a number of blocks"),
        ("last-", "expected 'full', 'head', 'attention', or 'last-N'"),
        ("last-3", "mode='last-3': the model has 2 blocks; 'full' trains everything"),
    ],
)
def test_mode_that_does_not_exist_is_refused(mode, message):
    with pytest.raises(ConfigError, match=message):
        trained_names(mode, atom())


def test_layers_below_are_frozen_for_a_while_and_fixed_parameters_stay_fixed():
    model = atom()
    model.norm.bias.requires_grad_(False)
    with only_trained(model, trained_names("last-1", model)):
        learning = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert {name.split(".")[0] for name in learning} == {"blocks", "norm", "head"}
    assert "norm.bias" not in learning
    assert not any(name.startswith("blocks.0") for name in learning)
    assert [name for name, tensor in model.named_parameters() if not tensor.requires_grad] == ["norm.bias"]
