"""Results of many images on disk in parts, by any number of processes, joined in the order of the images."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..distributed import Process
from ..errors import ConfigError, DataError, first_line, shown
from ..files import atomic_write, read_json, write_json

_BLOCK, _BLOCKS_EACH = 1024, 16
"""Images of a block, at most; blocks of a process, where the list is long enough."""


class Parts:
    """Results of a long list of images on disk: blocks of the list by any number of processes, joined in order.

    Beside the output, say labels.csv, stands the folder labels.csv.parts: run.json, the run's settings, and a file for
    each finished block. A file takes its place once complete, so a kill at any time loses only the blocks under way,
    and the run goes on with any number of processes. Several machines must share the folder.

    Attributes:
        folder: of the parts.
        mine: the blocks that this process is to make, as ranges of the list.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".parts")
        self.mine: list[range] = []
        self._run, self._total, self._block = self.folder / "run.json", 0, _BLOCK

    @property
    def unfinished(self) -> bool:
        """Whether there are parts that are not in the output yet; they are joined to it as it was at the beginning."""
        return self._run.exists() and read_json(self._run).get("size") == self._size()

    def _size(self) -> int:
        return self.output.stat().st_size if self.output.is_file() else 0

    def settle(self, process: Process, *, resume: bool, overwrite: bool) -> bool:
        """Decide, for all processes, about earlier results; returns whether the output holds some, to be kept.

        Raises: ConfigError: there are some, and neither `resume` nor `overwrite` is on.
        """
        if process.is_main:
            if overwrite:
                self.output.unlink(missing_ok=True)
            elif not resume and (self._size() or self.folder.exists()):
                there = self.output if self._size() else self.folder
                raise ConfigError(f"{there} exists; --resume (resume=True) goes on with it, --overwrite replaces it")
            if overwrite or not self.unfinished:  # joined right before a kill, or about to be removed
                shutil.rmtree(self.folder, ignore_errors=True)
        kept: bool = process.gather(self._size() > 0 if process.is_main else None)[0]
        return kept

    def begin(self, run: Mapping[str, Any], total: int, process: Process) -> None:
        """Share the blocks that are missing of a list of `total` images; all processes call this.

        Raises: ConfigError: the parts are of a run with other settings, or not all machines see the folder.
        """
        if process.is_main and not self._run.exists():
            block = min(max(total // (_BLOCKS_EACH * process.world), 1), _BLOCK)
            write_json(self._run, {**run, "block": block, "size": self._size()})
        process.wait_for_all()
        if not self._run.exists():
            raise ConfigError(f"process {process.rank} sees no {self._run}: machines must share the output's folder")
        known = read_json(self._run)
        check_same_run(run, known, where=self.folder)
        self._total, self._block = total, int(known["block"])
        # as the first process sees it: a shared folder may show each machine another state
        starts: list[int] = process.gather(self._missing() if process.is_main else None)[0]
        mine = starts[process.rank :: process.world]
        self.mine = [range(start, min(start + self._block, total)) for start in mine]

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:012}.part"

    def _missing(self) -> list[int]:
        present = {path.name for path in self.folder.iterdir()}
        return [start for start in range(0, self._total, self._block) if self._path(start).name not in present]

    @contextmanager
    def new(self, block: range, errors: list[str]) -> Iterator[Path]:
        """A file to write a block's results to; it counts once complete, with the reasons of the block's failures.

        Raises: SaveError: no space, no permission.
        """
        with atomic_write(self._path(block.start)) as path:
            yield path
            if errors:
                write_json(self._path(block.start).with_suffix(".errors"), {"errors": errors})

    def finish(self, process: Process, join: Callable[[Path, list[Path], list[str]], object]) -> list[str]:
        """Wait for all parts; the first process joins them in order as the new output, and removes them.

        `join` writes a file from the parts and the reasons of all failures, which the first process gets back.
        """
        errors: list[str] = []
        if not process.is_main:
            while self.folder.exists():
                time.sleep(0.2)
            return errors
        while self._missing():
            time.sleep(0.2)
        for path in sorted(self.folder.glob("*.errors")):
            errors += read_json(path)["errors"]
        with atomic_write(self.output) as temporary:
            join(temporary, [self._path(start) for start in range(0, self._total, self._block)], errors)
        shutil.rmtree(self.folder)
        return errors


def check_same_run(run: Mapping[str, Any], known: Mapping[str, Any], *, where: Path) -> None:
    """Raise ConfigError, which names the setting, unless results on disk are of a run with the same settings."""
    for name, value in run.items():
        if known.get(name) != value:
            change = f"{name}: {shown(known.get(name))} then, {shown(value)} now"
            raise ConfigError(f"{where} is of another run ({change}); repeat that one, or --overwrite starts anew")


# Columns of numbers and texts in .npz files


def texts(given: Iterable[str]) -> Any:
    """A column of texts."""
    escaped = [text.encode("utf-8", "backslashreplace").decode() for text in given]  # for bytes that are no Unicode
    return np.array(escaped, dtype=str if escaped else "<U1")


def column(part: Path, name: str) -> Any:
    """A column of a file."""
    with np.load(part) as arrays:
        return arrays[name]


def join_columns(path: Path, parts: Sequence[Path], names: Sequence[str], about: str, rows: int) -> None:
    """Write the parts as one file, column by column, with `rows` rows in all and a text `about` it."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name in names:
            first = column(parts[0], name)
            kinds = {column(part, name).dtype for part in parts} if name != "embeddings" else {first.dtype}
            kind = np.result_type(*kinds)  # the width of the longest text
            shape = (rows, *first.shape[1:])
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(column(part, name).astype(kind).tobytes())
        with archive.open(zipfile.ZipInfo("about.npy"), "w") as member:
            np.lib.format.write_array(member, np.array(about))


def about_of(path: Path, kind: str) -> dict[str, Any]:
    """Settings that `join_columns` wrote into a file. Raises: DataError: it is no file of that kind."""
    try:
        about: dict[str, Any] = json.loads(str(column(path, "about")))
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no file of {kind}: {first_line(error)}") from error
    return about
