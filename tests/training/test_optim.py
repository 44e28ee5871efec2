"""Schedule, weight-decay groups, clipping and averaged weights, against the facts' figures, formulas, and timm."""

import copy
import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deit_models
from deit_models.distributed import shard_parameters
from deit_models.errors import ConfigError
from deit_models.recipes.recipe import Recipe, recipe_named
from deit_models.registry import list_models, model_spec
from deit_models.training.optim import (
    Lamb,
    WeightAverage,
    clip_adaptively,
    clip_gradients,
    learning_rate,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)

DEIT = recipe_named("deit_300e")
BY_EPOCH = recipe_named("deit_300e", schedule="epoch")


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 1e-6), (1, 2.008e-4), (4, 8.002e-4), (5, 9.993e-4), (150, 5.05e-4), (299, 1.0027e-5), (300, 1e-5)],
)
def test_schedule_gives_the_published_figures(epoch: int, rate: float) -> None:
    assert BY_EPOCH.peak_lr == pytest.approx(1e-3)
    assert learning_rate(BY_EPOCH, epoch) == pytest.approx(rate, rel=5e-5)


def test_schedule_is_the_authors_formula() -> None:
    for epoch in range(311):
        if epoch < 5:
            expected = 1e-6 + epoch * (1e-3 - 1e-6) / 5
        elif epoch < 300:
            expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 300))
        else:
            expected = 1e-5
        assert learning_rate(BY_EPOCH, epoch) == pytest.approx(expected, rel=1e-12)


def test_deit_runs_an_epoch_late_so_that_two_run_at_the_warm_up_rate() -> None:
    assert DEIT.schedule == "epoch_delayed"
    assert learning_rate(DEIT, 0) == learning_rate(DEIT, 1) == 1e-6
    for epoch in range(1, 301):
        assert learning_rate(DEIT, epoch, progress=0.7) == learning_rate(BY_EPOCH, epoch - 1)


def test_schedules_are_those_of_timm() -> None:
    scheduler = pytest.importorskip("timm.scheduler")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    timms = scheduler.CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in range(310):
        # the authors' loop: train at the rate that is set, then step with the number of the epoch just trained
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(DEIT, epoch), rel=1e-9)
        timms.step(epoch)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(BY_EPOCH, epoch), rel=1e-9)


def test_cool_down_of_t2t_runs_at_the_lowest_rate() -> None:
    t2t = recipe_named("deit_300e", schedule="epoch", cooldown_epochs=10)
    assert t2t.total_epochs == 310
    assert {learning_rate(t2t, epoch) for epoch in range(300, 310)} == {1e-5}
    assert learning_rate(t2t, 299) > 1e-5


def test_fine_tuning_rate_is_constant_after_the_warm_up() -> None:
    finetune = recipe_named("deit_finetune_384")
    assert finetune.peak_lr == pytest.approx(5e-6)
    rates = [learning_rate(finetune, epoch) for epoch in range(finetune.total_epochs)]
    assert rates[:2] == [1e-6, 1e-6]
    assert rates[2] == pytest.approx(1.8e-6)
    assert rates[6:] == pytest.approx([5e-6] * 24)


def test_step_schedule_has_no_jump_but_the_end_of_the_warm_up() -> None:
    steps = Recipe(epochs=20, warmup_epochs=4, schedule="step", lr_batch=0, lr=1e-3)
    for epoch in range(20):
        assert learning_rate(steps, epoch, 1.0) == pytest.approx(learning_rate(steps, epoch + 1, 0.0))
    moments = [(epoch, part / 50) for epoch in range(20) for part in range(50)]
    rates = [learning_rate(steps, *moment) for moment in moments]
    assert rates == pytest.approx([learning_rate(steps, 0, epoch + part) for epoch, part in moments])
    jumps = [after - before for before, after in pairwise(rates)]
    assert all(0 < jump < 6e-6 for jump in jumps[:199])
    # the cosine counts from epoch 0, so it begins below the peak
    assert rates[200] == pytest.approx(1e-5 + 0.99e-3 * (1 + math.cos(math.pi / 5)) / 2)
    assert all(-2e-6 < jump < 0 for jump in jumps[200:])


def test_constant_schedule_warms_up_by_step_and_stays() -> None:
    constant = Recipe(epochs=10, warmup_epochs=2, schedule="constant", lr_batch=0, lr=1e-3, warmup_lr=0.0)
    assert learning_rate(constant, 0, 0.5) == pytest.approx(0.25e-3)
    assert learning_rate(constant, 1, 0.5) == pytest.approx(0.75e-3)
    assert {learning_rate(constant, epoch, 0.3) for epoch in range(2, 10)} == {1e-3}


def test_without_warm_up_the_first_epoch_runs_at_the_peak() -> None:
    for schedule in ("epoch", "step", "epoch_delayed", "constant"):
        settings = Recipe(epochs=3, warmup_epochs=0, schedule=schedule, lr_batch=0, lr=1e-3)
        assert learning_rate(settings, 0) == pytest.approx(1e-3)


def test_rate_reaches_each_group_with_its_own_scale() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr_scale": 0.1}], lr=1.0)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


# ---- weight decay


def names_of(model: nn.Module, group: dict[str, object]) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}  # type: ignore[attr-defined]
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


@pytest.mark.parametrize("name", list_models("deit_*"))
def test_weight_decay_groups_of_every_deit(name: str) -> None:
    spec = model_spec(name)
    with torch.device("meta"):
        model = spec.model_class(spec.config)
    decayed, plain = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {parameter for parameter, _ in model.named_parameters()}
    vectors = {parameter for parameter in names if "norm" in parameter or parameter.endswith(".bias")}
    assert names_of(model, plain) == vectors | {"pos_embed", "cls_token"}
    assert names_of(model, decayed) == names - vectors - {"pos_embed", "cls_token"}
    assert ("dist_token" in names_of(model, decayed)) == spec.config.distilled


def test_weight_decay_groups_are_timms() -> None:
    timm_optim = pytest.importorskip("timm.optim")
    model = tiny.model(distilled=True)
    decayed, plain = parameter_groups(model, 0.05)
    theirs = timm_optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=("pos_embed", "cls_token"))
    assert {group["weight_decay"]: names_of(model, group) for group in theirs} == {
        0.0: names_of(model, plain),
        0.05: names_of(model, decayed),
    }


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny.model()
    model.patch_embed.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.1)
    assert names_of(model, decayed) | names_of(model, plain) == {
        name for name, _ in model.named_parameters() if not name.startswith("patch_embed")
    }


def test_layers_learn_at_falling_rates_from_the_head_down() -> None:
    model = tiny.model(distilled=True, depth=3)
    optimizer = make_optimizer(model, tiny.recipe(layer_decay=0.5))
    set_learning_rate(optimizer, 1.0)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in names_of(model, group)}
    assert set(rates) == {name for name, _ in model.named_parameters()}
    expected = {
        "patch_embed": 0.0625,
        "pos_embed": 0.0625,
        "cls_token": 0.0625,
        "dist_token": 0.0625,
        "norm": 1,
        "head": 1,
    }
    expected |= {f"blocks.{block}": 0.5 ** (3 - block) for block in range(3)} | {"head_dist": 1}
    for start, rate in expected.items():
        assert {value for name, value in rates.items() if name.startswith(start)} == {rate}
    plain, layered = (
        {
            name
            for group in make_optimizer(model, tiny.recipe(layer_decay=decay)).param_groups
            if not group["weight_decay"]
            for name in names_of(model, group)
        }
        for decay in (1.0, 0.5)
    )
    assert plain == layered


def test_layer_decay_scales_are_timms() -> None:
    timm, timm_optim = pytest.importorskip("timm"), pytest.importorskip("timm.optim")
    theirs = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    groups = timm_optim.param_groups_layer_decay(theirs, 0.05, theirs.no_weight_decay(), layer_decay=0.75)
    with torch.device("meta"):
        ours = model_spec("deit_tiny_patch16_224").model_class(model_spec("deit_tiny_patch16_224").config)
    scales = {name: group["lr_scale"] for group in groups for name in names_of(theirs, group)}
    for group in parameter_groups(ours, 0.05, 0.75):
        for name in names_of(ours, group):
            # the last norm learns with the head here, as in BEiT, and with the last block there
            expected = 1.0 if name.startswith("norm") else scales[name]
            assert group["lr_scale"] == pytest.approx(expected), name


def test_layer_decay_needs_a_model_that_tells_its_layers() -> None:
    with pytest.raises(ConfigError, match=r"layer_decay=0\.5: Linear does not tell its layers; use 1"):
        parameter_groups(nn.Linear(2, 2), 0.1, 0.5)


def test_foreign_modules_need_no_list() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    decayed, plain = parameter_groups(model, 0.1)
    assert names_of(model, decayed) == {"0.weight", "3.weight"}
    assert names_of(model, plain) == {"0.bias", "1.weight", "1.bias", "3.bias"}


def test_sgd_is_momentum_with_coupled_decay() -> None:
    model = nn.Linear(3, 2)
    settings = tiny.recipe(optimizer="sgd", beta1=0.8, weight_decay=0.1)
    optimizer = make_optimizer(model, settings)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    velocity = torch.zeros_like(weight)
    for step in range(3):
        set_learning_rate(optimizer, 0.5)
        gradient = torch.full_like(weight, 1.0 + step)
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(2)
        velocity = 0.8 * velocity + gradient + 0.1 * weight
        weight = weight - 0.5 * velocity
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight)
    torch.testing.assert_close(model.bias.detach(), bias)


@pytest.mark.parametrize("changes", [{}, {"beta1": 0.7, "beta2": 0.95, "eps": 1e-3}], ids=["defaults", "other figures"])
def test_adamw_takes_the_recipes_figures(changes: dict[str, float]) -> None:
    model = nn.Linear(4, 2, bias=False).double()
    optimizer = make_optimizer(model, tiny.recipe(weight_decay=0.2, **changes))
    b1, b2, eps = ({"beta1": 0.9, "beta2": 0.999, "eps": 1e-8} | changes).values()
    weight, first, second = model.weight.detach().clone(), torch.zeros(2, 4), torch.zeros(2, 4)
    for step in range(1, 4):
        set_learning_rate(optimizer, 0.1)
        # down to the size of eps, where it shows
        gradient = step * torch.logspace(-9, 0, 8, dtype=torch.float64).view(2, 4)
        model.weight.grad = gradient.clone()
        optimizer.step()
        first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2
        weight = weight * (1 - 0.1 * 0.2)
        weight = weight - 0.1 * (first / (1 - b1**step)) / ((second / (1 - b2**step)).sqrt() + eps)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-9, atol=1e-12)


# ---- clipping


def with_gradients(scale: float) -> nn.Module:
    """Convolution, linear layer, norm and a token, with gradients from tiny to large and some of them zero."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6), nn.LayerNorm(6))
    model.register_parameter("token", nn.Parameter(torch.randn(1, 1, 7)))
    model.register_parameter("unused", nn.Parameter(torch.randn(2, 2)))
    for name, parameter in model.named_parameters():
        if name != "unused":
            parameter.grad = torch.randn_like(parameter) * torch.logspace(-4, 1, parameter.shape[-1]) * scale
    model[1].weight.data[0] = 0  # its norm counts as eps
    model[1].weight.grad[1] = 0
    return model


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("factor", [0.01, 0.5])
def test_adaptive_clipping_is_timms(scale: float, factor: float) -> None:
    agc = pytest.importorskip("timm.utils.agc")
    ours, theirs = with_gradients(scale), with_gradients(scale)
    clip_adaptively(ours.parameters(), factor)
    agc.adaptive_clip_grad(theirs.parameters(), factor)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-9, msg=name)


def test_adaptive_clipping_limits_each_row_to_its_weights() -> None:
    model, before = with_gradients(1.0), with_gradients(1.0)
    clip_gradients(model, tiny.recipe(clip_grad=0.1, clip_mode="agc"))
    weight, gradient, old = model[1].weight.detach(), model[1].weight.grad, before[1].weight.grad
    for row in range(6):
        limit = 0.1 * max(float(weight[row].norm()), 1e-3)
        expected = old[row] * min(1.0, limit / max(float(old[row].norm()), 1e-6))
        torch.testing.assert_close(gradient[row], expected)
    vector = model[2].weight
    assert float(vector.grad.norm()) == pytest.approx(0.1 * float(vector.detach().norm()), rel=1e-5)
    assert model.unused.grad is None


def test_norm_clipping_scales_all_gradients_together() -> None:
    def gradients(model: nn.Module) -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    before = gradients(with_gradients(1.0))
    for limit in (1.0, 1e6, 0.0):
        model = with_gradients(1.0)
        clip_gradients(model, tiny.recipe(clip_grad=limit))
        factor = 1.0 / float(before.norm()) if limit == 1.0 else 1.0
        torch.testing.assert_close(gradients(model), before * factor, rtol=1e-5, atol=0)


# ---- LAMB

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "lamb.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_lamb_gives_the_reference_steps(case: dict[str, Any]) -> None:
    known = GOLDEN["parameters"]
    weights = {one["name"]: nn.Parameter(torch.tensor(one["initial"], dtype=torch.float64)) for one in known}
    groups = [
        {"params": [weights[one["name"]] for one in known if one["weight_decay"] == decayed], "weight_decay": decay}
        for decayed, decay in ((True, case["weight_decay"]), (False, 0.0))
    ]
    optimizer = Lamb(groups, lr=0.0, eps=GOLDEN["settings"]["eps"])
    for lr, gradients, expected in zip(case["lr"], GOLDEN["gradients"], case["after_step"], strict=True):
        for name, values in gradients["values"].items():
            weights[name].grad = torch.tensor(values, dtype=torch.float64)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        for name, values in expected.items():
            torch.testing.assert_close(
                weights[name].detach(), torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-8, msg=name
            )


def test_lamb_is_timms_over_fifty_steps() -> None:
    timms = pytest.importorskip("timm.optim").Lamb
    ours = deit_models.create_model("deit3_small_patch16_224", depth=2, embed_dim=16, num_heads=2, img_size=32)
    theirs = copy.deepcopy(ours)
    recipe = Recipe(optimizer="lamb", weight_decay=0.05, lr=4e-3, lr_batch=0)
    optimizers = make_optimizer(ours, recipe), timms(parameter_groups(theirs, 0.05), lr=4e-3, eps=1e-8)
    assert type(optimizers[0]) is Lamb
    for step in range(50):
        torch.manual_seed(step)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one) * 10 ** (step % 5 - 4)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_lamb_clips_all_gradients_together_and_takes_a_closure() -> None:
    """Adam's first step has the length of lr for any gradient, but where it is not far above epsilon."""
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = Lamb([{"params": [first]}, {"params": [second]}], lr=0.5, eps=1.0)

    def closure() -> str:
        assert torch.is_grad_enabled()
        first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
        return "loss"

    assert optimizer.step(closure) == "loss"
    assert [float(one.detach()) for one in (first, second)] == pytest.approx(
        [1 - 0.5 * x / (1 + x) for x in (0.6, 0.8)]
    )


def test_lamb_without_gradients_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(2))
    Lamb([weight], lr=1.0).step()
    assert weight.tolist() == [1.0, 1.0]


def test_nesterov_is_timms_sgd() -> None:
    timms = pytest.importorskip("timm.optim")
    ours = nn.Linear(3, 2)
    theirs = copy.deepcopy(ours)
    recipe = Recipe(optimizer="nesterov", weight_decay=1e-4, lr=0.1, lr_batch=0)
    optimizers = make_optimizer(ours, recipe), timms.create_optimizer_v2(theirs, "sgd", lr=0.1, weight_decay=1e-4)
    for step in range(5):
        torch.manual_seed(step)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# ---- averaged weights


class Calls(TorchDispatchMode):
    """How often each operator is called, aside from `detach`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.detach.default:
            self.counts[func._schema.name] += 1
        return func(*args, **kwargs or {})


def test_average_follows_the_whole_state_from_the_first_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    average = WeightAverage(model, 0.9)
    expected = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        model(torch.randn(4, 3, 5, 5))  # moves the running statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update_parameters(model)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = 0.9 * expected[name] + 0.1 * tensor.double()
            else:
                expected[name] = tensor.double()  # a counter is copied
    averaged = average.module.state_dict()
    assert averaged.keys() == expected.keys()
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6, msg=name)
    assert not torch.equal(averaged["1.running_mean"], torch.zeros(4))


def test_average_is_a_frozen_copy_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    before = copy.deepcopy(model.state_dict())
    average = WeightAverage(model, 0.5)
    assert not any(module.training for module in average.module.modules())
    assert not any(parameter.requires_grad for parameter in average.parameters())
    tiny.same_bits(dict(average.module.state_dict()), dict(before))
    with torch.no_grad():
        model[0].weight.zero_()
    tiny.same_bits(dict(average.module.state_dict()), dict(before))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_average_copies_whole_numbers() -> None:
    """A lookup table is not to drift: 0.9999 * 7 + 0.0001 * 7 is 6.9999999 in floats, and 6 when cut off."""
    options = {"embed_dim": (16, 16), "depth": (1, 1), "num_heads": (2, 2), "key_dim": 8}
    model = deit_models.create_model("levit_128s", img_size=64, num_classes=3, **options)
    average = WeightAverage(model, 0.9999)
    for _ in range(5):
        average.update_parameters(model)
    tables = {name: table for name, table in model.named_buffers() if name.endswith("offsets")}
    assert len(tables) == 3
    for name, table in tables.items():
        assert torch.equal(average.module.get_buffer(name), table), name


def test_average_takes_one_call_for_each_type() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)), nn.BatchNorm1d(3))
    model.register_buffer("short", torch.arange(4.0, dtype=torch.bfloat16))
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(4)
    with Calls() as mode:
        average.update_parameters(model)
    assert mode.counts == {"aten::_foreach_lerp_": 2, "aten::_foreach_copy_": 1}
    assert average.module.short.tolist() == [2, 3, 4, 5]
    assert average.module.short.dtype == torch.bfloat16
    assert int(average.module[-1].num_batches_tracked) == 4
    torch.testing.assert_close(average.module[0].weight, model[0].weight - 2)


def test_average_asks_nothing_of_the_device() -> None:
    """A counter or a comparison on a GPU would wait for all that is queued there."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = WeightAverage(model, 0.5)
    with Calls() as mode:
        average.update_parameters(model)
    assert "aten::_local_scalar_dense" not in mode.counts


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "nesterov", "lamb"])
def test_optimisers_move_divided_parameters(optimizer: str) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(3, 2)
        before = model.weight.detach().clone()
        average = WeightAverage(model, 0.5)
        shard_parameters(model)
        shard_parameters(average.module)
        chosen = make_optimizer(model, tiny.recipe(optimizer=optimizer, lr=0.1, weight_decay=0.0))
        model(torch.ones(1, 3)).sum().backward()
        chosen.step()
        average.update_parameters(model)
        moved = model.weight.full_tensor()
        assert (moved < before).all()
        torch.testing.assert_close(average.module.weight.full_tensor(), (before + moved) / 2)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "nesterov"])
def test_optimisers_are_fused(optimizer: str) -> None:
    assert make_optimizer(nn.Linear(3, 2), tiny.recipe(optimizer=optimizer)).defaults["fused"] is True


def test_adaptive_clipping_makes_few_calls_for_each_parameter() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Calls() as mode:
        clip_adaptively(model.parameters(), 0.01)
    assert mode.counts.total() <= 2 * 40 + 6


def test_adaptive_clipping_of_no_gradients_does_nothing() -> None:
    clip_adaptively(nn.Linear(2, 2).parameters(), 0.01)
