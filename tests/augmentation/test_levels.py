"""Levels to the model's input: boxes to erase, their noise, cuts."""

import math
import random

import pytest
import torch
from laws import kolmogorov, limit

from deit_models.augmentation.levels import ErasingBox, Levels, TrainInput, paste
from deit_models.checkpoint import Preprocessing


def batch(*images: Levels) -> Levels:
    return Levels(*(torch.stack(parts) for parts in zip(*images, strict=True)))


def erased(height: int, width: int, *, prob: float = 1.0, count: int = 1, seed: int = 0) -> torch.Tensor:
    """A batch of white images, erased; what is not noise is exactly 1."""
    box, rng = ErasingBox(prob), random.Random(seed)
    white = torch.full((3, height, width), 255, dtype=torch.uint8)
    to_input = TrainInput(Preprocessing(resize=8, crop=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3), torch.device("cpu"))
    return to_input(batch(*(Levels(white, torch.tensor(box(height, width, rng))) for _ in range(count))))


def test_erasing_changes_one_box_to_normal_noise() -> None:
    noise, changed = [], 0
    for image in erased(16, 20, prob=0.25, count=2000):
        hit = image != 1
        assert torch.equal(hit.all(0), hit.any(0))
        if hit.any():
            changed += 1
            rows, columns = hit[0].any(1), hit[0].any(0)
            assert int(hit[0].sum()) == int(rows.sum()) * int(columns.sum())
            assert not rows.all()  # a box as high as the image is drawn again, as in timm
            noise.append(image[hit])
    assert abs(changed - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)
    values = torch.cat(noise)
    expected = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    assert kolmogorov(values.tolist(), expected.tolist()) < limit(len(values))


def test_image_too_small_to_erase_stays() -> None:
    assert torch.equal(erased(1, 1), torch.ones(1, 3, 1, 1))


def test_noise_of_channels_and_images_is_independent() -> None:
    image, other = erased(64, 64, count=2)
    inside = image[:, image[0] != 1]
    correlation = torch.corrcoef(inside) - torch.eye(3)
    assert float(correlation.abs().max()) < 4 / math.sqrt(inside.shape[1])
    assert not torch.equal(inside.flatten()[:50], other[:, other[0] != 1].flatten()[:50])


def test_noise_follows_the_image_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    assert torch.equal(erased(16, 16, count=3)[:2], erased(16, 16, count=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_waits_for_no_device() -> None:
    # tensors of the device "meta" have no values: whatever would have to read one back fails
    images, noise = torch.empty(8, 3, 16, 16, device="meta"), torch.empty(2, 3, 16, 16, device="meta")
    paste(noise, images, torch.empty(2, dtype=torch.int64, device="meta"), torch.zeros(2, 5, device="meta").long())


def test_noise_fills_exactly_its_boxes() -> None:
    images, noise = torch.zeros(4, 3, 6, 7), torch.arange(2 * 3 * 6 * 7.0).view(2, 3, 6, 7) + 1
    boxes = [(0, 1, 2, 3), (3, 0, 3, 6)]
    paste(noise, images, torch.tensor([1, 3]), torch.tensor([(*box, 9) for box in boxes]))
    expected = torch.zeros(4, 3, 6, 7)
    for image, source, (top, left, height, width) in zip((1, 3), noise, boxes, strict=True):
        part = (..., slice(top, top + height), slice(left, left + width))
        expected[image][part] = source[part]
    assert torch.equal(images, expected)


def test_erased_boxes_follow_timms_law() -> None:
    erasing = pytest.importorskip("timm.data.random_erasing", reason="timm is not installed")
    random.seed(0)
    rng = random.Random(1)
    count, theirs, ours = 3000, [], []
    erase = erasing.RandomErasing(probability=1.0, mode="const", device="cpu")  # which erases to zero
    while len(theirs) < count:
        hit = erase(torch.ones(1, 40, 56))[0] == 0
        if hit.any():
            rows, columns = hit.any(1).nonzero(), hit.any(0).nonzero()
            theirs.append((int(rows[0]), int(columns[0]), len(rows), len(columns)))
    while len(ours) < count:
        box = ErasingBox.draw(40, 56, rng)
        if box is not None:
            ours.append(box)
    for figure in (lambda b: b[0], lambda b: b[1], lambda b: b[2] * b[3], lambda b: b[2] / b[3]):
        assert kolmogorov([figure(box) for box in ours], [figure(box) for box in theirs]) < limit(count)
