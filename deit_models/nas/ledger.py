"""What was found out, line by line in a file: an interrupted search finds it there and need not find it out again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FetchError
from ..hub.fetch import atomic_write, first_line
from ..training.logs import read_log


class Ledger:
    """A dictionary that is also a file of JSON lines, each written as soon as it is known.

    A line that a killed process left unfinished is dropped.

    Args:
        path: the file; made with the first entry.
        writes: whether this process writes; the others of a search keep the same entries in memory.

    Raises: FetchError: no space or no permission.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self._writes = path, writes
        rows = read_log(path)
        self._entries: dict[str, dict[str, Any]] = {row.pop("key"): row for row in rows}
        if writes and path.exists():
            with atomic_write(path) as temporary:
                temporary.write_text("".join(_line(*entry) for entry in self._entries.items()), encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Mapping[str, Any]:
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Note what was found out of `key`. Raises: FetchError: no space or no permission."""
        self._entries[key] = entry
        if not self._writes:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(key, entry))
        except OSError as error:
            raise FetchError(f"cannot write {self.path}: {first_line(error)}") from error


def _line(key: str, entry: Mapping[str, Any]) -> str:
    return json.dumps({"key": key, **entry}) + "\n"
