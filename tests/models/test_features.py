"""Gradient checkpointing, maps of features and timm's names, the same for every family."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import KINDS, TINY
from torch import Tensor, nn
from torch.nn import functional as F

import deit_models
from deit_models import ConfigError, create_model, from_pretrained, model_info
from deit_models.models.layers import ImageClassifier
from deit_models.scoring.evaluation import Heads
from deit_models.training.optim import layer_count, layer_of_parameter

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {name: (model_info(name).family, {}) for name in KINDS.values()}
SHAPES["deit_tiny_distilled_patch16_224"] = ("deit", {"patch_drop_rate": 0.3})
IMAGES = torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


@pytest.fixture(params=SHAPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def built(name: str, **options: Any) -> ImageClassifier:
    family, own = SHAPES[name]
    torch.manual_seed(0)
    sizes = {"num_classes": 5, "img_size": 112, **TINY[family]}
    return create_model(name, **{**sizes, **own, "drop_rate": 0.2, "drop_path_rate": 0.3, **options})


@pytest.fixture
def model(name: str) -> ImageClassifier:
    return built(name, patch_drop_rate=0.0).eval() if "deit_" in name else built(name).eval()


# Gradient checkpointing


def learn(model: nn.Module, call: Callable[[Tensor], Any], **autocast: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step, from the same random numbers each time."""
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
        heads = [logits for logits in call(IMAGES) if logits is not None]
    loss = torch.stack([F.cross_entropy(logits.float(), LABELS) for logits in heads]).sum()
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model: ImageClassifier) -> int:
    """Bytes of different storages that a forward pass keeps for the backward pass, without the weights'."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.forward_heads(IMAGES)
    assert output.cls.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("mixed", [{}, {"dtype": "bf16"}], ids=["float32", "bf16"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradients_and_statistics_stay_the_same(name: str, training: bool, mixed: dict[str, str]) -> None:
    """With dropout, stochastic depth and dropped patches; and in eval mode, in which some recipes train."""
    plain = built(name).train(training)
    storing_less = copy.deepcopy(plain)
    storing_less.set_grad_checkpointing()
    expected, found = (learn(m, m.forward_heads, **mixed) for m in (plain, storing_less))
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][key], grad) for key, grad in expected[1].items())
    for (key, buffer), other in zip(storing_less.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, other), f"{key} counted a batch twice"


def test_less_is_stored_and_it_can_be_switched_off(name: str) -> None:
    model = built(name).train()
    before = saved_bytes(model)
    model.set_grad_checkpointing()
    assert saved_bytes(model) < 0.85 * before
    model.set_grad_checkpointing(False)
    assert saved_bytes(model) == before


def test_nothing_is_computed_twice_without_gradients(name: str) -> None:
    model, calls = built(name).eval(), []
    model.set_grad_checkpointing()
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(IMAGES)
    assert torch.equal(model(IMAGES), expected)
    assert len(calls) == 2
    model.train().forward_heads(IMAGES).cls.sum().backward()
    assert len(calls) == 4  # once in the backward pass


def test_graph_of_torch_fx_is_that_of_the_whole_model(name: str) -> None:
    model = built(name).eval()
    model.set_grad_checkpointing()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(IMAGES), model(IMAGES))


@pytest.mark.slow
def test_compiled_step_has_the_same_gradients(name: str) -> None:
    torch.compiler.reset()
    # torch's "aot_eager" cannot take back the dropout on the tokens of T2T-ViT, with or without this
    own = {"deit": {"patch_drop_rate": 0.0}, "t2t_vit": {"token_drop_rate": 0.0}}.get(SHAPES[name][0], {})
    plain = built(name, drop_rate=0.0, drop_path_rate=0.0, **own)
    storing_less = copy.deepcopy(plain.train())
    storing_less.set_grad_checkpointing()
    compiled = torch.compile(Heads(storing_less), fullgraph=True, backend="aot_eager")
    expected, found = learn(plain, plain.forward_heads), learn(storing_less, compiled)
    torch.testing.assert_close(found[0], expected[0])
    for key, grad in expected[1].items():
        torch.testing.assert_close(found[1][key], grad, atol=1e-4, rtol=1e-3, msg=key)
    for buffer, other in zip(storing_less.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_recipe_switches_it_on_and_trains_to_the_same_weights(precision: str, tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        model = tiny.model(distilled=True)
        recipe = tiny.recipe(tiny.LIVELY, epochs=2, grad_checkpointing=on, precision=precision)
        out = tmp_path / str(on)
        deit_models.train(model, recipe=recipe, train=tiny.Pictures(24), out=out, workers=0, device="cpu")
        assert model.grad_checkpointing is on
        results.append(model.state_dict())
    assert all(torch.equal(results[1][key], tensor) for key, tensor in results[0].items())


def test_recipe_is_refused_for_modules_without_a_switch(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
    with pytest.raises(ConfigError, match=r"grad_checkpointing=True: a Sequential has no set_grad_checkpointing"):
        deit_models.train(
            network, recipe=tiny.recipe(grad_checkpointing=True), train=tiny.Pictures(8), out=tmp_path / "out",
            workers=0, device="cpu", preprocessing=tiny.PREPROCESSING,
        )  # fmt: skip


# Maps of features


@torch.no_grad()
def test_intermediates_are_those_of_the_layers_in_order(model: ImageClassifier) -> None:
    info, count = model.feature_info, len(model.feature_levels)
    features, maps = model.forward_intermediates(IMAGES)
    assert torch.equal(features, model.forward_features(IMAGES))
    assert [map_.shape[1:] for map_ in maps] == [
        (entry["num_chs"], -(-112 // entry["reduction"]), -(-112 // entry["reduction"])) for entry in info
    ]
    assert all(map_.is_contiguous() for map_ in maps)
    for norm in (False, True):
        own = model.get_intermediate_layers(IMAGES, range(count), norm=norm)
        found = model.forward_intermediates(IMAGES, norm=norm, intermediates_only=True)
        assert all(torch.equal(map_, layer.patches) for map_, layer in zip(found, own, strict=True))
    assert all(isinstance(model.get_submodule(entry["module"]), nn.Module) for entry in info)


@torch.no_grad()
def test_chosen_intermediates_keep_the_order_of_the_layers(model: ImageClassifier) -> None:
    every = model.forward_intermediates(IMAGES, intermediates_only=True)
    for indices in (1, [-1, 0], [0]):
        found = model.forward_intermediates(IMAGES, indices, intermediates_only=True)
        numbers = [len(every) - 1] if indices == 1 else sorted(i % len(every) for i in indices)
        assert all(torch.equal(a, every[i]) for a, i in zip(found, numbers, strict=True))
    rows = model.forward_intermediates(IMAGES, 1, output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(rows.mT.reshape(every[-1].shape), every[-1])
    pairs = model.forward_intermediates(IMAGES, 1, return_prefix_tokens=True, intermediates_only=True)
    if model.num_block_prefix_tokens:
        assert pairs[0][1].shape == (4, model.num_prefix_tokens, model.num_features)
    else:
        assert torch.equal(pairs[0], every[-1])


@torch.no_grad()
def test_stopping_early_runs_no_later_layer(model: ImageClassifier) -> None:
    calls: list[int] = []
    model.blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    early, maps = model.forward_intermediates(IMAGES, [0], stop_early=True)
    assert calls == []
    late, whole = model.forward_intermediates(IMAGES, [0])
    assert calls == [1]
    assert torch.equal(maps[0], whole[0])
    assert early.shape[-1] == model.feature_info[0]["num_chs"]
    assert late.shape[-1] == model.num_features


def test_layers_and_formats_that_do_not_exist_are_refused(model: ImageClassifier) -> None:
    count = len(model.feature_levels)
    with pytest.raises(ConfigError, match=rf"this model has {model.level_name} 0 to {count - 1}"):
        model.forward_intermediates(IMAGES, [count])
    with pytest.raises(ConfigError, match=r"output_fmt='NHWC'; expected one of NCHW, NLC"):
        model.forward_intermediates(IMAGES, output_fmt="NHWC")


# timm's names for heads and parameters


@torch.no_grad()
def test_head_goes_on_where_the_features_end(model: ImageClassifier) -> None:
    features = model.forward_features(IMAGES)
    assert features.shape[-1] == model.num_features == model.head_hidden_size
    assert torch.equal(model.forward_head(features), model(IMAGES))
    assert torch.equal(model.forward_head(features, pre_logits=True), model.embed(IMAGES))
    assert model.train().forward_head(features).__class__ is model.eval().train()(IMAGES).__class__


@torch.no_grad()
def test_classifier_is_put_anew(model: ImageClassifier, tmp_path: Path) -> None:
    heads = model.get_classifier()
    assert (heads if isinstance(heads, tuple) else (heads,)) == tuple(
        getattr(model, key) for key in model.head_names if getattr(model, key) is not None
    )
    before = {key for key in model.state_dict() if key.partition(".")[0] not in model.head_names}
    embedded = model.embed(IMAGES)
    model.half().float().reset_classifier(3, model.global_pool)
    assert (model.num_classes, model.config.num_classes, model(IMAGES).shape) == (3, 3, (4, 3))
    assert not any(module.training for module in model.modules())
    assert before < set(model.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(IMAGES), model(IMAGES))
    model.reset_classifier(0)
    torch.testing.assert_close(model(IMAGES), embedded, atol=2e-2, rtol=2e-2)  # after .half()
    assert model.num_classes == 0
    model.reset_classifier(5)
    assert model(IMAGES).shape == (4, 5)


def test_wrong_classifiers_are_refused_and_change_nothing(model: ImageClassifier) -> None:
    for options, text in (
        ({"num_classes": -1}, "num_classes=-1"),
        ({"num_classes": 3, "global_pool": "max"}, f"global_pool='max'; a {type(model).__name__} has '"),
    ):
        with pytest.raises(ConfigError, match=text):
            model.reset_classifier(**options)
    assert model.num_classes == 5


def test_groups_of_parameters_are_the_layers(model: ImageClassifier) -> None:
    timm = pytest.importorskip("timm.models")
    last = layer_count(model)
    groups = timm.group_parameters(model, model.group_matcher(), reverse=True)
    # timm counts the final norm with the last block
    expected = {
        key: last - 1 if key.startswith("norm.") else layer_of_parameter(model, key)
        for key, _ in model.named_parameters()
    }
    assert groups == expected
    coarse = timm.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    ends = [level.layer for level in model.feature_levels]
    for key, group in coarse.items():
        if key.startswith("blocks."):
            assert group == 1 + next(i for i, end in enumerate(ends) if int(key.split(".")[1]) <= end)
