"""The record of a run: one JSON line an epoch, and the same figures for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import FetchError, MissingExtraError
from ..hub.fetch import atomic_write, first_line

LOG_NAME = "log.jsonl"


class RunLog:
    """Appends a row for each epoch to `log.jsonl` in a folder, and reads them back.

    Args:
        out: the folder.
        first_epoch: rows of this epoch and later ones, left by an interrupted run, are dropped.
        tensorboard: also write TensorBoard's event files, into `out/tensorboard`.
        writes: whether this process writes at all.

    Raises: MissingExtraError: TensorBoard is asked for and not installed. FetchError: no space or no permission.
    """

    def __init__(self, out: Path, *, first_epoch: int, tensorboard: bool, writes: bool) -> None:
        self.path = out / LOG_NAME
        self.rows = [row for row in read_log(self.path) if row["epoch"] < first_epoch]
        self._writes = writes
        self._board = _open_tensorboard(out / "tensorboard", first_epoch) if tensorboard and writes else None
        if writes:
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(map(_line, self.rows)), encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; it has an `epoch`. Raises: FetchError: no space or no permission."""
        self.rows.append(row)
        if self._writes:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_line(row))
            except OSError as error:
                raise FetchError(f"cannot write {self.path}: {first_line(error)}") from error
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, row["epoch"])
            self._board.flush()

    def close(self) -> None:
        """Finish TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a log; a last line that a killed process left unfinished is passed over."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _open_tensorboard(folder: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("TensorBoard is not installed; pip install 'deit-models[train]'") from error
    return SummaryWriter(str(folder), purge_step=first_epoch)
