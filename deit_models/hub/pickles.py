"""Pickled weights files read without running any code of theirs, and bounded before anything is allocated."""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import re
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, first_line
from ..files import check_regular

_unpickling = threading.Lock()

MOST_INFLATION = 4
"""Unpacked entries of an archive may be this many times larger than the file; torch.save compresses nothing."""
# Classes without an effect on weights: training scripts put their objects beside them. None is ever built: torch's
# unpickler is given the stand-ins below under their names.
_HARMLESS = re.compile(
    r"(?:numpy|pathlib|datetime|zoneinfo|decimal|fractions|uuid|argparse|omegaconf|easydict|yacs|ml_collections|addict|"
    r"pytorch_lightning|lightning|lightning_fabric|lightning_utilities)\..*"
    r"|builtins\.(?:list|dict|tuple|int|float|str|bool|bytes|frozenset|slice|range|object)"
    r"|collections\.(?:defaultdict|deque)|types\.SimpleNamespace|typing\.\w+|enum\.\w+|torch\.torch_version\.TorchVersion"
)
_DICTS = re.compile(r".*\.(?:defaultdict|AttributeDict|EasyDict|CfgNode|ConfigDict|Dict)")
# Encodings that turn bytes into more bytes, and so may be applied again and again.
_GROWING = {name + codec for name in ("hex", "base64", "uu", "quopri", "quotedprintable") for codec in ("", "codec")}


class _Inert:
    """Stands for an object of another library: takes any arguments and any state, and keeps none of them."""

    def __new__(cls, *given: Any, **named: Any) -> Any:
        del given, named
        return object.__new__(cls)

    def __init__(self, *given: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainDict:
    """Stands for a kind of dict: the unpickler fills plain ones only."""

    def __new__(cls, *given: Any) -> Any:
        del given
        return {}


class _PlainList:
    """Stands for a kind of list."""

    def __new__(cls, *given: Any) -> Any:
        del given
        return []


def unpickle(path: Path) -> Any:
    """The contents of a torch file: tensors and plain values as they are, stand-ins for some other libraries' objects.

    Raises: CheckpointError: truncated, damaged or inflated, or it names a class or function that is not known as
        harmless; the message names it.
    """
    check_regular(path)
    try:
        mapped, harmless = _check_archive(path) if _is_archive(path) else (False, _check_stream(path))
        # torch's list of allowed classes is one for all threads
        with _unpickling, torch.serialization.safe_globals([(_stand_in(name), name) for name in sorted(harmless)]):
            if path.suffix.lower() != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            with path.open("rb") as file:  # by its path, torch would read it as safetensors
                return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if "Unsupported operand" in str(error):
            raise CheckpointError(f"{path} is damaged, or not of torch.save's own pickle protocol, 2") from error
        what = f"a pickle that holds {foreign[1]}, not only tensors" if foreign else "damaged, or not a torch file"
        raise CheckpointError(f"{path} is refused: {what}{_advice(foreign)}") from error
    except Exception as error:  # whatever an unpickler makes of any bytes
        raise CheckpointError(f"{path} is truncated or damaged, or not a torch file ({first_line(error)})") from error


def _advice(foreign: re.Match[str] | None) -> str:
    return "; save model.state_dict() in its place" if foreign is not None else ""


def _stand_in(name: str) -> Callable[..., Any]:
    if name == "collections.deque":
        return _PlainList
    return _PlainDict if _DICTS.fullmatch(name) else _Inert


def _is_archive(path: Path) -> bool:
    """Whether torch, too, takes a file for an archive: by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> tuple[bool, set[str]]:
    """Whether an archive can be mapped into memory, and the harmless classes in its pickle; every CRC is compared."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
        if unpacked > MOST_INFLATION * size:
            raise CheckpointError(
                f"{path} is refused: {size} bytes that unpack to {unpacked}; torch.save packs nothing"
            )
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(f"{path} is a TorchScript program; save model.state_dict() in its place")
        if len(set(names)) < len(names):
            raise CheckpointError(f"{path} is damaged: two entries of the archive have one name")
        if all(entry.CRC == 0 for entry in entries):  # torch.serialization.set_crc32_options(False)
            for entry in entries:
                del entry.CRC
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: {damaged!r} in the archive differs from its CRC")
        pickles = [name for name in names if name.endswith("data.pkl")]
        found = {name for entry in pickles for name in _harmless(path, io.BytesIO(archive.read(entry)))}
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries), found


def _check_stream(path: Path) -> set[str]:
    """The harmless classes in a torch file of before 1.6: five pickles, the fourth being the contents."""
    found: set[str] = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(5):
            found |= _harmless(path, data)
            if data.tell() == data.size():
                break
    return found


def _harmless(path: Path, data: io.BytesIO | mmap.mmap) -> set[str]:
    """The harmless classes that one pickle names. Raises: CheckpointError: it may grow to any size."""
    # both kinds of data read no further than their end, whatever lengths the pickle says
    named, strings, number, most = set(), set(), 0, MOST_INFLATION * path.stat().st_size
    for operation, value, _ in pickletools.genops(data):  # type: ignore[arg-type]  # a mapped file reads like a file
        number = value if isinstance(value, int) else number
        if operation.name == "BINPERSID" and number > most:  # the last number is how many values a tensor's memory has
            raise CheckpointError(f"{path} is refused: a tensor of {number} values in {most // MOST_INFLATION} bytes")
        if operation.name == "GLOBAL":
            named.add(re.sub(r"^__builtin__\.", "builtins.", str(value).replace(" ", ".")))
        elif isinstance(value, str):
            strings.add(re.sub(r"[\W_]+", "", value).lower())
    if "builtins.bytearray" in named:
        raise CheckpointError(f"{path} is refused: a pickle that holds bytearray, which may be of any size")
    if "_codecs.encode" in named and strings & _GROWING:
        raise CheckpointError(f"{path} is refused: a pickle that encodes what it holds, which may be of any size")
    return {name for name in named if _HARMLESS.fullmatch(name)}
