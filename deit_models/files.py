"""Files of every part: atomic writes, digests, text, JSON, TOML, CSV, Markdown and safetensors.

Needs no torch until tensors are written.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, DeitModelsError, IntegrityError, SaveError, first_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

CHUNK_BYTES = 1 << 20
MOST_JSON_BYTES = 1 << 26


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes its place only once complete, also while others read it.

    Raises: SaveError: no space, no permission; an existing file is left as it was.
    """
    from tempfile import NamedTemporaryFile  # here, because importing the package is to be quick

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
        yield temporary
        os.chmod(temporary, 0o644)  # temporary files are private by default, published ones are not
        os.replace(temporary, path)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, with escapes for bytes of file names that are no Unicode.

    Raises: SaveError: no space, no permission.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path: str | os.PathLike[str], *, error: type[DeitModelsError] = ConfigError) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises: `error`: it cannot be read, or is no text; the file is named.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as cause:
        raise error(f"{path}: {cause.strerror or cause}") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{path}: not a text in utf-8 (see byte {cause.start}); is it another kind of file?") from cause


def append_text(path: Path, text: str) -> None:
    """Add to the end of a UTF-8 file, which is made if need be. Raises: SaveError: no space, no permission."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {first_line(error)}") from error


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON atomically. Raises: SaveError: no space, no permission."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically; the tensors are contiguous and share no memory.

    Raises: SaveError: no space, no permission.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # its own error for a full disk
            raise OSError(first_line(error)) from error


def digest_of_numbers(module: Module, *, without: Collection[str] = ()) -> str:
    """Sixteen hex digits of all parameters and buffers, except those of the children named in `without`."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return digest_of_tensors((name, tensor) for name, tensor in tensors if name.partition(".")[0] not in without)[:16]


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and numbers."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_names(names: Iterable[str]) -> str:
    """Sixteen hex digits of a list of names in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON table. Raises: CheckpointError: no JSON, something else than a table, no file, or a huge one."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > MOST_JSON_BYTES:
        raise CheckpointError(f"{path} is {facts.st_size} bytes or no file; expected JSON, {MOST_JSON_BYTES} at most")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark in front
        data = json.loads(text, object_pairs_hook=_table, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # beside JSONDecodeError: not UTF-8, 5,000 digits, nested too deep
        raise CheckpointError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; expected a table of settings")
    return data


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if table.setdefault(key, value) != value:
            raise ValueError(f"it gives {key!r} two values")
    return table


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text. Raises: ConfigError: not TOML."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # beside TOMLDecodeError: 5,000 digits, nested too deep
        raise ConfigError(f"not TOML: {first_line(error)}") from error


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table of a TOML file. Raises: ConfigError: it cannot be read, or is not TOML; the file is named."""
    text = read_text(path)
    try:
        return parse_toml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """A table with tuples for its lists: JSON and TOML have no tuples, fields of configurations do."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def toml_lines(values: Mapping[str, Any]) -> str:
    """Plain values and lists of them as TOML, a line each."""
    # JSON's strings, numbers, booleans and lists are TOML's too
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


_CONTROLS = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"
"""Invisible characters that Persian, Hindi and emoji are spelled with."""
_FORMULA = re.compile("'*[-=+@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_QUOTED = re.compile('[",;\t\r\n]')
_MARKDOWN = re.compile(r"[\\`*\[\]|~#]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: str) -> str:
    """A name on one line, with escapes for control characters, which could move the cursor or reverse the text."""
    hidden = {char for char in text if unicodedata.category(char) in _CONTROLS and char not in _JOINERS}
    return "".join(char.encode("unicode_escape").decode() if char in hidden else char for char in text)


def markdown(name: str) -> str:
    """A name as Markdown that shows it as it is, also in a table: no markup, no HTML, no control characters."""
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(printable(name), quote=False))


def csv_line(cells: Iterable[object]) -> str:
    """A line of CSV; `csv_cell` gives a cell back.

    Text that a spreadsheet would compute, since it begins with = + - @ or white space, gets an apostrophe in front.
    """
    texts = (f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else str(cell) for cell in cells)
    # the csv module of Python 3.12 and earlier does not quote \r
    quoted = (f'"{text.replace(chr(34), chr(34) * 2)}"' if _QUOTED.search(text) else text for text in texts)
    return ",".join(quoted) + "\n"


def csv_cell(text: str) -> str:
    """A text cell without the apostrophe that `csv_line` put in front."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    import hashlib  # here, because importing the package is to be quick

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def git_sha1_of(path: Path) -> str:
    """SHA-1 by which git names a file's contents: the name of a small file in the Hub's cache."""
    import hashlib

    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def check_regular(path: Path) -> None:
    """Raises: CheckpointError: a pipe, a device or a folder, of which reading may never end, or no permission."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file; expected a weights file")
    if path.exists() and not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} may not be read by this user")


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
