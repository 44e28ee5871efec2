"""Batches as the model's input: made in parts, kept if wanted, ahead of the model on a GPU; shares of an evaluation."""

from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from small_sets import Pictures, plain
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

from deit_models.batches.inputs import EvalSamples, InputBatches, ShardSampler
from deit_models.errors import ConfigError

CPU = torch.device("cpu")


class Numbers:
    """Samples that are their own keys."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def batch(self, keys: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        self.asked.append(list(keys))
        values = torch.tensor(keys, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
        return values, torch.tensor(keys), torch.full((len(keys),), -1)


class Recording(Tensor):
    """Images that note the streams which use them."""

    recorded: ClassVar[list[tuple[Tensor, object]]] = []

    def record_stream(self, stream: object) -> None:
        self.recorded.append((self, stream))


def numbered(*, workers: int = 0, keep: bool = False) -> tuple[Numbers, InputBatches]:
    """Batches of seven, made in parts of three, as of images of 900 x 900 pixels."""
    samples = Numbers()
    batches = InputBatches(
        samples,  # type: ignore[arg-type]
        range(18),
        lambda values: values.float().as_subclass(Recording),
        batch_size=7,
        workers=workers,
        device=CPU,
        size=(900, 900),
        keep=keep,
    )
    return samples, batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_made_in_parts_and_come_whole(workers: int) -> None:
    samples, batches = numbered(workers=workers)
    found = list(batches)
    assert [labels.tolist() for _, labels, _ in found] == [
        list(range(7)),
        list(range(7, 14)),
        list(range(14, 18)),
    ]
    assert all(torch.equal(images[:, 0, 0, 0].long(), labels) for images, labels, _ in found)
    assert len(batches) == 3
    if not workers:
        assert [len(keys) for keys in samples.asked] == [3, 3, 1, 3, 3, 1, 3, 1]


def test_kept_batches_are_made_once() -> None:
    samples, batches = numbered(keep=True)
    next(iter(batches))  # not read to its end: nothing is kept yet
    first = list(batches)
    asked = len(samples.asked)
    again = list(batches)
    assert len(samples.asked) == asked
    assert all(torch.equal(*pair) for one, two in zip(first, again, strict=True) for pair in zip(one, two, strict=True))


def test_pixels_leave_a_worker_as_bytes_and_numbers_without_a_tensor() -> None:
    _, batches = numbered(workers=1)
    values, labels, failed = next(iter(batches.loader))
    assert values.dtype == torch.uint8
    assert values.is_shared()
    assert not labels.is_shared()
    assert not failed.is_shared()


class Stream:
    """Stands for a stream of a GPU."""

    def __init__(self, *_: object) -> None:
        self.waits: list[Stream] = []

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, other: "Stream") -> None:
        self.waits.append(other)


def test_next_batch_is_on_its_way_before_this_one_is_used() -> None:
    current = Stream()
    cuda = SimpleNamespace(Stream=Stream, stream=lambda stream: stream, current_stream=lambda _: current)
    Recording.recorded.clear()
    samples, batches = numbered()
    read = batches._ahead(batches._batches(), cuda)
    images, labels, _ = next(read)
    assert labels.tolist() == list(range(7))
    assert max(samples.asked[-1]) == 13  # the second batch, whole
    assert len(current.waits) == 1  # this one's copy, before it is used
    assert Recording.recorded[-1][0] is images
    assert Recording.recorded[-1][1] is current
    assert [labels.tolist()[0] for _, labels, _ in read] == [7, 14]
    assert len(Recording.recorded) == 3


# Evaluation


def test_damaged_image_is_skipped_in_evaluation() -> None:
    samples = EvalSamples(Pictures(5, damaged=[1]), lambda image: plain(TF.resize(image, [6, 6])))
    assert samples[0][1:] == (0, -1)
    assert torch.equal(samples[0][0], torch.zeros(3, 6, 6))
    image, label, failed = samples[1]
    assert (image.shape, image.dtype, image.abs().sum(), label, failed) == ((3, 6, 6), torch.float32, 0, -1, 1)
    images, labels, failures = next(iter(DataLoader(samples, batch_size=5)))
    assert (labels.tolist(), failures.tolist()) == ([0, -1, 2, 0, 1], [-1, 1, -1, -1, -1])
    assert images.shape == (5, 3, 6, 6)
    assert len(samples) == 5


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_shards_count_each_of_10001_images_once(world: int) -> None:
    shards = [ShardSampler(10_001, rank=rank, world=world) for rank in range(world)]
    counts = Counter(index for shard in shards for index in shard)
    assert counts == Counter(range(10_001))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_more_processes_than_images_leaves_some_without() -> None:
    assert [list(ShardSampler(2, rank=rank, world=4)) for rank in range(4)] == [[0], [1], [], []]


def test_impossible_shares_are_refused() -> None:
    for rank, world in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match=f"rank={rank}, world={world}"):
            ShardSampler(10, rank=rank, world=world)
