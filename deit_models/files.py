"""Files: atomic writes, digests, JSON and TOML."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError, FetchError, IntegrityError, first_line

CHUNK_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_digest(path: Path, expected: str | None, *, name: str | None = None) -> str | None:
    """Compare a file's SHA-256 with the known leading digits; gives the full digest, or None where none is known.

    Raises: IntegrityError: they differ.
    """
    if expected is None:
        return None
    actual = sha256_of(path)
    if not actual.startswith(expected):
        raise IntegrityError(
            f"{name or path}: SHA-256 is {actual[:16]}..., expected {expected[:16]}...; the file was changed"
        )
    return actual


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes its place only once complete, also while others read it.

    Raises: FetchError: no space, no permission; what was there is left as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
        yield temporary
        os.chmod(temporary, 0o644)  # temporary files are private by default, published ones are not
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise FetchError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def toml_lines(values: Mapping[str, Any]) -> str:
    """Plain values and lists of them as TOML, a line each."""
    # JSON's strings, numbers, booleans and lists are TOML's too
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def _is_tables(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and bool(value) and (is_dataclass(value[0]) or isinstance(value[0], Mapping))
    )


def _table(entry: Any) -> Mapping[str, Any]:
    return entry if isinstance(entry, Mapping) else {item.name: getattr(entry, item.name) for item in fields(entry)}


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON table. Raises: CheckpointError: not JSON, or something else than a table."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; expected a table of settings")
    return data
