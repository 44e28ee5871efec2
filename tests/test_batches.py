"""From paths to batches: threads or processes, which, and in which order."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deit_models.data import loading as batches
from deit_models.data.loading import file_batches
from deit_models.errors import ImageError

CPU = torch.device("cpu")


def decode(path: str) -> Tensor:
    if "broken" in path:
        raise ImageError(f"{path}: in two\nlines")
    return torch.full((1, 2, 2), int(path), dtype=torch.uint8)


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_batches_keep_the_order_and_say_what_is_broken(workers: int | None) -> None:
    paths = [str(i) if i not in (3, 8, 9) else f"broken{i}" for i in range(11)]
    found = list(file_batches(paths, decode, batch_size=4, workers=workers, device=CPU))
    assert [batch.sources for batch in found] == [paths[0:4], paths[4:8], paths[8:]]
    assert [batch.images[:, 0, 0, 0].tolist() for batch in found] == [[0, 1, 2], [4, 5, 6, 7], [10]]
    assert found[2].errors == ["broken8: in two lines", "broken9: in two lines", None]


def test_a_batch_is_decoded_by_as_many_threads_as_the_model_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = threading.Barrier(3)  # broken, and with it the test, unless three decode at once

    def meet(path: str) -> Tensor:
        together.wait(10)
        return decode(path)

    (batch,) = file_batches(["0", "1", "2"], meet, batch_size=3, workers=None, device=CPU)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_nothing_is_decoded_while_a_batch_is_used() -> None:
    seen: list[str] = []

    def note(path: str) -> Tensor:
        seen.append(path)
        return decode(path)

    found = file_batches(map(str, range(100)), note, batch_size=4, workers=None, device=CPU)
    next(found)
    assert len(seen) == 4
    before = threading.active_count()
    found.close()
    assert threading.active_count() < before, "the threads are gone"


@pytest.mark.parametrize(
    ("device", "paths", "workers", "processes"),
    [
        ("cpu", 100, None, None),
        ("cpu", 100, 0, 0),
        ("cpu", 100, 3, 3),
        ("cuda", 100, None, 7),
        ("cuda", 12, None, 3),
        ("cuda", 4, None, None),
        ("cuda", None, None, 7),
        ("cuda", 100, 0, 0),
        ("mps", 100, None, 7),
    ],
)
def test_who_decodes_follows_from_the_device_unless_it_is_said(
    monkeypatch: pytest.MonkeyPatch, device: str, paths: int | None, workers: int | None, processes: int | None
) -> None:
    chosen: list[int | None] = []
    monkeypatch.setattr(batches, "_cores", lambda: 8)
    monkeypatch.setattr(batches, "_by_threads", lambda *_: chosen.append(None))
    monkeypatch.setattr(batches, "_by_processes", lambda *a, **_: chosen.append(a[3]))

    def endless() -> Iterator[Path]:
        yield Path()

    given = endless() if paths is None else [Path()] * paths
    file_batches(given, decode, batch_size=4, workers=workers, device=torch.device(device))
    assert chosen == [processes]
