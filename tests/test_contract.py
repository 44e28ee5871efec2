"""What every registered model must do, whatever its family: one suite over all names.

Each name is built at its real size on the meta device. The steps that compute run on a shrunken copy, once for each
shape that is left when width and depth are taken away; a new family adds one entry to `families.TINY`.
"""

import copy
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY
from small_sets import distributions, write_maps
from torch import Tensor, nn
from torch.nn import functional as F

import deit_models
from deit_models import CheckpointError, ConfigError, create_model, from_pretrained, list_models, model_info
from deit_models.augmentation.label_maps import LabelMaps
from deit_models.batches.loading import DamageCount
from deit_models.config import override
from deit_models.data.records import ArrayRecords
from deit_models.distributed import Process
from deit_models.formats.layouts import FAMILIES
from deit_models.models.layers import HeadLogits, ImageClassifier
from deit_models.recipes.recipe import Recipe
from deit_models.registry import model_spec
from deit_models.training.engine import train_epoch
from deit_models.training.learner import make_learner
from deit_models.training.optim import layer_count, layer_of_parameter, parameter_groups

NAMES = list_models()
ONE_SIZE = {"resmlp"}
"""Families whose weights cannot be fitted to another input size."""
NO_GRADIENT = "attn.proj_l.bias"
"""CaiT's, which adds one number to all scores of a head: the softmax takes it away again."""
LAYOUTS = ("native", "timm", "timm-conv", "transformers")


def step(name: str) -> int:
    """Pixels of which an input's sides are multiples."""
    config = override(model_spec(name).config, {**TINY[model_info(name).family], "img_size": 224})
    return getattr(config, "size_step", getattr(config, "patch_size", 16))


def build(name: str, **overrides: Any) -> ImageClassifier:
    """A shrunken model with random numbers everywhere, in eval mode: fresh ones hide mistakes behind zeros and ones."""
    options = {**TINY[model_info(name).family], "num_classes": 5, "img_size": 8 * step(name), **overrides}
    model = create_model(name, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.1, 0.5 if parameter.ndim == 1 else 0.2, generator=generator)
    return model.eval()


def shapes() -> dict[Any, str]:
    """The first name of each shrunken shape."""
    found: dict[Any, str] = {}
    for name in NAMES:
        found.setdefault(build(name).config, name)
    return found


SHAPES = sorted(shapes().values(), key=NAMES.index)
FIRST = [next(name for name in NAMES if model_info(name).family == family) for family in TINY]
"""One name for each family, for what takes seconds."""


@pytest.fixture(params=SHAPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> ImageClassifier:
    return build(name)


def images(model: ImageClassifier, *, batch: int = 2, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(batch, model.config.in_chans, *model.config.image_hw, generator=generator)


def heads_of(model: ImageClassifier) -> Iterator[nn.Module]:
    for name in model.head_names:
        head = getattr(model, name)
        if head is not None:
            yield head


def test_every_family_is_in_the_suite_and_has_its_layouts() -> None:
    families = {model_info(name).family for name in NAMES}
    assert families == set(TINY) >= set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_real_size_takes_no_memory_on_the_meta_device(name: str) -> None:
    model = create_model(name, device="meta")
    info = model_info(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == info.params
    assert model.family == info.family
    assert model.config.image_hw == (info.input_size, info.input_size)
    assert model.no_weight_decay() <= {parameter_name for parameter_name, _ in model.named_parameters()}
    # only the heads hang on the number of classes; a backbone has none
    other = create_model(name, device="meta", num_classes=info.num_classes + 1).state_dict()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    changed = {key for key, tensor in other.items() if tensor.shape != shapes.get(key)}
    assert set(shapes) == set(other) or not info.num_classes
    assert changed
    assert {key.split(".")[0] for key in changed} <= set(model.head_names)


def test_answers_have_their_shapes(model: ImageClassifier) -> None:
    x = images(model)
    logits, heads, tokens = model(x), model.forward_heads(x), model.forward_features(x)
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])
    assert isinstance(heads, HeadLogits)
    assert (heads.dist is not None) == getattr(model.config, "distilled", False)
    assert tokens.ndim == 3
    assert model.embed(x).shape == (2, tokens.shape[2])
    last = model.get_intermediate_layers(x, 1)[0]
    assert model.num_prefix_tokens + last.patches[0, 0].numel() == tokens.shape[1]
    assert last.prefix.shape[1] in (0, model.num_prefix_tokens)  # CaiT's class token joins after the blocks
    torch.testing.assert_close(logits[1:], model(x[1:]), atol=1e-4, rtol=1e-4)


def test_mode_changes_the_result_only_for_two_heads(model: ImageClassifier) -> None:
    model.train()
    out = model(images(model))
    if model.forward_heads(images(model)).dist is None:
        assert isinstance(out, Tensor)
    else:
        assert [logits.shape for logits in out] == [(2, 5), (2, 5)]


def test_every_parameter_gets_a_gradient(model: ImageClassifier) -> None:
    model.train()
    labels = torch.tensor([1, 2, 3, 4])
    forward = getattr(model, "forward_training", model.forward_heads)
    cls, dist, *extra = forward(images(model, batch=4))
    each = [logits for patches in extra if patches is not None for logits in patches.unbind(1)]
    sum(F.cross_entropy(logits, labels) for logits in (cls, dist, *each) if logits is not None).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0 or name.endswith(NO_GRADIENT), name


@pytest.mark.parametrize("steps", [(1, 1), (3, 5), (5, 3), (7, 7)])
def test_odd_sizes_can_be_built(name: str, steps: tuple[int, int]) -> None:
    height, width = (count * step(name) for count in steps)
    model = build(name, img_size=(height, width))
    assert model.config.image_hw == (height, width)
    assert model(images(model)).isfinite().all()
    last = model.get_intermediate_layers(images(model), 1)[0]
    assert (last.patches.shape[2] <= last.patches.shape[3]) == (height <= width)


def test_impossible_sizes_and_inputs_are_refused(name: str, model: ImageClassifier) -> None:
    side = step(name)
    with pytest.raises(ConfigError, match=f"{2 * side + 1}"):
        build(name, img_size=2 * side + 1)
    for shape in ((2, 3, 9 * side, 8 * side), (2, 1, 8 * side, 8 * side), (3, 8 * side, 8 * side)):
        with pytest.raises(ConfigError, match="input of"):
            model(torch.zeros(shape))


def test_unknown_option_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'num_clases'.*num_classes"):
        create_model(name, num_clases=3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_comes_back_bit_for_bit_or_is_refused(name: str, layout: Any, tmp_path: Path) -> None:
    model = build(name)
    try:
        model.save_pretrained(tmp_path / layout, layout=layout)
    except ConfigError:
        # what a family does not have is refused before anything is written
        assert layout != "native"
        assert not (tmp_path / layout).exists()
        return
    loaded = from_pretrained(tmp_path / layout)
    assert loaded.config == model.config
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert deit_models.transform_for(loaded).preprocessing == model.origin.preprocessing


def test_head_is_remade_for_other_classes_and_size(name: str, model: ImageClassifier, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    size = (6 * step(name), 5 * step(name))
    if model.family in ONE_SIZE:
        with pytest.raises(CheckpointError, match="these weights mix 8x8 patches"):
            from_pretrained(tmp_path, num_classes=3, img_size=size)
        size = model.config.image_hw
    changed = from_pretrained(tmp_path, num_classes=3, img_size=size)
    assert changed(images(changed)).shape == (2, 3)
    assert changed.config.image_hw == size
    before, after = model.state_dict(), changed.state_dict()
    kept = [key for key in before if key.split(".")[0] not in model.head_names and before[key].ndim in (2, 4)]
    assert kept
    assert all(torch.equal(before[key], after[key]) for key in kept if before[key].shape == after[key].shape)
    for head in heads_of(changed):
        assert all(tensor.isfinite().all() for tensor in head.state_dict().values())
    changed.reset_heads()
    assert changed(images(changed)).isfinite().all()


def test_bare_weights_tell_classes_and_size(name: str, model: ImageClassifier) -> None:
    config = create_model(name, **TINY[model.family], device="meta").config
    found = type(model).describe_state(model.state_dict(), config)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    default = create_model(name, **TINY[model.family], num_classes=5, device="meta").state_dict()
    depends_on_size = any(shapes[key] != tensor.shape for key, tensor in default.items())
    assert found.num_classes == 5
    assert found.image_hw == (model.config if depends_on_size else config).image_hw


def test_drop_rates_change_in_place(model: ImageClassifier) -> None:
    calm = model(images(model))
    model.set_drop_rates(drop_rate=0.5, drop_path_rate=0.5)
    assert (model.config.drop_rate, model.config.drop_path_rate) == (0.5, 0.5)
    torch.testing.assert_close(model(images(model)), calm)
    model.train()
    x = images(model, batch=8)
    assert not torch.equal(model.forward_heads(x).cls, model.forward_heads(x).cls)
    with pytest.raises(ConfigError, match="drop_path_rate"):
        model.set_drop_rates(drop_rate=0, drop_path_rate=1)


def test_weight_decay_spares_what_the_model_lists(model: ImageClassifier) -> None:
    listed = model.no_weight_decay()
    named = dict(model.named_parameters())
    assert listed <= set(named)
    decayed, spared = (set(map(id, group["params"])) for group in parameter_groups(model, 0.1))
    assert {id(named[name]) for name in listed if named[name].requires_grad} <= spared
    assert decayed


def test_attention_maps_sum_to_one_where_there_are_any(model: ImageClassifier) -> None:
    if not hasattr(model, "attention_maps"):
        with pytest.raises(ConfigError, match="no attention maps"):
            deit_models.attention_maps(model, images(model))
        return
    for maps in deit_models.attention_maps(model, images(model)):
        assert maps.ndim == 4
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))


def test_gradients_flow_through_attention_maps(model: ImageClassifier) -> None:
    if not hasattr(model, "attention_maps"):
        pytest.skip("this family has no attention")
    x = images(model).requires_grad_()
    last = deit_models.attention_maps(model, x)[-1]
    last[..., 0].square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("qkv" in name for name in learned)
    assert any("patch_embed" in name or "tokens_to_token" in name for name in learned)


def test_copy_is_independent(model: ImageClassifier) -> None:
    twin, x = copy.deepcopy(model), images(model)
    before = model(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.inference_mode()
def test_mixed_precision_survives_large_inputs(name: str, dtype: torch.dtype) -> None:
    model = create_model(name, **{**TINY[model_info(name).family], "img_size": 4 * step(name)}).eval()
    with torch.autocast("cpu", dtype):
        assert model(images(model, scale=10)).isfinite().all()


def test_half_precision_weights_run(name: str) -> None:
    model = build(name).to(torch.bfloat16)
    assert model(images(model).to(torch.bfloat16)).dtype == torch.bfloat16


def test_training_step_with_teacher_and_average(model: ImageClassifier) -> None:
    two_heads = model.forward_heads(images(model)).dist is not None
    recipe = Recipe(
        epochs=2, warmup_epochs=0, schedule="step", lr=0.01, batch_size=4, repeats=1, ema_decay=0.5,
        precision="float32", clip_grad=0.01, clip_mode="agc",
        distillation="hard", distill_on="token" if two_heads else "class",
    )  # fmt: skip
    device = torch.device("cpu")
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    learner = make_learner(
        model,
        recipe,
        num_classes=5,
        process=Process(0, 1, device),
        preprocessing=model.origin.preprocessing,
        teacher=teacher,
    )
    x, fine = images(model, batch=4), torch.full((4,), -1)
    damage = DamageCount(ArrayRecords("noise", [], [], [str(i) for i in range(5)]), limit=1.0)
    before = copy.deepcopy(model.state_dict())
    train_epoch(learner, [(x, torch.tensor([0, 1, 2, 3]), fine)] * 2, steps=2, epoch=0, damage=damage)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]) or name.endswith(NO_GRADIENT), name
    assert learner.average is not None
    for key, tensor in learner.average.module.model.state_dict().items():
        assert tensor.isfinite().all(), key


def test_token_labelling_with_mixtoken_trains_every_parameter(model: ImageClassifier, tmp_path: Path) -> None:
    records = ArrayRecords("noise", [], [0, 1, 2, 3], [str(i) for i in range(5)])
    maps = write_maps(tmp_path / "maps", records, distributions(4, 5, 3, 3))
    recipe = Recipe(
        batch_size=4, mixup=0.0, cutmix=0.0, ema_decay=0.5, lr_batch=0, lr=0.01, precision="float32",
        token_labels=0.5, mix_token=True, label_heads="both",
    )  # fmt: skip
    learner = make_learner(
        model,
        recipe,
        num_classes=5,
        process=Process(0, 1, torch.device("cpu")),
        preprocessing=model.origin.preprocessing,
        label_maps=LabelMaps(maps, records),
    )
    places = torch.tensor([[i, 0, 0, 1, 1, i % 2] for i in range(4)], dtype=torch.float64)
    batch = (images(model, batch=4), torch.tensor([0, 1, 2, 3]), torch.full((4,), -1), places)
    before = copy.deepcopy(learner.bare.state_dict())
    train_epoch(learner, [batch] * 3, steps=3, epoch=0, damage=DamageCount(records, limit=1.0))
    for name, parameter in learner.bare.named_parameters():
        if parameter.requires_grad and not name.endswith(NO_GRADIENT):
            assert not torch.equal(parameter, before[name]), name
    # without a box, MixToken changes nothing
    heads, tokens = learner.bare.train(), math.prod(learner.mixing.tokens.tokens)
    torch.manual_seed(0)
    plain = heads(images(model))
    torch.manual_seed(0)
    boxless = heads(images(model), torch.zeros(tokens, dtype=torch.bool))
    torch.testing.assert_close([x for x in boxless if x is not None], [x for x in plain if x is not None])
    assert plain[2].shape == (2, math.prod(learner.mixing.tokens.patches), 5)


def photographs(model: ImageClassifier) -> ArrayRecords:
    height, width = model.config.image_hw
    levels = torch.randint(0, 256, (16, height, width, 3), generator=torch.Generator().manual_seed(2))
    return ArrayRecords("noise", levels.byte().numpy(), [0, 1, 2, 3] * 4, list("abcd"))


@pytest.mark.parametrize("mode", ["full", "last-1", "head"])
def test_fine_tunes_in_every_mode_and_loads_again(model: ImageClassifier, mode: str, tmp_path: Path) -> None:
    recipe = deit_models.recipe_named("finetune", epochs=1, warmup_epochs=0, batch_size=4, precision="float32")
    before = copy.deepcopy(model.state_dict())
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad or name.endswith(NO_GRADIENT)}
    options = {"out": tmp_path, "mode": mode, "recipe": recipe, "val_fraction": 0.25, "device": "cpu", "workers": 0}
    if mode == "head" and getattr(model.config, "token_head", False):
        with pytest.raises(ConfigError, match="aux_head of T2TViT is not one linear layer on one vector an image"):
            deit_models.finetune(model, train=photographs(model), **options)
        return
    tuned = deit_models.finetune(model, train=photographs(model), **options).model
    learned = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    lowest = {"full": 0, "last-1": layer_count(model) - 1, "head": layer_count(model)}[mode]
    assert learned
    assert not {name for name in learned & fixed if not name.endswith(NO_GRADIENT)}
    assert {layer_of_parameter(model, name) for name in learned} <= set(range(lowest, layer_count(model) + 1))
    if mode != "head":
        assert (
            learned
            >= {name for name, _ in model.named_parameters() if layer_of_parameter(model, name) >= lowest} - fixed
        )
    loaded = from_pretrained(tmp_path / "best")
    assert loaded.origin is not None
    assert loaded.origin.class_names == ("a", "b", "c", "d")
    assert torch.equal(loaded(images(loaded)), tuned.eval()(images(loaded)))


# Compilers


@pytest.fixture
def _new_compiler() -> None:
    """What is compiled is kept by code, not by model: many models would meet the limit of recompilations."""
    torch.compiler.reset()


@pytest.mark.usefixtures("_new_compiler")
@pytest.mark.parametrize("name", FIRST)
def test_compiles_without_graph_breaks(name: str) -> None:
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(model)), model(images(model)))


@pytest.mark.slow
@pytest.mark.usefixtures("_new_compiler")
def test_compiled_code_answers_alike_and_learns(model: ImageClassifier) -> None:
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(images(model)), model(images(model)), atol=1e-3, rtol=1e-3)
    model.train()
    out = compiled(images(model))
    (out if isinstance(out, Tensor) else out[0] + out[1]).sum().backward()
    idle = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert idle <= {"patch_head.weight", "patch_head.bias"}  # not part of `forward`


def exported(model: ImageClassifier) -> nn.Module:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (images(model),), dynamic_shapes={"x": {0: batch}}).module()


@pytest.mark.parametrize("name", FIRST)
def test_exports_with_any_batch_size(name: str) -> None:
    model = build(name)
    torch.testing.assert_close(exported(model)(images(model, batch=3)), model(images(model, batch=3)))


@pytest.mark.slow
def test_every_shape_exports(model: ImageClassifier) -> None:
    torch.testing.assert_close(exported(model)(images(model, batch=3)), model(images(model, batch=3)))


# torch.fx, and what builds on it


def test_graph_of_torch_fx_gives_the_same_logits(model: ImageClassifier) -> None:
    traced = torch.fx.symbolic_trace(model)
    for batch in (1, 3):
        assert torch.equal(traced(images(model, batch=batch)), model(images(model, batch=batch)))
    if not torch.__version__.startswith("2.11"):  # which cannot pickle a graph of code whose annotations are strings
        again = pickle.loads(pickle.dumps(traced))
        assert torch.equal(again(images(model)), model(images(model)))


@torch.inference_mode()
def test_other_calls_trace_with_torch_fx_too(model: ImageClassifier) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> list[Any]:
            layers = self.net.get_intermediate_layers(x)
            maps = [self.net.attention_maps(x)[-1]] if hasattr(self.net, "attention_maps") else []
            return [self.net.embed(x), layers[-1].patches, *maps, *self.net.forward_heads(x)]

    for own, traced in zip(Parts()(images(model)), torch.fx.symbolic_trace(Parts())(images(model)), strict=True):
        assert own is traced is None or torch.equal(own, traced)


def test_graph_of_torch_fx_trains_as_the_model_does(name: str) -> None:
    rates = {"drop_rate": 0.1, "drop_path_rate": 0.2, "patch_drop_rate": 0.5}
    model = build(name, **{rate: value for rate, value in rates.items() if hasattr(model_spec(name).config, rate)})
    model.train()
    traced = torch.fx.symbolic_trace(model)
    outs = []
    for network in (model, traced):
        torch.manual_seed(0)
        out = network(images(model, batch=4))
        outs.append(out if isinstance(out, Tensor) else torch.cat(out))
    assert torch.equal(*outs)
    outs[1].sum().backward()
    idle = {name for name, p in traced.named_parameters() if p.requires_grad and p.grad is None}
    assert idle <= {"patch_head.weight", "patch_head.bias"}  # not part of `forward`


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.inference_mode()
def test_graph_of_torch_fx_computes_mixed_precision_as_the_model_does(name: str, dtype: torch.dtype) -> None:
    model = create_model(name, **{**TINY[model_info(name).family], "img_size": 4 * step(name)}).eval()
    traced, x = torch.fx.symbolic_trace(model), images(model, scale=10)
    with torch.autocast("cpu", dtype):
        assert torch.equal(traced(x), model(x))


@torch.inference_mode()
def test_torchvision_extracts_features(model: ImageClassifier) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    outputs = {}
    hooks = [
        dict(model.named_modules())[node].register_forward_hook(
            lambda _, __, out, node=node: outputs.__setitem__(node, out)
        )
        for node in ("blocks.0", model.head_names[0])
    ]
    model(images(model))
    for hook in hooks:
        hook.remove()
    with warnings.catch_warnings():  # dropout exists in one of the two graphs only
        warnings.filterwarnings("ignore", message="NOTE: The nodes obtained by tracing", category=UserWarning)
        extract = extraction.create_feature_extractor(model, return_nodes=list(outputs))
    found = extract.eval()(images(model))
    assert found.keys() == outputs.keys()
    for node, expected in outputs.items():
        assert torch.equal(found[node], expected)
