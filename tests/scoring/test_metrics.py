"""Counts, weights and figures by class, beside those of scikit-learn."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_sets import Pictures

from deit_models.data.records import ArrayRecords
from deit_models.scoring.metrics import (
    average_precision,
    best_thresholds,
    calibration,
    count_classes,
    f1_scores,
    percent,
    wilson_interval,
)
from deit_models.scoring.outcomes import Tally

CLASSES = 5


def drawn(count: int, *, ties: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and labels of images with several labels; the last class has none."""
    generator = torch.Generator().manual_seed(count)
    truth = torch.rand(count, CLASSES, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.02, 0.0])
    truth[0, :4] = True
    scores = (torch.randn(count, CLASSES, generator=generator) + truth).sigmoid()
    return (scores.mul(8).round() / 8 if ties else scores), truth


def several(count: int, labels: list[tuple[int, ...]]) -> ArrayRecords:
    return ArrayRecords("toys", torch.zeros(count, 4, 4, 3, dtype=torch.uint8).numpy(), labels, "abc")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 7, 500])
def test_average_precision_is_scikit_learns(count: int, ties: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, truth = drawn(count, ties=ties)
    found = average_precision(scores, truth)
    expected = [metrics.average_precision_score(truth[:, k], scores[:, k]) for k in range(CLASSES - 1)]
    assert found[:-1].tolist() == pytest.approx(expected, abs=1e-12)
    assert found[-1].isnan()
    assert percent(found) == pytest.approx(100 * sum(expected) / len(expected))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 7, 500])
def test_threshold_of_a_label_has_the_best_f1_there_is(count: int, ties: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, truth = drawn(count, ties=ties)
    thresholds = best_thresholds(scores, truth)
    chosen = scores.double() >= torch.tensor(thresholds, dtype=torch.double)
    for k in range(CLASSES - 1):
        best = max(metrics.f1_score(truth[:, k], scores[:, k] >= cut) for cut in scores[:, k])
        assert metrics.f1_score(truth[:, k], chosen[:, k]) == pytest.approx(best, abs=1e-12)
    assert thresholds[-1] == 0.5


def test_figures_of_several_labels_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, truth = drawn(300)
    tally = Tally()
    for part in (slice(0, 200), slice(200, 300)):
        tally.add([scores[part].logit()], truth[part].float())
        tally.add([torch.zeros(1, CLASSES)], torch.full((1, CLASSES), -1.0))  # an image that could not be read
    found = tally.outcomes().evaluation([0.4] * CLASSES)
    given = {"average": "macro", "zero_division": float("nan")}
    chosen = (scores >= 0.4).int()
    assert found.macro_f1 == pytest.approx(100 * metrics.f1_score(truth, chosen, **given), abs=1e-4)
    assert found.micro_f1 == pytest.approx(100 * metrics.f1_score(truth, chosen, average="micro"), abs=1e-4)
    precision = metrics.average_precision_score(truth[:, :-1], scores[:, :-1])
    assert found.map == pytest.approx(100 * precision, abs=1e-3)
    assert (found.images, found.skipped, found.balanced_accuracy) == (300, 2, None)
    likeliest = truth[torch.arange(300), scores.argmax(dim=1)]
    assert found.top1 == pytest.approx(100 * float(likeliest.double().mean()))
    assert found.loss == pytest.approx(float(torch.nn.functional.binary_cross_entropy(scores, truth.float())), abs=1e-5)


def test_figures_of_uneven_classes_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    label = torch.cat([torch.zeros(80), torch.ones(15), torch.full((5,), 3.0)]).long()  # none of class 2
    logits = torch.randn(100, CLASSES - 1, generator=generator) + torch.nn.functional.one_hot(label, CLASSES - 1)
    tally = Tally()
    tally.add([logits], label)
    found, predicted = tally.outcomes().evaluation(), logits.argmax(dim=1)
    assert 2 in predicted
    # scikit-learn warns of class 2, which is predicted and does not occur
    recalls = metrics.recall_score(label, predicted, average=None, labels=[0, 1, 3])
    assert found.balanced_accuracy == pytest.approx(100 * recalls.mean(), abs=1e-9)
    assert found.macro_f1 == pytest.approx(100 * metrics.f1_score(label, predicted, average="macro"), abs=1e-9)


def test_class_that_neither_occurs_nor_is_predicted_does_not_count() -> None:
    f1 = f1_scores(torch.tensor([2, 0, 0]), torch.tensor([2, 1, 0]), torch.tensor([2, 0, 0]))
    assert percent(f1) == 50


def test_weights_are_scikit_learns_balanced_ones() -> None:
    weighing = pytest.importorskip("sklearn.utils.class_weight")
    labels = [0] * 6 + [2] * 3 + [-1]
    counts = count_classes(Pictures(10), labels, balanced=True)
    assert (counts.images.tolist(), counts.total) == ([6, 0, 3], 9)
    first, other, last = counts.weights(binary=False).tolist()
    expected = weighing.compute_class_weight("balanced", classes=np.array([0, 2]), y=labels[:-1])
    assert [first, last] == pytest.approx(list(expected))
    assert other == 1
    yes, no = counts.weights(binary=True)
    for number in (0, 2):
        pair = weighing.compute_class_weight(
            "balanced", classes=np.array([0, 1]), y=[int(label == number) for label in labels[:-1]]
        )
        assert [float(no[number]), float(yes[number])] == pytest.approx(list(pair))


def test_images_with_several_labels_count_for_each() -> None:
    labels = [(0, 1), (), (1,), (1,)]
    counts = count_classes(several(4, labels), labels, balanced=False)
    assert (counts.images.tolist(), counts.total) == ([1, 3, 0], 4)
    assert counts.weights(binary=True).tolist() == [
        pytest.approx([2.0, 2 / 3, 1.0]),
        pytest.approx([2 / 3, 2.0, 0.5]),
    ]


def test_line_on_the_classes_has_advice_where_they_are_very_uneven(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    count_classes(Pictures(6), [0, 0, 1, 1, 1, 2], balanced=False)
    assert caplog.messages == ["6 images, 3 classes: largest b (3), smallest c (1)"]
    assert caplog.records[0].levelname == "INFO"
    caplog.clear()
    labels = [0] * 10 + [1] * 3 + [2]
    count_classes(Pictures(14), labels, balanced=False)
    count_classes(Pictures(14), labels, balanced=True)
    line = "14 images, 3 classes: largest a (10), smallest c (1)"
    assert caplog.messages == [
        f"{line}; class_weights='balanced' or sampling='balanced' may help the small ones",
        line,
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


# Certainty


def test_ends_of_wilsons_interval_are_the_shares_that_the_normal_test_just_allows() -> None:
    # Wilson's definition: |seen - p| = z * sqrt(p (1 - p) / n) at both ends
    right, images = torch.tensor([0, 1, 81, 263, 10]), torch.tensor([10, 10, 263, 263, 10])
    low, high = wilson_interval(right, images)
    for ends in (low, high):
        deviation = (right / images - ends).abs() / (ends * (1 - ends) / images).sqrt()
        inner = (ends > 0) & (ends < 1)
        assert deviation[inner].tolist() == pytest.approx([1.959963984540054] * int(inner.sum()), abs=1e-6)
    assert (low[0], high[-1]) == (0, 1)
    # the example of Newcombe (1998), Two-sided confidence intervals for the single proportion, table I
    assert (round(float(low[2]), 4), round(float(high[2]), 4)) == (0.2553, 0.3662)


def test_class_without_images_has_no_interval() -> None:
    assert all(end.isnan().all() for end in wilson_interval(torch.tensor([0]), torch.tensor([0])))


@pytest.mark.parametrize("count", [1, 40, 3000])
def test_calibration_is_scikit_learns(count: int) -> None:
    curves = pytest.importorskip("sklearn.calibration")
    generator = torch.Generator().manual_seed(count)
    probability = torch.rand(count, generator=generator, dtype=torch.double)
    probability[0] = 1.0
    right = torch.rand(count, generator=generator, dtype=torch.double) < probability**2
    right[0] = True
    found = calibration(probability, right)
    filled = found.images > 0
    shares, means = curves.calibration_curve(right.numpy(), probability.numpy(), n_bins=15)
    assert found.right[filled].tolist() == pytest.approx(shares.tolist())
    assert found.confidence[filled].tolist() == pytest.approx(means.tolist())
    edges = np.linspace(0, 1, 16)
    by_hand = 0.0
    for low, high in pairwise(edges):
        inside = [n for n in range(count) if low < probability[n] <= high]
        if inside:
            gap = sum(float(right[n]) for n in inside) - sum(float(probability[n]) for n in inside)
            by_hand += abs(gap) / count
    assert found.error == pytest.approx(100 * by_hand)
    assert int(found.images.sum()) == count


def test_bin_includes_its_upper_end() -> None:
    found = calibration(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), torch.ones(5), bins=4)
    assert found.images.tolist() == [2, 1, 1, 1]


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not() -> None:
    sure = torch.ones(4)
    assert calibration(sure, torch.tensor([True] * 4)).error == 0
    assert calibration(sure, torch.tensor([False] * 4)).error == 100
    assert calibration(torch.empty(0), torch.empty(0)).error == 0
