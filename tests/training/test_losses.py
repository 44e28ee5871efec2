"""The losses against arithmetic done by hand with `math`, and which head each of them reaches."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from torch.nn import functional as F

from deit_models import DeitModelsError
from deit_models.checkpoint import Preprocessing
from deit_models.errors import TrainingError
from deit_models.models.layers import HeadLogits
from deit_models.recipes.recipe import Recipe
from deit_models.training.losses import (
    DistillationLoss,
    WithLoss,
    binary_cross_entropy,
    hard_distillation,
    several_labels,
    soft_distillation,
    soft_target_cross_entropy,
)
from deit_models.training.teacher import Teacher

STUDENT = [[1.0, -0.5, 2.0], [0.3, 0.2, -1.0]]
DIST = [[0.4, 0.1, -0.7], [-1.5, 0.8, 0.6]]
TEACHER = [[2.0, 0.5, -1.0], [-0.4, 0.1, 1.2]]
TARGETS = [[0.7, 0.0, 0.3], [0.05, 0.9, 0.05]]
TAU = 3.0


# The formulas, written out with Python's floats


def softmax(row: list[float], tau: float = 1.0) -> list[float]:
    total = sum(math.exp(value / tau) for value in row)
    return [math.exp(value / tau) / total for value in row]


def cross_entropy_by_hand(logits: list[list[float]], targets: list[list[float]]) -> float:
    rows = [
        -sum(y * math.log(q) for y, q in zip(target, softmax(row), strict=True))
        for row, target in zip(logits, targets, strict=True)
    ]
    return sum(rows) / len(rows)


def binary_by_hand(logits: list[list[float]], present: list[list[bool]]) -> float:
    losses = []
    for row, truth in zip(logits, present, strict=True):
        for value, there in zip(row, truth, strict=True):
            probability = 1 / (1 + math.exp(-value))
            losses.append(-math.log(probability if there else 1 - probability))
    return sum(losses) / len(losses)


def soft_by_hand(student: list[list[float]], teacher: list[list[float]], tau: float) -> float:
    total = 0.0
    for row, wanted in zip(student, teacher, strict=True):
        for q, p in zip(softmax(row, tau), softmax(wanted, tau), strict=True):
            total += p * (math.log(p) - math.log(q))
    return tau**2 * total / (len(student) * len(student[0]))


def hard_by_hand(student: list[list[float]], decisions: list[int]) -> float:
    return sum(-math.log(softmax(row)[k]) for row, k in zip(student, decisions, strict=True)) / len(student)


CE = cross_entropy_by_hand(STUDENT, TARGETS)
BCE = binary_by_hand(STUDENT, [[True, False, True], [True, True, True]])
DECISIONS = [0, 2]  # the largest entries of TEACHER's rows


def tensors(*rows: list[list[float]], **options: object) -> list[Tensor]:
    return [torch.tensor(values, **options) for values in rows]  # type: ignore[arg-type]


def test_soft_target_cross_entropy():
    assert soft_target_cross_entropy(*tensors(STUDENT, TARGETS)).item() == pytest.approx(CE, rel=1e-6)


def test_cross_entropy_of_one_two_numbers_is_known():
    # softmax of (0, ln 3) is (1/4, 3/4)
    loss = soft_target_cross_entropy(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.5, 0.5]]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, rel=1e-6)


def test_binary_cross_entropy_counts_every_mixed_class_as_present():
    assert binary_cross_entropy(*tensors(STUDENT, TARGETS)).item() == pytest.approx(BCE, rel=1e-6)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation(tau: float):
    expected = soft_by_hand(STUDENT, TEACHER, tau)
    assert soft_distillation(*tensors(STUDENT, TEACHER), tau).item() == pytest.approx(expected, rel=1e-5)


def test_soft_distillation_is_the_usual_batch_mean_over_the_number_of_classes():
    student, teacher = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).chunk(2)
    usual = F.kl_div((student / TAU).log_softmax(-1), (teacher / TAU).softmax(-1), reduction="batchmean") * TAU**2
    torch.testing.assert_close(soft_distillation(student, teacher, TAU), usual / 5)


def test_soft_distillation_of_equal_logits_is_zero():
    (logits,) = tensors(STUDENT)
    assert soft_distillation(logits, logits + 7, TAU).item() == pytest.approx(0, abs=1e-7)


def test_a_class_the_teacher_rules_out_adds_nothing():
    student = torch.tensor([[0.0, 0.0, 5.0]], requires_grad=True)
    loss = soft_distillation(student, torch.tensor([[0.0, 0.0, -math.inf]]), 1.0)
    q = softmax([0.0, 0.0, 5.0])
    assert loss.item() == pytest.approx((math.log(0.5) - math.log(q[0])) / 3, rel=1e-5)
    loss.backward()
    assert student.grad.isfinite().all()


def test_hard_distillation():
    expected = hard_by_hand(STUDENT, DECISIONS)
    assert hard_distillation(*tensors(STUDENT, TEACHER)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, other: soft_target_cross_entropy(logits, other.float().softmax(-1)),
        lambda logits, other: binary_cross_entropy(logits, other),
        lambda logits, other: soft_distillation(logits, other, 2.0),
        hard_distillation,
    ],
)
def test_losses_are_computed_in_float32(loss):
    generator = torch.Generator().manual_seed(1)
    logits, other = torch.randn(4, 1000, generator=generator), torch.randn(4, 1000, generator=generator)
    half = loss(logits.bfloat16(), other.bfloat16())
    assert half.dtype == torch.float32
    # what rounding the inputs costs, and not what bfloat16 sums of a thousand terms would
    torch.testing.assert_close(half, loss(logits.bfloat16().float(), other.bfloat16().float()), rtol=1e-6, atol=0)


def test_only_the_student_gets_a_gradient():
    for loss in (hard_distillation, lambda s, t: soft_distillation(s, t, TAU)):
        student, teacher = tensors(STUDENT, TEACHER, requires_grad=True)
        loss(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad.abs().sum() > 0


def test_gradient_of_soft_distillation():
    (student,) = tensors(STUDENT, requires_grad=True)
    (teacher,) = tensors(TEACHER)
    soft_distillation(student, teacher, TAU).backward()
    # d/dz of the loss: tau * (q - p) / (B * K)
    expected = [
        [TAU * (q - p) / 6 for q, p in zip(softmax(row, TAU), softmax(wanted, TAU), strict=True)]
        for row, wanted in zip(STUDENT, TEACHER, strict=True)
    ]
    torch.testing.assert_close(student.grad, torch.tensor(expected))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_teacher_logits_made_in_inference_mode_do_no_harm(kind: str):
    with torch.inference_mode():
        (teacher_logits,) = tensors(TEACHER)
    student, dist = tensors(STUDENT, DIST, requires_grad=True)
    loss = distilling(distillation=kind)(HeadLogits(student, dist), torch.tensor(TARGETS), teacher_logits)
    loss.backward()
    assert dist.grad.abs().sum() > 0


# The loss of a recipe


def some_teacher() -> Teacher:
    return Teacher(lambda x: x.mean(dim=(2, 3)), student=Preprocessing(resize=4, crop=(4, 4)))


def distilling(**fields: object) -> DistillationLoss:
    return DistillationLoss(Recipe(**{"distillation": "hard", **fields}), teacher=some_teacher())


@pytest.mark.parametrize("base", ["ce", "bce"])
@pytest.mark.parametrize("distill_on", ["token", "class"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_loss_of_a_recipe(base: str, distill_on: str, kind: str):
    loss = distilling(
        distillation=kind, distill_on=distill_on, loss=base, alpha=0.3, tau=TAU, label_smoothing=0.0
    )  # fmt: skip
    cls, dist, targets, teacher = tensors(STUDENT, DIST, TARGETS, TEACHER)
    taught = DIST if distill_on == "token" else STUDENT
    learned = soft_by_hand(taught, TEACHER, TAU) if kind == "soft" else hard_by_hand(taught, DECISIONS)
    expected = 0.7 * (CE if base == "ce" else BCE) + 0.3 * learned
    assert loss(HeadLogits(cls, dist), targets, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert loss((cls, dist), targets, teacher).item() == pytest.approx(expected, rel=1e-5)
    if distill_on == "class":
        assert loss(cls, targets, teacher).item() == pytest.approx(expected, rel=1e-5)
        assert loss(HeadLogits(cls, None), targets, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("base", "expected"), [("ce", CE), ("bce", BCE)])
def test_without_distillation_the_second_output_is_ignored(base: str, expected: float):
    loss = DistillationLoss(Recipe(loss=base, label_smoothing=0.0), teacher=None)
    cls, dist = tensors(STUDENT, DIST, requires_grad=True)
    for output in (cls, (cls, dist), HeadLogits(cls, dist), HeadLogits(cls, None)):
        assert loss(output, torch.tensor(TARGETS)).item() == pytest.approx(expected, rel=1e-6)
    loss(HeadLogits(cls, dist), torch.tensor(TARGETS)).backward()
    assert dist.grad is None


@pytest.mark.parametrize("fields", [{"distillation": "none"}, {"distillation": "soft", "distill_on": "class"}])
def test_an_untrained_head_is_told_of_once(fields: dict[str, str], caplog: pytest.LogCaptureFixture):
    teacher = None if fields["distillation"] == "none" else some_teacher()
    loss = DistillationLoss(Recipe(**fields), teacher=teacher)
    cls, dist, targets, logits = tensors(STUDENT, DIST, TARGETS, TEACHER)
    with caplog.at_level(logging.WARNING, logger="deit_models"):
        loss(cls, targets, logits)
        loss(HeadLogits(cls, None), targets, logits)
        assert not caplog.records
        loss(HeadLogits(cls, dist), targets, logits)
        loss(HeadLogits(cls, dist), targets, logits)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the distillation head is not trained" in caplog.text


@pytest.mark.parametrize("base", ["ce", "bce"])
def test_without_a_teacher_both_heads_may_learn_from_the_labels(base: str, caplog: pytest.LogCaptureFixture):
    recipe = Recipe(loss=base, label_heads="both", label_smoothing=0.0)
    cls, dist = torch.randn(4, 3), torch.randn(4, 3)
    targets = torch.eye(3)[[0, 1, 2, 0]]
    alone = DistillationLoss(Recipe(loss=base, label_smoothing=0.0), teacher=None)
    loss = DistillationLoss(recipe, teacher=None)
    expected = (alone(cls, targets) + alone(dist, targets)) / 2
    assert loss(HeadLogits(cls, dist), targets) == pytest.approx(float(expected))
    assert loss(HeadLogits(cls, None), targets) == pytest.approx(float(alone(cls, targets)))
    assert not caplog.records


def test_a_trained_head_is_not_warned_of(caplog: pytest.LogCaptureFixture):
    cls, dist, targets, logits = tensors(STUDENT, DIST, TARGETS, TEACHER)
    distilling()(HeadLogits(cls, dist), targets, logits)
    assert not caplog.records


@pytest.mark.parametrize("train_mode", [True, False])
def test_both_heads_and_tokens_of_a_model_learn_in_either_mode(train_mode: bool):
    model = tiny_model(num_classes=3).train(train_mode)
    output = model.forward_heads(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    distilling()(output, torch.tensor(TARGETS), torch.tensor(TEACHER)).backward()
    for parameter in (model.head.weight, model.head_dist.weight, model.cls_token, model.dist_token):
        assert parameter.grad.abs().sum() > 0


def test_each_head_hears_its_own_voice():
    cls, dist = tensors(STUDENT, DIST, requires_grad=True)
    loss = distilling(alpha=0.25)(HeadLogits(cls, dist), torch.tensor(TARGETS), torch.tensor(TEACHER))
    loss.backward()
    # of cross-entropy: (softmax - target) / B, times its weight
    for head, logits, wanted, weight in (
        (cls, STUDENT, TARGETS, 0.75),
        (dist, DIST, [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], 0.25),
    ):
        expected = [
            [weight * (q - y) / 2 for q, y in zip(softmax(row), row_wanted, strict=True)]
            for row, row_wanted in zip(logits, wanted, strict=True)
        ]
        torch.testing.assert_close(head.grad, torch.tensor(expected))


def test_loss_adds_nothing_to_a_students_state():
    student = torch.nn.Linear(2, 3)
    before = list(student.state_dict())
    teacher = Teacher(torch.nn.Conv2d(3, 3, 1), student=Preprocessing(resize=4, crop=(4, 4)))
    student.loss = DistillationLoss(Recipe(distillation="hard"), teacher=teacher)
    assert list(student.state_dict()) == before
    assert len(list(student.parameters())) == 2


# Refusals


def refused(loss: DistillationLoss, *arguments: object) -> str:
    with pytest.raises(TrainingError) as caught:
        loss(*arguments)
    assert isinstance(caught.value, DeitModelsError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_token_distillation_of_a_model_with_one_output_is_refused():
    cls, targets, teacher = tensors(STUDENT, TARGETS, TEACHER)
    for output in (cls, HeadLogits(cls, None)):
        message = refused(distilling(), output, targets, teacher)
        assert "distilled=True" in message
        assert "distill_on='class'" in message


def test_missing_teacher_logits_are_refused():
    cls, dist, targets = tensors(STUDENT, DIST, TARGETS)
    assert "teacher's logits" in refused(distilling(), HeadLogits(cls, dist), targets, None)


def test_shapes_that_would_broadcast_are_refused():
    cls, dist, targets, teacher = tensors(STUDENT, DIST, TARGETS, TEACHER)
    heads = HeadLogits(cls, dist)
    assert "(2, 1)" in refused(distilling(), heads, targets[:, :1], teacher)
    assert "(1, 3)" in refused(distilling(), heads, targets, teacher[:1])
    assert "(2,)" in refused(distilling(), heads, torch.tensor([0, 1]), teacher)


def test_recipe_and_teacher_must_go_together():
    with pytest.raises(TrainingError, match="needs a teacher"):
        DistillationLoss(Recipe(distillation="soft"), teacher=None)
    with pytest.raises(TrainingError, match="distillation='none'"):
        DistillationLoss(Recipe(), teacher=some_teacher())


# Co-training of submodels


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_cosub_is_the_authors_formula(loss: str) -> None:
    """A quarter each, entry by entry; no gradient flows through the other pass's probabilities."""
    first, second, targets = tensors([[0.3, -1.2, 2.0], [1.0, 0.1, -0.4]], [[1.3, 0.2, -2.0], [0.5, 0.6, 0.7]], TARGETS)
    first.requires_grad_()
    recipe = Recipe(cosub=True, loss=loss, label_smoothing=0.0)
    found = DistillationLoss(recipe, teacher=None)(torch.cat([first, second]), targets)
    wanted = (targets > 0).double() if loss == "bce" else targets.double()

    def entropy(z: float, y: float) -> float:
        p = 1 / (1 + math.exp(-z))
        return -(y * math.log(p) + (1 - y) * math.log(1 - p))

    total, slope = 0.0, torch.zeros(2, 3, dtype=torch.float64)
    for row in range(2):
        for k in range(3):
            a, b, y = (float(of[row, k].detach()) for of in (first, second, wanted))
            p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
            total += (entropy(a, y) + entropy(b, y) + entropy(a, q) + entropy(b, p)) / (4 * 6)
            slope[row, k] = ((p - y) + (p - q)) / (4 * 6)
    assert float(found.detach()) == pytest.approx(total, rel=1e-5)
    (gradient,) = torch.autograd.grad(found, first)
    torch.testing.assert_close(gradient.double(), slope, atol=1e-7, rtol=1e-5)


# A model with its loss


@pytest.mark.parametrize("name", ["deit_micro_patch4_32", "deit_micro_distilled_patch4_32"])
def test_model_with_loss_averages_the_losses_of_its_heads(name: str) -> None:
    model = tiny_model(name, num_classes=3).train()
    x, labels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0])
    found = WithLoss(model)(pixel_values=x, labels=labels)
    heads = [head for head in model.forward_heads(x) if head is not None]
    rows = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    expected = sum(cross_entropy_by_hand(head.tolist(), rows) for head in heads) / len(heads)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found["logits"], model.eval()(x))
    found["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(WithLoss(model)(x), {"logits": model(x)})


@pytest.mark.parametrize(
    ("problem", "classes", "labels"),
    [
        ("multi_label_classification", 3, [[1, 0, 1], [0, 0, 1]]),
        (None, 1, [1, 0]),
        ("regression", 1, [0.5, -2.0]),
        ("regression", 2, [[0.5, -2.0], [0.0, 1.0]]),
        ("single_label_classification", 3, [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]),
    ],
)
def test_model_with_loss_follows_its_problem_type(problem: str | None, classes: int, labels: list[object]) -> None:
    model = tiny_model("deit_micro_patch4_32", num_classes=classes)
    model.origin = replace(model.origin, problem_type=problem)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = WithLoss(model)(x, torch.tensor(labels))["loss"].item()
    rows = model(x).tolist()
    wanted = torch.tensor(labels).view(2, -1).tolist()
    if problem == "regression":
        gaps = [(a - b) ** 2 for row, want in zip(rows, wanted, strict=True) for a, b in zip(row, want, strict=True)]
        expected = sum(gaps) / len(gaps)
    elif problem == "single_label_classification":
        expected = cross_entropy_by_hand(rows, wanted)
    else:
        expected = binary_by_hand(rows, [[value > 0 for value in want] for want in wanted])
    assert loss == pytest.approx(expected, rel=1e-5)


# Weights of classes, and several labels

WEIGHTS = [0.5, 2.0, 1.25]
YES_AND_NO = [[4.0, 0.5, 2.0], [0.6, 3.0, 0.8]]


def entry(logit: float, target: float, yes: float, no: float) -> float:
    """Binary cross-entropy of one class."""
    chance = 1 / (1 + math.exp(-logit))
    return -yes * target * math.log(chance) - no * (1 - target) * math.log(1 - chance)


def test_weighted_cross_entropy_counts_each_class_by_its_weight() -> None:
    found = soft_target_cross_entropy(torch.tensor(STUDENT), torch.tensor(TARGETS), torch.tensor(WEIGHTS))
    rows = zip(STUDENT, TARGETS, strict=True)
    expected = [
        -w * y * math.log(p) for logits, row in rows for w, y, p in zip(WEIGHTS, row, softmax(logits), strict=True)
    ]
    assert float(found) == pytest.approx(sum(expected) / 2, rel=1e-6)


@pytest.mark.parametrize("loss", [several_labels, binary_cross_entropy])
def test_binary_loss_weighs_yes_and_no(loss: object) -> None:
    found = loss(torch.tensor(STUDENT), torch.tensor(TARGETS), torch.tensor(YES_AND_NO))  # type: ignore[operator]
    expected = [
        entry(logit, target if loss is several_labels else float(target > 0), yes, no)
        for logits, row in zip(STUDENT, TARGETS, strict=True)
        for logit, target, yes, no in zip(logits, row, *YES_AND_NO, strict=True)
    ]
    assert float(found) == pytest.approx(sum(expected) / 6, rel=1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_images_count_for_the_teacher_by_the_weights_of_their_labels(kind: str) -> None:
    heads = (torch.tensor(STUDENT), torch.tensor(DIST))
    settings = Recipe(distillation=kind, alpha=1.0, tau=TAU)  # type: ignore[arg-type]
    loss = DistillationLoss(settings, teacher=lambda x: x, weights=torch.tensor(WEIGHTS))  # type: ignore[arg-type]
    found = loss(heads, torch.tensor(TARGETS), torch.tensor(TEACHER))
    expected = 0.0
    for image in range(2):
        alone = DistillationLoss(settings, teacher=lambda x: x)  # type: ignore[arg-type]
        part = alone(
            tuple(head[image : image + 1] for head in heads),
            torch.tensor(TARGETS[image : image + 1]),
            torch.tensor(TEACHER[image : image + 1]),
        )
        expected += float(part) * sum(w * y for w, y in zip(WEIGHTS, TARGETS[image], strict=True)) / 2
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_several_labels_keep_their_shares_in_the_loss_of_a_recipe() -> None:
    settings = Recipe(loss="bce", label_smoothing=0.0)
    loss = DistillationLoss(settings, teacher=None, multi_label=True)
    found = loss(torch.tensor(STUDENT), torch.tensor(TARGETS))
    assert torch.equal(found, F.binary_cross_entropy_with_logits(torch.tensor(STUDENT), torch.tensor(TARGETS)))
