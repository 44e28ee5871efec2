"""Ways to damage files: bytes, JSON values, the header of a safetensors file, the entries of a zip archive."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

BytesDamage = Callable[[random.Random, bytes], bytes]
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000, 64, 1000)


def flip(rng: random.Random, data: bytes) -> bytes:
    """One to eight bytes are others."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8)) if data else 0):
        out[rng.randrange(len(out))] ^= rng.randrange(1, 256)
    return bytes(out)


def flip_head(rng: random.Random, data: bytes) -> bytes:
    """Flips among the first bytes, where formats keep sizes and kinds."""
    end = min(len(data), rng.choice((16, 64, 256)))
    return flip(rng, data[:end]) + data[end:]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(data) + 1), max(len(data) - rng.randrange(1, 40), 0)))]


def insert(rng: random.Random, data: bytes) -> bytes:
    at, some = rng.randrange(len(data) + 1), rng.randbytes(rng.choice((1, 4, 8, 200)))
    return data[:at] + some + data[at:]


def remove(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 300)) :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    first, last = sorted(rng.randrange(len(data) + 1) for _ in "ab")
    return data[:last] + data[first : min(last, first + 4096)] + data[last:]


def number(rng: random.Random, data: bytes) -> bytes:
    """A number that matters in the place of another: sizes, counts, offsets."""
    form = rng.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    at = rng.randrange(min(len(data), rng.choice((32, 128, 1 << 30))) - size + 1) if len(data) > 32 + size else 0
    value = rng.choice(_NUMBERS) & (256**size - 1)
    return data[:at] + struct.pack(form, value) + data[at + size :]


def surround(rng: random.Random, data: bytes) -> bytes:
    some = rng.choice((b"\n", b"\0" * 8, b"<html>", b"PK\x03\x04", b"\xef\xbb\xbf", rng.randbytes(64)))
    return some + data if rng.random() < 0.5 else data + some


def replaced(rng: random.Random, data: bytes) -> bytes:
    """Another kind of file altogether."""
    others = (b"", b"\0" * len(data), rng.randbytes(200), b"<!DOCTYPE html><html></html>", b"PK\x05\x06" + b"\0" * 18)
    return rng.choice((*others, b"\x80\x02}q\0.", b"%!PS-Adobe-3.0\nshowpage\n", "päß".encode("utf-16")))


BYTES: tuple[BytesDamage, ...] = (
    flip,
    flip,
    flip_head,
    flip_head,
    truncate,
    insert,
    remove,
    repeat,
    number,
    number,
    surround,
    replaced,
)

# JSON


def strange_value(rng: random.Random, old: Any) -> Any:
    """A value that a field may not be ready for, often near the old one."""
    values: list[Any] = [None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-9, 1e308, 2**31, 2**63, 10**30, 10**400]
    values += [float("inf"), float("nan"), "", "x", "0", "\ud800", "a\nb", "x" * 5000, "../../etc/passwd", "=1+1"]
    values += [[], [[]], {}, {"a": 1}, [None], [0, 0], [1, "x"], [16, 16], [1.5] * 3, [0, 0, 0], [True] * 3]
    if isinstance(old, bool):
        values += [not old, str(old), int(old)] * 4
    elif isinstance(old, int | float):
        values += [
            old + 1,
            old - 1,
            old * 2,
            -old,
            str(old),
            old / 1 if abs(old) < 1e300 else 0.5,
            [old],
            [old, old],
            old * 1000,
            old * 10**9,
        ] * 2
    elif isinstance(old, str):
        values += [old + " ", old.upper(), old[:-1], [old], old * 2, None] * 2
    elif isinstance(old, list):
        values += [old[:-1], old + old, old[::-1], old[:1], dict(enumerate(old)), str(old)] * 2
    elif isinstance(old, dict):
        values += [list(old), list(old.values()), {**old, "more": 1}, dict(list(old.items())[1:])] * 2
    return rng.choice(values)


def change_json(rng: random.Random, data: Any) -> Any:
    """One field of a JSON table, at any depth, is gone, renamed, new, twice there in effect, or has a strange value."""
    data = json.loads(json.dumps(data))
    table, key = _some_place(rng, data)
    how = rng.random()
    if how < 0.6:
        table[key] = strange_value(rng, table[key])
    elif how < 0.75:
        del table[key]
    elif isinstance(table, dict) and how < 0.85:
        table[rng.choice((str(key).upper(), f"{key}s", f" {key}", "", "__class__"))] = table.pop(key)
    elif isinstance(table, dict):
        table[rng.choice(("use_conv", "act_layer", "do_pad", "global_pool", "x", "self", "model_args"))] = (
            strange_value(rng, True)
        )
    else:
        table.insert(key, strange_value(rng, table[key]))
    return data


def _some_place(rng: random.Random, data: Any) -> tuple[Any, Any]:
    while True:
        key = rng.choice(list(data)) if isinstance(data, dict) else rng.randrange(len(data))
        if not isinstance(data[key], dict | list) or not data[key] or rng.random() < 0.3:
            return data, key
        data = data[key]


def json_bytes(data: Any) -> bytes:
    return json.dumps(data).encode("utf-8")


def strange_json(rng: random.Random, data: bytes) -> bytes:
    """JSON that parsers disagree about or choke on."""
    text = data.decode("utf-8")
    depth = rng.choice((100, 5000, 200_000))
    return rng.choice(
        (
            b"[" * depth,
            b'{"a":' * depth,
            b'{"model_type": ' + b"9" * 5000 + b"}",
            text.encode("utf-16"),
            b"\xef\xbb\xbf" + data,
            text.replace(":", ":\0", 1).encode(),
            text.replace("}", ",}", 1).encode(),
            (text[:-2] + "," + text[1:]).encode(),  # every key twice
            data[:-2] + b', "x": NaN}',
            b"[" + data + b"]",
            b'"' + data.hex().encode() + b'"',
            data.replace(b'"', b"'"),
        )
    )


# safetensors


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def safetensors(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json_bytes(header)
    return struct.pack("<Q", len(text)) + text + body


def change_header(rng: random.Random, data: bytes) -> bytes:
    """The JSON header of a safetensors file, changed in one place; the tensors' bytes stay."""
    header, body = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = dict(header[name])
    how = rng.randrange(9)
    if how == 0:
        entry["dtype"] = rng.choice(
            ("I32", "U32", "F16", "BF16", "F64", "BOOL", "F8_E4M3", "F8_E5M2", "I8", "C64", "X", "")
        )
    elif how == 1:
        shape = list(entry["shape"])
        entry["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], [], [2**40, 2**40], [-1], shape[:-1], [0]))
    elif how == 2:
        first, last = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([last, first], [first, last + 4], [first + 4, last + 4], [0, 0], [-4, 4], [first, 2**62])
        )
    elif how == 3:
        entry["data_offsets"] = header[other]["data_offsets"]
    if how < 4:
        header = {**header, name: entry}
    elif how == 4:
        header = {(other if key == name else key): value for key, value in header.items()}
    elif how == 5:
        text = json.dumps(header)
        again = json.dumps({name: header[other]})[1:]
        return safetensors((text[:-1] + ", " + again).encode(), body)
    elif how == 6:
        strange = rng.choice(
            ("", "\0", "module." + name, name + "\n", "\ud800", name.upper(), "x" * 10_000, name + " ")
        )
        header = {(strange if key == name else key): value for key, value in header.items()}
    elif how == 7:
        # two names exchanged: of one shape this cannot be told without a digest
        header = {**header, name: header[other], other: header[name]}
    else:
        return safetensors(json_bytes(change_json(rng, header)), body)
    return safetensors(header, body)


# zip


def zip_entries(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def zip_of(entries: list[tuple[str, bytes]], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return out.getvalue()


def change_archive(rng: random.Random, data: bytes) -> bytes:
    """A zip archive written anew, with its checksums right, and one thing changed."""
    entries = zip_entries(data)
    at = rng.randrange(len(entries))
    name, content = entries[at]
    how = rng.randrange(9)
    if how == 0:
        del entries[at]
    elif how == 1:
        entries.append(
            rng.choice(((name, content[::-1]), ("../../evil", b"x"), ("/evil", b"x"), ("archive/code/a.py", b"1/0")))
        )
    elif how == 2:
        entries[at] = (rng.choice((name.upper(), name + "x", "x/" + name, name.rpartition("/")[2])), content)
    elif how == 3:
        return zip_of(entries, compression=zipfile.ZIP_DEFLATED)
    elif how == 4:
        other = rng.randrange(len(entries))
        entries[at], entries[other] = (name, entries[other][1]), (entries[other][0], content)
    elif how == 5:
        entries[at] = (name, content[: len(content) // 2])
    elif how == 6:
        entries[at] = (name, content + rng.randbytes(rng.choice((1, 64, 5000))))
    else:
        pickled = [n for n, (entry, _) in enumerate(entries) if entry.endswith((".pkl", "byteorder", "version"))]
        at = rng.choice(pickled)
        entries[at] = (entries[at][0], rng.choice(BYTES)(rng, entries[at][1]))
    return zip_of(entries)
