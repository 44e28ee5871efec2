"""Fuzzing in one process: a case is a number, its outcome a word; limits on time and memory; a table at the end.

A case may end in an answer that its own checks found right, or in a `DeitModelsError`. All else is a fault:
another exception, a message that is not one short line, more than `LIMIT_S` seconds, more than `LIMIT_BYTES` of memory.
Seconds are those of the processor, so that other work on the machine changes nothing; a case that waits without
computing has `LIMIT_WAITING_S`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from deit_models import DeitModelsError

LIMIT_S, LIMIT_WAITING_S = 20, 200
LIMIT_BYTES = 1 << 30
MOST_CHARACTERS = 300
"""Of an error message, the name of the file not counted."""
_ROOM = 3 * LIMIT_BYTES  # addresses, beyond those in use; the machine survives a case that asks for more
_report_to = sys.__stderr__
_NO_MEMORY = ("can't allocate memory", "not enough memory", "MemoryError", "bad_alloc", "Cannot allocate memory")


class OvertimeError(BaseException):
    """The time of a case is up. No `Exception`: the code under test may catch those."""


class WrongError(Exception):
    """An answer that is not the right one; the message says why."""


class Finding(NamedTuple):
    """A case that went wrong: `script --seed SEED --only NUMBER` repeats it."""

    number: int
    label: str
    problem: str


@dataclass
class Tally:
    """Outcomes of many cases, by label (the kind of damage)."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    """Seconds, and the number of the case."""

    def total(self, outcome: str) -> int:
        return sum(counter[outcome] for counter in self.outcomes.values())

    def __str__(self) -> str:
        kinds = sorted({outcome for counter in self.outcomes.values() for outcome in counter})
        rows = [("damage", *kinds)]
        rows += [(label, *(str(counter[kind] or "") for kind in kinds)) for label, counter in self.outcomes.items()]
        rows.append(("all", *(str(self.total(kind)) for kind in kinds)))
        return "\n".join("  ".join(cell.rjust(10) if n else cell.ljust(30) for n, cell in enumerate(r)) for r in rows)


Case = Callable[[random.Random, Path], tuple[str, Callable[[], str]]]
"""From a random generator and an empty folder: the label of the case, and its act, which gives the outcome's name."""


def run_cases(
    case: Case, *, seed: int, numbers: Iterable[int], seconds: float | None = None, skip: str | None = None
) -> Tally:
    """Run numbered cases one after the other, for some seconds of the processor; each depends on seed and number."""
    tally, began = Tally(), time.process_time()
    with tempfile.TemporaryDirectory(dir=_memory_disk()) as folder, limits():
        for number in numbers:
            if seconds is not None and time.process_time() - began > seconds:
                break
            Path(folder, "number").write_text(str(number))  # left behind, with the files, if the process is ended
            place = Path(folder, "case")
            place.mkdir()
            label, act = case(random.Random(f"{seed}-{number}"), place)
            if label != skip:
                _one(number, label, act, place, tally)
            shutil.rmtree(place)
    return tally


def _one(number: int, label: str, act: Callable[[], str], place: Path, tally: Tally) -> None:
    began = time.process_time()
    outcome, problem = attempt(act, place)
    tally.slowest = max(tally.slowest, (time.process_time() - began, number))
    tally.outcomes.setdefault(label, Counter())["FAULT" if problem else outcome] += 1
    if problem is not None:
        tally.findings.append(Finding(number, label, problem))


def attempt(act: Callable[[], str], place: Path) -> tuple[str, str | None]:
    """Run a case inside `limits`: its outcome, and what is wrong with it."""
    _forget_peak()
    before, began = _peak_bytes(), time.process_time()
    # inside C code no signal is seen: then the process ends and says where
    faulthandler.dump_traceback_later(2 * LIMIT_WAITING_S, exit=True, file=_report_to)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_WAITING_S)
    try:
        outcome, problem = _tried(act, place)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    took, grown = time.process_time() - began, _peak_bytes() - before
    if problem is None and took > LIMIT_S:
        problem = f"took {took:.0f} s"
    if problem is None and grown > LIMIT_BYTES:
        problem = f"took {grown >> 20} MiB"
    if grown > LIMIT_BYTES // 16:
        _return_memory()
    return outcome, problem


def _tried(act: Callable[[], str], place: Path) -> tuple[str, str | None]:
    try:
        return act(), None
    except DeitModelsError as error:
        return "refused", message_fault(error, place)
    except WrongError as error:
        return "", f"wrong: {error}"
    except OvertimeError:
        return "", "hangs at " + _place(traceback.format_exc())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 (what is looked for)
        return "", f"{type(error).__name__}: {str(error)[:150]} at {_place(traceback.format_exc())}"


def message_fault(error: BaseException, place: Path) -> str | None:
    """A fault of a refusal: its message is no short line, or the machine ran out of memory before it."""
    message = str(error).replace(str(place), "")
    if not message.strip() or not message.isprintable():
        return f"a message that is not one printable line: {message[:80]!r}"
    if len(message) > MOST_CHARACTERS:
        return f"a message of {len(message)} characters: {message[:80]!r}"
    cause: BaseException | None = error
    while cause is not None:
        if any(text in f"{type(cause).__name__}: {cause}" for text in _NO_MEMORY):
            return f"asked for too much memory before it was refused: {str(cause)[:100]!r}"
        cause = cause.__cause__ or cause.__context__
    return None


def _place(trace: str) -> str:
    """The last line of a traceback that is the package's."""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if "/deit_models/" in line] or lines
    return own[-1].rpartition("/deit_models/")[2] if own else "an unknown place"


def _memory_disk() -> str | None:
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > LIMIT_BYTES else None


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """No warnings and log lines; an alarm ends a case; memory is bounded far above what a case may take."""

    def alarm(*_: object) -> None:
        raise OvertimeError

    handlers = {number: signal.signal(number, alarm) for number in (signal.SIGALRM, signal.SIGPROF)}
    space = resource.getrlimit(resource.RLIMIT_AS)
    most = _addresses() + _ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most if space[1] < 0 else min(most, space[1]), space[1]))
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        resource.setrlimit(resource.RLIMIT_AS, space)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _addresses() -> int:
    """Size of this process's address space, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _forget_peak() -> None:
    """From here on the peak is measured afresh, whatever the process held before (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _return_memory() -> None:
    """Hand freed memory back to the system (glibc), or the next case would use it unseen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _kind(finding: Finding) -> str:
    return re.sub(r"[0-9]+", "N", finding.problem.splitlines()[0])[:70]


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No messages from C libraries (libtiff writes some for each damaged file)."""
    global _report_to
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    _report_to = os.fdopen(os.dup(kept), "w")
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def main(description: str, case: Case) -> int:
    """Command line of a fuzzer; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this one case")
    parser.add_argument("--skip", help="leave out the cases of this label")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.count) if options.only is None else [options.only]
    began = time.process_time()
    with _quiet_libraries():
        total = run_cases(case, seed=options.seed, numbers=numbers, skip=options.skip)
    print(total)
    kinds = Counter((finding.label, _kind(finding)) for finding in total.findings)
    first = {(finding.label, _kind(finding)): finding for finding in reversed(total.findings)}
    for key, count in kinds.most_common():
        print(f"{count} x {first[key].label}, case {first[key].number}: {first[key].problem.splitlines()[0][:200]}")
    seconds, number = total.slowest
    print(f"{len(total.findings)} faults; {time.process_time() - began:.0f} s, slowest {seconds:.1f} s (case {number})")
    return 1 if total.findings else 0
