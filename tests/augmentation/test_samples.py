"""Order and seeds of samples: one plan for any number of processes, and the authors' repeated augmentation."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import PIL.Image
import pytest
import torch
from small_sets import Pictures, fill, noisy, plain
from torch import Tensor
from torch.utils.data import DataLoader

from deit_models.augmentation.samples import TrainingSamples, TrainSampler, sample_seed, sample_seeds
from deit_models.batches.inputs import ShardSampler
from deit_models.data.datasets import open_dataset
from deit_models.errors import ConfigError, DataError, ImageError


def steps_of(sampler: TrainSampler, per_step: int) -> list[list[tuple[int, int]]]:
    pairs = list(sampler)
    assert len(pairs) == len(sampler)
    assert len(pairs) % per_step == 0
    return [pairs[start : start + per_step] for start in range(0, len(pairs), per_step)]


def plan(
    length: int, *, batch: int, world: int, repeats: int = 1, seed: int = 7, epoch: int = 2
) -> list[Counter[tuple[int, int]]]:
    """What all processes together draw in each step."""
    per_rank = []
    for rank in range(world):
        sampler = TrainSampler(length, batch_size=batch, repeats=repeats, seed=seed, rank=rank, world=world)
        sampler.set_epoch(epoch)
        per_rank.append(steps_of(sampler, batch // world))
    return [Counter(pair for part in step for pair in part) for step in zip(*per_rank, strict=True)]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("length", [5, 100, 1000, 1031])
@pytest.mark.parametrize("world", [2, 4])
def test_steps_hold_the_same_samples_for_any_world(length: int, repeats: int, world: int) -> None:
    alone = plan(length, batch=16, world=1, repeats=repeats)
    assert plan(length, batch=16, world=world, repeats=repeats) == alone
    selected = length - length % 256 if repeats > 1 and length >= 256 else length
    assert len(alone) == max(1, selected // 16)


def test_epoch_without_repeats_draws_no_image_twice_and_drops_the_rest() -> None:
    drawn = Counter(index for step in plan(103, batch=10, world=1) for index, _ in step)
    assert set(drawn.values()) == {1}
    assert len(drawn) == 100
    assert set(drawn) < set(range(103))


def test_set_smaller_than_a_batch_fills_one_by_starting_over() -> None:
    (step,) = plan(5, batch=12, world=2)
    counts = Counter(index for index, _ in step.elements())
    assert sorted(counts.values()) == [2, 2, 2, 3, 3]
    assert len(step) == 12  # the copies differ in their seeds


def test_seed_hangs_on_the_global_position_alone() -> None:
    for world in (1, 2, 4):
        for rank in range(world):
            sampler = TrainSampler(1000, batch_size=20, repeats=3, seed=11, rank=rank, world=world)
            sampler.set_epoch(5)
            expected = [sample_seed(11, 5, position) for position in range(rank, sampler.steps * 20, world)]
            assert [seed for _, seed in sampler] == expected


def test_epochs_and_seeds_give_other_orders_and_the_same_ones_again() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = TrainSampler(200, batch_size=10, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    for other in (order(0, 4), order(1, 3)):
        assert [index for index, _ in other] != [index for index, _ in order(0, 3)]
        assert not {seed for _, seed in other} & {seed for _, seed in order(0, 3)}


def test_iteration_under_way_keeps_its_epoch() -> None:
    sampler = TrainSampler(50, batch_size=10)
    whole = list(sampler)
    begun = iter(sampler)
    sampler.set_epoch(1)
    assert list(begun) == whole
    assert list(sampler) != whole


def authors_rank(length: int, *, rank: int, world: int, repeats: int, order: list[int]) -> list[int]:
    """facts of the authors' sampler, step by step: repeat in place, pad by wrapping, every world-th, cut."""
    repeated = [index for index in order for _ in range(repeats)]
    while len(repeated) % world:
        repeated.append(repeated[len(repeated) - length * repeats])
    return repeated[rank::world][: length // 256 * 256 // world]


@pytest.mark.parametrize("length", [256, 300, 511, 512, 1000, 4001])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_repeats_are_the_authors_arithmetic(length: int, world: int, repeats: int) -> None:
    batch = 8 * world
    # all images stand in their epoch's order when nothing is repeated
    order = [index for index, _ in TrainSampler(length, batch_size=1, seed=3)]
    for rank in range(world):
        drawn = [
            index
            for index, _ in TrainSampler(length, batch_size=batch, repeats=repeats, seed=3, rank=rank, world=world)
        ]
        expected = authors_rank(length, rank=rank, world=world, repeats=repeats, order=order)
        # their loader then drops the last incomplete batch of each process
        assert drawn == expected[: len(expected) // 8 * 8]


@pytest.mark.parametrize("length", [100, 256, 999, 5000, 12_345])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_steps_are_those_of_timms_sampler(length: int, world: int) -> None:
    distributed_sampler = pytest.importorskip("timm.data.distributed_sampler")
    per_rank = 4
    for rank in (0, world - 1):
        theirs = distributed_sampler.RepeatAugSampler(range(length), num_replicas=world, rank=rank)
        ours = TrainSampler(length, batch_size=per_rank * world, repeats=3, rank=rank, world=world)
        assert len(ours) == len(theirs) // per_rank * per_rank
        # the orders differ, the places of the copies do not: number images as they come and compare
        numbered = [as_they_come(index for index, _ in ours), as_they_come(theirs)]
        assert numbered[0] == numbered[1][: len(numbered[0])]


def as_they_come(indices: Iterable[int]) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(index, len(numbers)) for index in indices]


def test_imagenet_epoch_has_the_published_number_of_steps() -> None:
    sampler = TrainSampler(1_281_167, batch_size=1024, repeats=3, rank=5, world=8)
    assert sampler.steps == 1251
    assert len(sampler) == 160_128


@pytest.mark.parametrize("world", [3, 4, 6])
def test_copies_of_an_image_fall_on_different_processes(world: int) -> None:
    owners: dict[int, list[int]] = {}
    for rank in range(world):
        for index, _ in TrainSampler(600, batch_size=12, repeats=3, rank=rank, world=world):
            owners.setdefault(index, []).append(rank)
    assert all(len(ranks) == len(set(ranks)) for ranks in owners.values())
    assert len(owners) == math.ceil(504 / 3)  # 512 selected, 42 whole batches of 12


def test_sample_seed_is_well_mixed_and_fits_a_generator() -> None:
    seeds = [sample_seed(seed, epoch, position) for seed in range(4) for epoch in range(5) for position in range(500)]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)  # torch's CPU generator takes these bits alone
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
    ones = [sum(seed >> bit & 1 for seed in seeds) / len(seeds) for bit in range(63)]
    assert all(abs(share - 0.5) < 0.025 for share in ones)  # 5 standard deviations of 10,000 fair coins
    flips = [(sample_seed(0, 1, p) ^ sample_seed(0, 1, p + 1)).bit_count() for p in range(500)]
    assert 28 < sum(flips) / len(flips) < 35


def test_sample_seed_is_pinned() -> None:
    # A resumed run must meet the seeds it would have met, in whatever version it continues
    assert sample_seed(0, 0, 0) == 1279368494785126216
    assert sample_seed(1, 2, 3) == 3851293329796251419
    assert [sample_seed(0, 0, 1), sample_seed(0, 1, 0), sample_seed(1, 0, 0)] != [sample_seed(0, 0, 0)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10, "world": 3}, "batch_size=10 cannot be shared evenly by 3"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 4, "repeats": 0}, "repeats=0"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank=2, world=2"),
        ({"batch_size": 4, "rank": -1, "world": 2}, "rank=-1"),
    ],
)
def test_impossible_sharing_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSampler(100, **options)
    with pytest.raises(ConfigError, match="without images"):
        TrainSampler(0, batch_size=4)
    with pytest.raises(ConfigError, match="rank=3, world=3"):
        ShardSampler(10, rank=3, world=3)


def seed_in_python(*parts: int) -> int:
    """SplitMix64's finalizer for each number, in whole numbers of any size."""
    word, mask = 0, (1 << 64) - 1
    for part in parts:
        word = (word + part + 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        word ^= word >> 31
    return word >> 1


def test_many_seeds_at_once_are_the_seeds_one_by_one() -> None:
    positions = [*range(70), -1, (1 << 40) + 3, (1 << 62) + 12345]
    for seed, epoch in ((0, 0), (7, 299), (-5, 1), ((1 << 63) - 1, 1 << 20), (1 << 70, 3)):
        expected = [seed_in_python(seed, epoch, position) for position in positions]
        assert sample_seeds(seed, epoch, torch.tensor(positions)).tolist() == expected
        assert [sample_seed(seed, epoch, position) for position in positions[:3]] == expected[:3]


def test_long_epoch_is_drawn_piece_by_piece() -> None:
    sampler = TrainSampler(100, batch_size=1000, repeats=3, seed=2, rank=1, world=4)
    assert len(sampler) == 250
    sampler = TrainSampler(300_000, batch_size=1000, seed=2, rank=1, world=4)  # more than is drawn at once
    indices, seeds = zip(*sampler, strict=True)
    assert list(seeds) == sample_seeds(2, 0, torch.arange(1, 300_000, 4)).tolist()
    order = torch.randperm(300_000, generator=torch.Generator().manual_seed(sample_seed(2, 0, -1)))
    assert list(indices) == order[1::4].tolist()


# Samples


def samples_of(workers: int, keys: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    samples = TrainingSamples(Pictures(20, damaged=[4]), noisy)
    # in order, reversed: another worker reads each sample, after another one
    loader = DataLoader(samples, batch_size=3, sampler=keys, num_workers=workers)  # type: ignore[arg-type]
    batches = list(loader)
    return [torch.cat(column) for column in zip(*batches, strict=True)]  # type: ignore[return-value]


def test_sample_is_the_same_in_any_process_and_order() -> None:
    sampler = TrainSampler(20, batch_size=20, repeats=2, seed=1)
    keys = list(sampler)
    torch.manual_seed(0)
    images, labels, failed = samples_of(0, keys)
    assert len(images.flatten(1).unique(dim=0)) == 20  # the copies of an image differ
    for workers in (1, 2):
        torch.manual_seed(workers)
        random.seed(workers)
        np.random.seed(workers)
        others = samples_of(workers, keys)
        assert all(torch.equal(a, b) for a, b in zip(others, (images, labels, failed), strict=True))
        backwards = samples_of(workers, keys[::-1])
        assert torch.equal(backwards[0].flip(0), images)


def test_seed_alone_decides_the_augmentation() -> None:
    samples = TrainingSamples(Pictures(9), noisy)
    first, second = samples[3, 77][0], samples[3, 77][0]
    assert torch.equal(first, second)
    assert not torch.equal(first, samples[3, 78][0])
    # another image, the same noise: the seed is the caller's to choose
    assert torch.allclose(first - 3, samples[0, 77][0], atol=1e-5)
    assert samples[3, (1 << 63) - 1][1:] == (0, -1)


@pytest.mark.parametrize("damaged", [[], [0], range(9)])
def test_main_process_finds_its_generators_as_it_left_them(damaged: Sequence[int]) -> None:
    samples = TrainingSamples(Pictures(9, damaged), noisy)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    np.random.set_state(before[2])
    try:
        samples[0, 5]
    except DataError:
        assert len(damaged) == 9
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]


@pytest.mark.parametrize("error", [ImageError, OSError, FileNotFoundError])
def test_damaged_image_is_replaced_and_reported(error: type[Exception]) -> None:
    samples = TrainingSamples(Pictures(9, damaged=[3, 4, 8], error=error), plain)
    image, label, failed = samples[3, 1]
    assert (image[0, 0, 0], label, failed) == (5, 2, 3)
    image, label, failed = samples[8, 1]  # the first follows the last
    assert (image[0, 0, 0], label, failed) == (0, 0, 8)
    assert samples[5, 1][2] == -1


def test_damaged_file_in_a_folder_is_replaced_and_named(tmp_path: Path) -> None:
    fill(tmp_path)
    whole = (tmp_path / "dog/0.png").read_bytes()
    (tmp_path / "dog/0.png").write_bytes(whole[: len(whole) // 2])
    records = open_dataset(tmp_path, "train")
    image, label, failed = TrainingSamples(records, plain)[2, 1]
    assert (label, records.describe(failed)) == (1, str(tmp_path / "dog/0.png"))
    assert torch.equal(image, plain(records[3][0]))


def test_too_many_damaged_images_in_a_row_stop_the_run() -> None:
    samples = TrainingSamples(Pictures(30, damaged=range(10, 16)), plain)
    assert samples[11, 0][2] == 11  # the fifth substitute is fine
    with pytest.raises(DataError, match="image 10 of pictures and the 5 images after it cannot be read; last: 15 is"):
        samples[10, 0]


def test_error_of_a_transform_is_no_damaged_image() -> None:
    def broken(_: PIL.Image.Image) -> NoReturn:
        raise ImageError("a mistake in the transform")

    with pytest.raises(ImageError, match="a mistake in the transform"):
        TrainingSamples(Pictures(3), broken)[0, 0]


# Balanced sampling

UNEVEN = [0] * 70 + [1] * 20 + [2] * 9 + [-1]
"""The class of each image; that of the last is not known."""


def balanced(epoch: int = 0, **options: int) -> list[int]:
    sampler = TrainSampler(len(UNEVEN), classes=UNEVEN, **{"batch_size": 10, "seed": 5, **options})
    sampler.set_epoch(epoch)
    return [index for index, _ in sampler]


def test_classes_take_turns_however_many_images_they_have() -> None:
    drawn = balanced()
    assert len(drawn) == 100
    per_class = Counter(UNEVEN[index] for index in drawn)
    assert sorted(per_class) == [0, 1, 2]
    assert sorted(per_class.values()) == [33, 33, 34]
    times = Counter(drawn)
    for label in (0, 1, 2):  # no image a second time before each of its class was drawn
        members = [times[index] for index, own in enumerate(UNEVEN) if own == label]
        assert max(members) - min(members) <= 1


def test_balanced_order_is_that_of_seed_and_epoch_alone() -> None:
    assert balanced() == balanced()
    assert balanced() != balanced(epoch=1)
    assert balanced() != balanced(seed=6)
    first, second = balanced(rank=0, world=2), balanced(rank=1, world=2)
    assert [index for pair in zip(first, second, strict=True) for index in pair] == balanced()


def test_repeats_and_balance_go_together() -> None:
    drawn = balanced(repeats=2)
    assert drawn[::2] == drawn[1::2]
    assert drawn[::2] == balanced()[:50]
