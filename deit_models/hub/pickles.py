"""Pickled weights files read without running any code of theirs, and bounded before anything is allocated."""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import re
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
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
# What the modules of a TorchScript program are made with.
_SCRIPT = re.compile(r"(?:__torch__|torch\.jit\._pickle)\..*")
_DICTS = re.compile(r".*\.(?:defaultdict|AttributeDict|EasyDict|CfgNode|ConfigDict|Dict)")
# Encodings that turn bytes into more bytes, and so may be applied again and again.
_GROWING = {name + codec for name in ("hex", "base64", "uu", "quopri", "quotedprintable") for codec in ("", "codec")}

_TEXTS, _BYTES = (
    ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
# Other operations since protocol 3, and those of protocol 2 in their place: a set becomes a list, or a tuple.
_OLDER = {
    "PROTO": b"\x80\x02",
    "FRAME": b"",
    "EMPTY_SET": b"]",
    "ADDITEMS": b"e",
    "FROZENSET": b"t",
    "NEWOBJ_EX": b"\x86\x81",
}


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


class _ScriptModule(dict[str, Any]):
    """Stands for a module of a TorchScript program: its attributes, among them its tensors and modules."""

    __setstate__ = dict.update


# Other files that are taken for weights, by their first bytes, and what to do.
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself, e.g. with git lfs pull",
    b"<!doctype": "a web page, not weights",
    b"<html": "a web page, not weights",
    b"\x1f\x8b": "packed by gzip; unpack it",
    b"\x93numpy": "of NumPy; pass a file of torch or safetensors",
    b"\x89hdf": "of HDF5 (Keras); pass a file of torch or safetensors",
    b"gguf": "of GGUF; pass a file of torch or safetensors",
}


def other_kind(path: Path) -> str | None:
    """The kind of a file that is taken for weights, for messages; None if it is not known."""
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                own = any(name.endswith("data.pkl") for name in archive.namelist())
        except Exception:  # noqa: BLE001 - whatever its reader makes of any bytes
            return None
        return None if own else "an archive of other files; unpack it"
    if start[257:262] == b"ustar":
        return "an archive of other files; unpack it"
    text = start.lstrip().lower()
    return next((kind for magic, kind in _OTHERS.items() if text.startswith(magic)), None)


def unpickle(path: Path) -> Any:
    """The contents of a torch file: tensors and plain values as they are, stand-ins for some other libraries' objects.

    Of a TorchScript program: the tensors of its modules, as in its state dict.
    Raises: CheckpointError: truncated, damaged or inflated, or it names a class or function that is not known as
        harmless; the message names it.
    """
    check_regular(path)
    try:
        copy, mapped, harmless = _check_archive(path) if _is_archive(path) else _check_stream(path)
        if copy is None and path.suffix.lower() == ".safetensors":  # by its path, torch would read it as safetensors
            copy, mapped = io.BytesIO(path.read_bytes()), False
        # torch's list of allowed classes is one for all threads
        with _unpickling, torch.serialization.safe_globals([(_stand_in(name), name) for name in sorted(harmless)]):
            try:
                data = torch.load(copy or path, map_location="cpu", weights_only=True, mmap=mapped)
            finally:  # sparse tensors of a file that fails would be checked, and refused, with the next file's
                getattr(torch._utils, "_sparse_tensors_to_validate", []).clear()
        return _script_state(path, data) if isinstance(data, _ScriptModule) else data
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a pickle that holds {foreign[1]}, not only tensors" if foreign else "damaged, or not a torch file"
        raise CheckpointError(f"{path} is refused: {what}{_advice(foreign)}") from error
    except Exception as error:  # whatever an unpickler makes of any bytes
        what = other_kind(path) or f"truncated or damaged, or not a torch file ({first_line(error)})"
        raise CheckpointError(f"{path} is {what}") from error


def _script_state(path: Path, program: _ScriptModule) -> dict[str, torch.Tensor]:
    state = dict(_script_tensors(program, "", set()))
    if not state:  # frozen: the weights are constants of its code
        raise CheckpointError(f"{path} is a TorchScript program without a state; save model.state_dict() in its place")
    return state


def _script_tensors(module: _ScriptModule, prefix: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    seen.add(id(module))
    for name, value in module.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _ScriptModule) and id(value) not in seen:
            yield from _script_tensors(value, f"{prefix}{name}.", seen)


def _advice(foreign: re.Match[str] | None) -> str:
    return "; save model.state_dict() in its place" if foreign is not None else ""


def _stand_in(name: str) -> Callable[..., Any]:
    if name.startswith("__torch__."):
        return _ScriptModule
    if name == "collections.deque" or name.startswith("torch.jit."):
        return _PlainList
    return _PlainDict if _DICTS.fullmatch(name) else _Inert


def _is_archive(path: Path) -> bool:
    """Whether torch, too, takes a file for an archive: by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> tuple[io.BytesIO | None, bool, set[str]]:
    """The archive that torch reads in its place, if it needs one; whether the file can be mapped; the harmless classes.

    Every CRC is compared.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        size, unpacked = path.stat().st_size, sum(entry.file_size for entry in entries)
        if unpacked > MOST_INFLATION * size:
            raise CheckpointError(
                f"{path} is refused: {size} bytes that unpack to {unpacked}; torch.save packs nothing"
            )
        if len(set(names)) < len(names):
            raise CheckpointError(f"{path} is damaged: two entries of the archive have one name")
        if all(entry.CRC == 0 for entry in entries):  # torch.serialization.set_crc32_options(False)
            for entry in entries:
                del entry.CRC
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: {damaged!r} in the archive differs from its CRC")
        older, found = {}, set()
        for name in names:
            if name.endswith("data.pkl"):
                content = archive.read(name)
                older[name] = _protocol_2(path, io.BytesIO(content), content)
                found |= _harmless(path, io.BytesIO(older[name] or content))
    # torch.load tells a TorchScript program by its constants, which are no part of its state
    left = [name for name in names if not name.endswith("/constants.pkl")]
    if left == names and not any(older.values()):
        return None, all(entry.compress_type == zipfile.ZIP_STORED for entry in entries), found
    return _rewritten(path, left, older), False, found


def _rewritten(path: Path, names: list[str], changed: Mapping[str, bytes | None]) -> io.BytesIO:
    """An archive of some entries of another, with other contents where these are given."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as out:
        for name in names:
            out.writestr(name, changed.get(name) or archive.read(name))
    copy.seek(0)
    return copy


def _check_stream(path: Path) -> tuple[io.BytesIO | None, bool, set[str]]:
    """The same of a torch file of before 1.6: five pickles, the fourth being the contents, and the numbers."""
    found: set[str] = set()
    older: list[bytes] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(5):
            start = data.tell()
            older.append(_protocol_2(path, data, data) or b"")
            if not older[-1]:
                data.seek(start)
            found |= _harmless(path, io.BytesIO(older[-1]) if older[-1] else data)
            if data.tell() == data.size():
                break
        return io.BytesIO(b"".join(older) + data.read()) if all(older) else None, False, found


def _protocol_2(path: Path, file: io.BytesIO | mmap.mmap, content: bytes | mmap.mmap) -> bytes | None:
    """The next pickle of a file as one of protocol 2, the only one that torch's unpickler knows; None if it is of that.

    Raises: CheckpointError: it would grow to many times its size.
    """
    out, memo, texts = bytearray(), dict[int, str | None](), list[str]()  # texts: on top of the stack, not yet written
    most = MOST_INFLATION * path.stat().st_size + (1 << 20)
    value: Any
    for operation, value, at in pickletools.genops(file):  # type: ignore[arg-type]  # a mapped file reads like a file
        name = operation.name
        if name == "PROTO" and value <= 2:
            return None
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            number = len(memo) if name == "MEMOIZE" else value
            memo[number] = texts[-1] if texts else None
            out += b"" if texts else b"r" + struct.pack("<I", number)
        elif name in _TEXTS + _BYTES or (name in ("BINGET", "LONG_BINGET") and memo[value] is not None):
            text: Any = memo[value] if isinstance(value, int) else value
            texts.append(text if isinstance(text, str) else bytes(text).decode("latin-1"))
        else:
            named = [texts.pop() for _ in "ab"][::-1] if name == "STACK_GLOBAL" else []
            for text in map(_encoded, texts):
                out += b"X" + struct.pack("<I", len(text)) + text
            texts.clear()
            out += _global(*named) if named else _OLDER.get(name, content[at : file.tell()])
        if len(out) > most:
            raise CheckpointError(f"{path} is refused: a pickle that repeats what it holds, up to any size")
    return bytes(out)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _global(module: str, name: str) -> bytes:
    if "\n" in module + name:
        raise pickle.UnpicklingError("a class with a name of two lines")
    return b"c" + _encoded(f"{module}\n{name}\n")


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
    return {name for name in named if _HARMLESS.fullmatch(name) or _SCRIPT.fullmatch(name)}
