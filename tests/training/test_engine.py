"""The training loop: each step against arithmetic of its own, accumulation, overfitting, and what stops it."""

import copy
import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from deit_models.augmentation.mixing import Mix, Mixing
from deit_models.batches.loading import FINE, Batch, DamageCount
from deit_models.errors import TrainingError
from deit_models.recipes.recipe import Recipe
from deit_models.scoring.evaluation import evaluate
from deit_models.training import engine
from deit_models.training.engine import train_epoch
from deit_models.training.learner import Learner
from deit_models.training.run import train

DAMAGE = DamageCount(tiny.Pictures(1), 0.01)


def batches(count: int, size: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, tiny.SIZE, tiny.SIZE, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
            torch.full((size,), FINE),
        )
        for _ in range(count)
    ]


class Bar(list[Batch]):
    """Batches behind a progress bar, which notes the losses that it is given."""

    def __init__(self, batches: Any, total: int) -> None:
        super().__init__(batches)
        self.total, self.told = total, list[float]()

    def set_postfix(self, *, loss: float, refresh: bool) -> None:
        assert not refresh
        self.told.append(loss)


def test_progress_bar_is_given_the_mean_loss_so_far() -> None:
    learner, bars = tiny.learner(tiny.model(), tiny.recipe(accumulate=2)), []

    def watch(batches: Any, total: int) -> Bar:
        bars.append(Bar(batches, total))
        return bars[-1]

    done = train_epoch(learner, batches(6, 4), steps=3, epoch=0, damage=DAMAGE, watch=watch)
    (bar,) = bars
    assert (bar.total, len(bar.told)) == (6, 3)
    assert bar.told[-1] == pytest.approx(done.loss)
    assert bar.told[0] != pytest.approx(done.loss)


def test_cosub_sends_each_image_through_two_submodels() -> None:
    seen: list[Tensor] = []
    learner = tiny.learner(tiny.model(), tiny.recipe(cosub=True, drop_path_rate=0.5))
    learner.bare.register_forward_hook(lambda _, given, output: seen.extend([given[0], output]))
    (images, labels, failures), *_ = batches(1, 4)
    torch.manual_seed(0)
    train_epoch(learner, [(images, labels, failures)], steps=1, epoch=0, damage=DAMAGE)
    given, output = seen
    logits = output if isinstance(output, Tensor) else output[0]
    assert len(given) == len(logits) == 8
    assert torch.equal(given[:4], given[4:])
    assert not torch.allclose(logits[:4], logits[4:])


def run(learner: Learner, data: list[Batch], *, epoch: int = 0) -> engine.EpochLoss:
    copies = [(images.clone(), labels, failures) for images, labels, failures in data]  # mixing works in place
    steps = len(data) // learner.recipe.accumulate
    return train_epoch(learner, copies, steps=steps, epoch=epoch, damage=DAMAGE)


# ---- the authors' step, written down once more: float64, no optimiser, no loss function of torch


def teacher(images: Tensor) -> Tensor:
    """Fixed, and different for each image."""
    flat = images.flatten(1)
    weights = torch.linspace(-1, 1, 3 * flat.shape[1], dtype=flat.dtype).view(-1, 3)
    return flat @ torch.sin(40 * weights)


def mixed(images: Tensor, labels: Tensor, mix: Mix, smoothing: float) -> tuple[Tensor, Tensor]:
    size = len(labels)
    targets = torch.full((size, 3), smoothing / 3, dtype=torch.float64)
    targets[torch.arange(size), labels] += 1 - smoothing
    out, soft = torch.empty_like(images), torch.empty_like(targets)
    for row in range(size):
        partner = size - 1 - row
        if mix.box is None:
            out[row] = mix.share * images[row] + (1 - mix.share) * images[partner]
        else:
            top, bottom, left, right = mix.box
            out[row] = images[row]
            out[row, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        soft[row] = mix.share * targets[row] + (1 - mix.share) * targets[partner]
    return out, soft


def log_probabilities(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def authors_loss(settings: Any, cls: Tensor, dist: Tensor | None, soft: Tensor, answers: Tensor) -> Tensor:
    size = len(soft)
    if settings.loss == "ce":
        base = -(soft * log_probabilities(cls)).sum() / size
    else:
        hit, p = (soft > 0).double(), 1 / (1 + (-cls).exp())
        base = -(hit * p.log() + (1 - hit) * (1 - p).log()).sum() / (size * 3)
    if settings.distillation == "none":
        return base
    taught = cls if settings.distill_on == "class" else dist
    assert taught is not None
    if settings.distillation == "hard":
        said = log_probabilities(taught)[torch.arange(size), answers.argmax(dim=1)]
        learned = -said.sum() / size
    else:
        log_p, log_q = (log_probabilities(logits / settings.tau) for logits in (answers, taught))
        learned = settings.tau**2 / (size * 3) * (log_p.exp() * (log_p - log_q)).sum()
    return (1 - settings.alpha) * base + settings.alpha * learned


class HandMadeTraining:
    """AdamW as Loshchilov and Hutter write it, with the groups, the loss and the average of the authors' script."""

    def __init__(self, model: nn.Module, settings: Any) -> None:
        self.model = copy.deepcopy(model).double()
        self.settings = settings
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.model.named_parameters()}
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.step_number = 0

    def step(self, images: Tensor, labels: Tensor, mix: Mix, rate: float) -> float:
        settings, self.step_number = self.settings, self.step_number + 1
        images, soft = mixed(images.double(), labels, mix, settings.label_smoothing)
        cls, dist = self.model.forward_heads(images)
        loss = authors_loss(settings, cls, dist, soft, teacher(images))
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values() if g is not None))
        clip = min(1.0, settings.clip_grad / norm) if settings.clip_grad else 1.0
        for name, parameter in self.model.named_parameters():
            if gradients[name] is not None:
                self._update(name, parameter, gradients[name] * clip, rate)
            if settings.ema_decay:
                d = settings.ema_decay
                self.average[name] = d * self.average[name] + (1 - d) * parameter.detach()
        return float(loss.detach())

    def _update(self, name: str, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        b1, b2, t = self.settings.beta1, self.settings.beta2, self.step_number
        decayed = parameter.ndim > 1 and name not in ("pos_embed", "cls_token") and not name.endswith(".bias")
        first, second = self.moments[name]
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * gradient**2
        self.moments[name] = (first, second)
        with torch.no_grad():
            if decayed:
                parameter.mul_(1 - rate * self.settings.weight_decay)
            parameter.sub_(rate * (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + self.settings.eps))


MIXUP, CUTMIX = Mix(0.3, None), Mix(1 - 15 / 64, (2, 7, 1, 4))
CASES = {
    "plain": {},
    "no smoothing": {"label_smoothing": 0.0},
    "binary": {"loss": "bce", "label_smoothing": 0.0},
    "clipped": {"clip_grad": 0.2},
    "hard": {"distillation": "hard"},
    "soft": {"distillation": "soft", "tau": 3.0, "alpha": 0.9},
    "hard on the class head": {"distillation": "hard", "distill_on": "class"},
    "second head without a teacher": {"distillation": "none"},
}


class SameMix(Mixing):
    """The engine's mixing, with one draw for all batches."""

    def __init__(self, settings: Recipe, mix: Mix) -> None:
        super().__init__(settings, 3)
        self.mix = mix

    def draw(self, height: int, width: int) -> Mix:  # noqa: ARG002
        return self.mix


@pytest.mark.parametrize("mix", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_authors_rule_parameter_for_parameter(case: str, mix: Mix) -> None:
    settings = tiny.recipe(
        **{
            "epochs": 20,
            "warmup_epochs": 5,
            "schedule": "epoch_delayed",
            "lr": 1e-3,
            "weight_decay": 0.3,
            "eps": 1e-5,  # so that rounding errors in gradients near 0 are not blown up to whole steps
            "ema_decay": 0.7,
            "mixup": 0.8,
            "cutmix": 1.0,
            "label_smoothing": 0.1,
            **CASES[case],
        }
    )
    distilled = case in ("hard", "soft", "second head without a teacher")
    model = tiny.model(distilled=distilled)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    by_hand = HandMadeTraining(model, settings)
    learner = tiny.learner(model, settings, teacher=None if settings.distillation == "none" else teacher)
    learner.mixing = SameMix(settings, mix)
    rate = 1e-6 + 2 * (1e-3 - 1e-6) / 5  # epoch 3 runs at the rate of epoch 2
    data = batches(3, 8)
    losses = [by_hand.step(images, labels, mix, rate) for images, labels, _ in data]
    done = run(learner, data, epoch=3)
    assert done.lr == pytest.approx(rate, rel=1e-12)
    assert done.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    averaged = learner.versions()["ema_"].model.state_dict()
    moved = []
    for name, ours in model.state_dict().items():
        theirs = by_hand.model.get_parameter(name).detach()
        assert float((ours.double() - theirs).abs().max()) <= 1e-5, name
        assert float((averaged[name].double() - by_hand.average[name]).abs().max()) <= 1e-5, name
        moved.append(float((theirs - before[name]).abs().max()))
        untaught = "head_dist" in name and settings.distillation == "none"
        assert (moved[-1] == 0) == untaught, name
    assert max(moved) > 50 * 1e-5  # the tolerance means something


# ---- accumulation, clipping, precision, mode


def gradients_of_a_step(learner: Learner, data: list[Batch]) -> dict[str, Tensor]:
    """What the optimiser is given in the one step that `data` makes."""
    found: dict[str, Tensor] = {}

    def note(*_: Any) -> None:
        for name, parameter in learner.bare.model.named_parameters():
            found[name] = parameter.grad.clone()

    learner.optimizer.register_step_pre_hook(note)
    run(learner, data)
    return found


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    (whole,) = batches(1, 8)
    parts = [tuple(tensor[start : start + 2] for tensor in whole) for start in range(0, 8, 2)]
    results = []
    for accumulate, data in ((1, [whole]), (4, parts)):
        settings = tiny.recipe(accumulate=accumulate, distillation="soft", label_smoothing=0.1)
        learner = tiny.learner(tiny.model(distilled=True), settings, teacher=teacher)
        results.append(gradients_of_a_step(learner, data))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)
        assert gradient.abs().max() > 0, name


def test_accumulated_steps_are_as_many_and_report_the_same_loss() -> None:
    data = batches(4, 8)
    parts = [tuple(tensor[start : start + 4] for tensor in batch) for batch in data for start in (0, 4)]
    once, twice = (tiny.learner(tiny.model(), tiny.recipe(accumulate=count)) for count in (1, 2))
    first, second = run(once, data, epoch=1), run(twice, parts, epoch=1)
    assert (first.loss, first.lr) == (pytest.approx(second.loss, rel=1e-5), second.lr)
    assert first.images == second.images == 32
    assert first.lr == engine.learning_rate(once.recipe, 1, 3 / 4)
    for optimizer in (once.optimizer, twice.optimizer):
        assert {float(entry["step"]) for entry in optimizer.state.values()} == {4.0}


def test_clipping_mode_of_the_recipe_is_the_one_used() -> None:
    (batch,) = batches(1, 8)
    grown = tiny.model()
    with torch.no_grad():
        grown.head.weight.mul_(50)  # so that there is something to clip
    free, clipped, adaptive = (
        gradients_of_a_step(tiny.learner(copy.deepcopy(grown), tiny.recipe(**options)), [batch])
        for options in ({}, {"clip_grad": 0.5}, {"clip_grad": 1e-3, "clip_mode": "agc"})
    )
    norm = math.sqrt(sum(float((g**2).sum()) for g in free.values()))
    assert norm > 0.6
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient * 0.5 / norm, rtol=1e-4, atol=1e-7)
    weight, old, new = grown.head.weight.detach(), free["head.weight"], adaptive["head.weight"]
    limits = (1e-3 * weight.norm(dim=1).clamp(min=1e-3) / old.norm(dim=1)).clamp(max=1.0)
    torch.testing.assert_close(new, old * limits[:, None], rtol=1e-4, atol=1e-7)
    assert limits.min() < 1


def test_frozen_parts_train_without_dropout_and_keep_their_statistics() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(3))
    network(torch.zeros(1, 3, tiny.SIZE, tiny.SIZE))
    network[:2].requires_grad_(False)
    before = network[1].running_mean.clone()
    learner = tiny.learner(network, tiny.recipe())
    batch = (torch.randn(8, 3, tiny.SIZE, tiny.SIZE), torch.zeros(8, dtype=torch.long), torch.full((8,), -1))
    train_epoch(learner, [batch], steps=1, epoch=2, damage=DamageCount(tiny.Pictures(8), 0.0))
    assert torch.equal(network[1].running_mean, before)
    assert [module.training for module in network] == [False, False, True, True, True]


def test_train_mode_off_trains_without_stochastic_depth() -> None:
    data = batches(2, 8)
    weights = []
    for options in ({"train_mode": False}, {"drop_path_rate": 0.0, "drop_rate": 0.0}, {}):
        learner = tiny.learner(tiny.model(), tiny.recipe(**{"drop_path_rate": 0.5, "drop_rate": 0.2, **options}))
        torch.manual_seed(1)
        run(learner, data)
        weights.append(dict(learner.bare.state_dict()))
        assert learner.bare.training == options.get("train_mode", True)
    tiny.same_bits(weights[0], weights[1])
    assert max(difference for _, difference in tiny.differences(weights[0], weights[2])) > 1e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_comes_near(precision: str) -> None:
    data = batches(4, 8)
    exact, mixed_precision = (
        tiny.learner(tiny.model(), tiny.recipe(precision=kind, clip_grad=1.0)) for kind in ("float32", precision)
    )
    first, second = run(exact, data, epoch=1), run(mixed_precision, data, epoch=1)
    assert first.loss != second.loss
    assert first.loss == pytest.approx(second.loss, abs=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in mixed_precision.bare.parameters())


@pytest.mark.slow
def test_compiled_model_learns_the_same() -> None:
    data = batches(3, 8)
    plain, compiled = (tiny.learner(tiny.model(distilled=True), tiny.recipe(compile=on)) for on in (False, True))
    assert run(plain, data).loss == pytest.approx(run(compiled, data).loss, rel=1e-4)
    evaluated = [learner.bare.eval()(data[0][0]) for learner in (plain, compiled)]
    torch.testing.assert_close(evaluated[0].cls, evaluated[1].cls, rtol=1e-3, atol=1e-4)


# ---- it learns


@pytest.mark.parametrize("distilled", [False, True], ids=["plain", "distilled"])
def test_overfits_64_images(distilled: bool, tmp_path: Any) -> None:
    pictures = tiny.Pictures(64)
    model = tiny.model(distilled=distilled, embed_dim=32)
    known, truth = pictures.tensors(model.origin.preprocessing).flatten(1), pictures.labels

    def knows_them(images: Tensor) -> Tensor:
        nearest = torch.cdist(images.flatten(1), known).argmin(dim=1)
        return 10 * nn.functional.one_hot(truth[nearest], 3).float()

    settings = tiny.recipe(epochs=60, batch_size=16, lr=4e-3, distillation="hard" if distilled else "none")
    result = train(
        model,
        recipe=settings,
        train=pictures,
        out=tmp_path,
        workers=0,
        device="cpu",
        teacher=knows_them if distilled else None,
    )
    assert result.log[0]["loss"] > 0.9
    assert result.log[-1]["loss"] < 0.2
    figures = evaluate(model, pictures, workers=0, device="cpu")
    assert figures.images == 64
    assert figures.top1 > 99
    assert all(top1 > 99 for top1 in figures.heads.values())
    assert set(figures.heads) == ({"class", "distillation"} if distilled else set())


# ---- it stops


def test_diverging_loss_stops_with_step_and_rate() -> None:
    learner = tiny.learner(tiny.model(), tiny.recipe(lr=1e30, warmup_epochs=0))
    with pytest.raises(TrainingError, match=r"no longer a number at step [2-4] of epoch 0 \(learning rate 9.92e\+29\)"):
        run(learner, batches(6, 8))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_pictures_stop_before_they_spoil_a_weight(value: float) -> None:
    data = batches(3, 8)
    data[1][0][3, 0, 0, 0] = value
    learner = tiny.learner(tiny.model(), tiny.recipe())
    with pytest.raises(TrainingError, match="the loss is no longer a number at step 2 of epoch 0") as caught:
        run(learner, data)
    assert "\n" not in str(caught.value)
    assert all(parameter.isfinite().all() for parameter in learner.bare.parameters())


def test_weights_that_the_last_step_spoils_are_noticed() -> None:
    model = tiny.model()
    learner = tiny.learner(model, tiny.recipe())
    calls: list[Tensor] = []

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(gradient)
        return gradient * math.nan if len(calls) == 3 else gradient

    model.norm.weight.register_hook(spoil)
    with pytest.raises(TrainingError, match="the weights are no longer a number after epoch 0"):
        run(learner, batches(3, 8))
    assert len(calls) == 3


def test_student_without_distillation_head_is_refused() -> None:
    learner = tiny.learner(tiny.model(), tiny.recipe(distillation="hard"), teacher=teacher)
    with pytest.raises(TrainingError, match="needs a distillation head"):
        run(learner, batches(1, 8))


def test_foreign_network_with_too_few_logits_is_refused() -> None:
    learner = tiny.learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), tiny.recipe())
    with pytest.raises(TrainingError, match=r"targets have shape \(8, 3\), the student's logits \(8, 2\)"):
        run(learner, batches(1, 8))
