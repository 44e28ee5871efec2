"""From paths to batches: threads or processes, which, and in which order."""

import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_sets import Pictures
from torch import Tensor
from torch.utils.data import Dataset

import deit_models
from deit_models.batches.loading import DamageCount, decoding_workers, file_batches, make_loader
from deit_models.errors import DataError, ImageError, TrainingError

CPU = torch.device("cpu")


def decode(path: str) -> Tensor:
    if "broken" in path:
        raise ImageError(f"{path}: in two\nlines")
    return torch.full((1, 2, 2), int(path), dtype=torch.uint8)


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_batches_keep_the_order_and_say_what_is_broken(workers: int | None) -> None:
    paths = [str(i) if i not in (3, 8, 9) else f"broken{i}" for i in range(11)]
    found = list(file_batches(paths, decode, batch_size=4, workers=workers, device=CPU))
    assert [list(batch.sources) for batch in found] == [paths[0:4], paths[4:8], paths[8:]]
    assert [batch.images[:, 0, 0, 0].tolist() for batch in found] == [[0, 1, 2], [4, 5, 6, 7], [10]]
    assert list(found[2].errors) == ["broken8: in two lines", "broken9: in two lines", None]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_a_batch_is_decoded_by_as_many_threads_as_the_model_computes_with() -> None:
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
    ("device", "batches", "processes"),
    [
        ("cpu", 25, None),
        ("cuda", 25, 7),
        ("cuda", 3, 3),
        ("cuda", 1, None),
        ("cuda", None, 7),
        ("mps", 25, 7),
    ],
)
def test_who_decodes_follows_from_the_device(device: str, batches: int | None, processes: int | None) -> None:
    assert decoding_workers(batches, torch.device(device), cores=8) == processes


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_few_images_are_not_worth_a_process_that_imports_everything_anew(method: str) -> None:
    code = (
        "import multiprocessing, torch\n"
        "from deit_models.batches.loading import cpu_cores, workers_beside\n"
        "usual = min(1, cpu_cores() - 1)\n"
        "few = lambda given=None: workers_beside(torch.device('cpu'), given, images=600)\n"
        "default = few()\n"
        f"multiprocessing.set_start_method({method!r})\n"  # the call before has not settled it
        "assert default == (usual if multiprocessing.get_all_start_methods()[0] == 'fork' else 0)\n"
        f"assert few() == (usual if {method!r} == 'fork' else 0)\n"
        "assert few(3) == 3\n"
        "assert workers_beside(torch.device('cpu')) == workers_beside(torch.device('cpu'), images=5000) == usual\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("workers", "here"), [(None, True), (0, True), (3, False)])
def test_who_decodes_may_be_said(workers: int | None, here: bool) -> None:
    def who(_: str) -> Tensor:
        return torch.tensor([os.getpid(), threading.get_ident()])

    found = list(file_batches(map(str, range(100)), who, batch_size=4, workers=workers, device=CPU))
    processes, threads = torch.cat([batch.images for batch in found]).unbind(1)
    assert (processes == os.getpid()).all() == here
    assert len(processes.unique()) == (workers or 1)
    assert (threads == threading.get_ident()).all() == (workers is not None)


class Holds(Dataset[int]):
    """A data set that holds any object."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    "make", [lambda: lambda image: image, lambda: (_ for _ in ()), threading.Lock, lambda: type("Local", (), {})()]
)
def test_data_set_that_cannot_be_passed_to_processes_is_explained(make: Callable[[], object]) -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        loader = make_loader(Holds(make()), [0], batch_size=1, workers=1, device=torch.device("cpu"))
        with pytest.raises(TrainingError, match=r"cannot be sent to loading processes .*; define .* workers=0"):
            next(iter(loader))
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("reason", ["damaged", "no such file"])
def test_too_many_failures_come_with_a_reason(reason: str) -> None:
    class Broken(Pictures):
        def __getitem__(self, index: int) -> Any:
            raise ImageError(f"{self.describe(index)}: {reason}")

    with pytest.raises(DataError, match=rf"3 of the 9 images .*; one of them is image 3 of pictures \({reason}\)$"):
        DamageCount(Broken(9), 0.01).add(torch.tensor([1, -1, 2, 3]))


SCRIPT = """
import multiprocessing, sys, torch
from deit_models.batches.loading import explained_worker_failure, make_loader
from deit_models.errors import DeitModelsError

multiprocessing.set_start_method(sys.argv[1], force=True)

class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return torch.tensor([index])

def tell(numbers):
    try:
        with explained_worker_failure(1):
            list(make_loader(numbers, range(2), batch_size=1, workers=1, device=torch.device("cpu")))
    except DeitModelsError as error:
        if __name__ != "__main__":  # a script that catches nothing
            raise
        print(f"{__name__}: {type(error).__name__}: {error}", flush=True)

odd = Numbers()
odd.change = lambda value: value
tell(odd)
tell(Numbers())
"""


def test_what_processes_that_are_not_forked_need_is_said(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    root = str(Path(deit_models.__file__).parents[1])
    command, environment = [sys.executable, "script.py", "spawn"], {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("__main__: ")]
    assert re.match(r".*TrainingError: the Dataset cannot be sent .* by spawn: .*lambda.* workers=0", lines[0])
    assert re.match(r".*TrainingError: a loading process, started by spawn, has ended: .*__main__", lines[1])
    assert "/dev/shm" not in done.stdout
