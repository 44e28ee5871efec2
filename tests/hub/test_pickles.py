"""Torch files are read without running their code, whatever lies beside the tensors, and never grow in memory."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import gzip
import os
import pickle
import struct
import tarfile
import uuid
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import refusal

from deit_models import CheckpointError
from deit_models.hub.fetch import Access
from deit_models.hub.pickles import unpickle
from deit_models.hub.weights import read_tensors

WEIGHT = torch.arange(6.0).reshape(2, 3)


def saved(path: Path, contents: Any, **options: Any) -> Path:
    torch.save(contents, path, **options)
    return path


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "beside",
    [
        np.float32(0.5),
        np.int64(7),
        np.bool_(True),
        np.array(["cat", "dog"]),
        np.arange(5, dtype=np.int16),
        {"best": [np.float64(81.2)] * 3},
        Path("runs/1"),
        PurePosixPath("a/b"),
        datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc),
        datetime.timedelta(hours=3),
        collections.defaultdict(dict, {"loss": {1: 0.3}}),
        collections.deque([1, 2], maxlen=4),
        collections.Counter("aab"),
        frozenset({1, 2}),
        {Path("a"): 1, Path("b"): 2},
        decimal.Decimal("0.1"),
        uuid.UUID(int=5),
        argparse.Namespace(out=Path("out"), seed=np.uint32(3), when=datetime.date(2024, 1, 1)),
        torch.float16,
        torch.device("cpu"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_harmless_objects_are_passed_over(tmp_path: Path, beside: Any, legacy: bool, protocol: int) -> None:
    how = {"_use_new_zipfile_serialization": not legacy, "pickle_protocol": protocol}
    path = saved(tmp_path / "x.pth", {"model": WEIGHT, "beside": beside}, **how)
    assert torch.equal(unpickle(path)["model"], WEIGHT)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_other_pickle_protocols_give_the_same_contents(tmp_path: Path, legacy: bool, protocol: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    half = model[0].weight.detach().half().t()
    text = "a text that is there twice"
    contents = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "half": half, "texts": [text, text]}
    contents |= {
        "\u00fc": [2**70, -1, 0.5, None, True, (), (1, "x", ("y",))],
        "many": [text[n:] for n in range(20)] * 50,
    }
    how = {"_use_new_zipfile_serialization": not legacy}
    found = unpickle(saved(tmp_path / "x.pth", contents, pickle_protocol=protocol, **how))
    assert str(found) == str(unpickle(saved(tmp_path / "y.pth", contents, **how))) == str(contents)


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("contents", [{"f": os.system}, {"f": getattr, "model": WEIGHT}, torch.nn.Linear(2, 2)])
def test_no_protocol_hides_a_function(tmp_path: Path, contents: Any, protocol: int) -> None:
    path = saved(tmp_path / "x.pth", contents, pickle_protocol=protocol)
    assert "a pickle that holds" in refusal(CheckpointError, lambda: unpickle(path))


@pytest.mark.parametrize(
    "odd",
    [
        b"\x80\x04\x8c\x02os\x94\x8c\x09system\nnow\x93\x8c\x01x\x85R.",
        b"\x80\x04N\x8c\x06system\x93.",
        b"\x80\x04h\x05.",
        b"\x80\x05\x8c\x04word\x94\x96\x00\x00\x00\x00\x00\x00\x00\x40.",
    ],
)
def test_odd_pickle_of_a_later_protocol_is_refused(tmp_path: Path, odd: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(odd)
    assert "damaged" in refusal(CheckpointError, lambda: unpickle(tmp_path / "x.pth"))


def test_text_that_is_repeated_again_and_again_is_refused(tmp_path: Path) -> None:
    text = b"\x80\x04X\x00\x00\x01\x00" + b"x" * 65536 + b"\x94"
    (tmp_path / "x.pth").write_bytes(text + b"](" + b"h\x00" * 50_000 + b"e\x86.")
    assert "any size" in refusal(CheckpointError, lambda: unpickle(tmp_path / "x.pth"))


def test_no_class_of_a_file_is_built(tmp_path: Path) -> None:
    data = unpickle(saved(tmp_path / "x.pth", {"where": Path("x"), "table": collections.defaultdict(list, a=[1])}))
    assert not isinstance(data["where"], Path)
    assert type(data["table"]) is dict
    assert data["table"] == {"a": [1]}


class Own:
    """A class of the user's own program."""


@pytest.mark.parametrize(
    ("contents", "name"),
    [
        ({"model": WEIGHT, "trainer": Own()}, "test_pickles.Own"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"f": print}, "print"),
        ({"f": os.system}, "system"),
        ({"f": getattr}, "getattr"),
    ],
)
def test_any_other_class_or_function_is_refused_by_name(tmp_path: Path, contents: Any, name: str) -> None:
    assert name in refusal(CheckpointError, lambda: unpickle(saved(tmp_path / "x.pth", contents)))


def encoded(name: str, times: int) -> bytes:
    """A pickle that encodes a string again and again, each time twice as long."""
    word = b"X" + struct.pack("<I", len(name)) + name.encode()
    start = b"X\x04\x00\x00\x00seedX\x06\x00\x00\x00latin1\x86R"
    return b"\x80\x02" + b"c_codecs\nencode\n" * (times + 1) + start + (word + b"\x86R") * times + b"."


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R.",
        b"\x80\x02c__builtin__\nbytearray\nq\x00h\x00\x8a\x05\x00\x00\x00\x00\x09\x85R.",
        encoded("hex", 40),
        encoded("BASE-64", 90),
        encoded("!!hex--codec!", 40),
        encoded("hex_codec", 40).replace(b"\x86R", b"q\x00\x86R"),
    ],
)
def test_pickle_that_grows_is_refused_before_it_does(tmp_path: Path, bomb: bytes) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(bomb)
    assert "any size" in refusal(CheckpointError, lambda: unpickle(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", bomb)
        archive.writestr("x/version", "3\n")
    assert "any size" in refusal(CheckpointError, lambda: unpickle(path))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("count", [2**31 - 1, 10**8])
def test_tensor_of_more_values_than_the_file_has_is_refused(tmp_path: Path, legacy: bool, count: int) -> None:
    path = saved(tmp_path / "x.pth", {"a": torch.ones(54321)}, _use_new_zipfile_serialization=not legacy)
    whole, number = path.read_bytes(), b"J" + struct.pack("<i", 54321)
    number = number if number in whole else b"M" + struct.pack("<H", 54321)
    if legacy:
        path.write_bytes(whole.replace(number, b"J" + struct.pack("<i", count)))
    else:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data.replace(number, b"J" + struct.pack("<i", count)))
    assert "values" in refusal(CheckpointError, lambda: unpickle(path))


def test_string_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"\x80\x02X\xff\xff\xff\x7fabc.")
    assert "damaged" in refusal(CheckpointError, lambda: unpickle(tmp_path / "x.pth"))


def test_archive_behind_a_pickle_hides_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"a": WEIGHT})
    path.write_bytes(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R." + path.read_bytes())
    assert zipfile.is_zipfile(path)
    assert "any size" in refusal(CheckpointError, lambda: unpickle(path))


def rewritten(path: Path, compression: int) -> Path:
    """The same archive, written by another program."""
    copy = path.with_name("copy.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return copy


def test_archive_that_was_packed_again_is_read_unless_it_inflates(tmp_path: Path) -> None:
    noise = torch.randn(5000)
    packed = rewritten(saved(tmp_path / "x.pth", {"a": noise}), zipfile.ZIP_DEFLATED)
    assert torch.equal(unpickle(packed)["a"], noise)
    bomb = rewritten(saved(tmp_path / "x.pth", {"a": torch.zeros(1 << 20)}), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 20_000
    assert "unpack to" in refusal(CheckpointError, lambda: unpickle(bomb))


def test_flipped_bit_of_a_tensor_is_seen_by_the_archives_own_sum(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"a": torch.full((300,), 2.0)})
    whole = path.read_bytes()
    at = whole.index(struct.pack("<f", 2.0) * 200) + 400
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert "CRC" in refusal(CheckpointError, lambda: unpickle(path))


def test_archive_without_sums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "x.pth", {"a": WEIGHT})
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(unpickle(path)["a"], WEIGHT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["script", "trace", "shared", "half"])
def test_torchscript_program_gives_its_state(tmp_path: Path, how: str) -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.BatchNorm1d(3))
    model = torch.nn.ModuleDict({"body": inner, "head": torch.nn.Linear(3, 2, bias=False)})
    network = torch.nn.Sequential(*model.values()).eval()
    if how == "shared":
        network[1].weight = torch.nn.Parameter(torch.ones(5, 3)[1:4:2])
    network = network.half() if how == "half" else network
    x = torch.ones(1, 3, dtype=next(network.parameters()).dtype)
    program = torch.jit.trace(network, x) if how == "trace" else torch.jit.script(network)
    program.save(str(tmp_path / "x.pt"))
    found = unpickle(tmp_path / "x.pt")
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_torchscript_program_without_a_state_is_called_what_it_is(tmp_path: Path) -> None:
    program = torch.jit.freeze(torch.jit.script(torch.nn.Linear(3, 2).eval()))
    program.save(str(tmp_path / "x.pt"))
    assert "TorchScript" in refusal(CheckpointError, lambda: unpickle(tmp_path / "x.pt"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archive_with_two_entries_of_one_name_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"a": WEIGHT})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"\x80\x02}.")
    assert "one name" in refusal(CheckpointError, lambda: unpickle(path))


@pytest.mark.parametrize("contents", [b"", b"\x80", b"\x80\x02.", b"PK\x03\x04", b"no weights", pickle.dumps([1])])
def test_other_bytes_are_one_line_that_names_the_file(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(contents)
    assert str(path) in refusal(CheckpointError, lambda: unpickle(path))


def packed_folder(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run/config.json", "{}")
        archive.writestr("run/model.safetensors", b"weights")


def packed_by_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "weights.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page"),
        (gzip.compress(b"weights", mtime=0), "packed by gzip"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "of NumPy"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "of HDF5"),
        (b"GGUF\x03" + bytes(99), "of GGUF"),
        (packed_folder, "an archive of other files; unpack it"),
        (packed_by_tar, "an archive of other files; unpack it"),
    ],
)
def test_other_kinds_of_files_are_called_what_they_are(tmp_path: Path, write: Any, kind: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    write(path) if callable(write) else path.write_bytes(write)
    access = Access(cache_dir=tmp_path)
    assert f"{path} is {kind}" in refusal(CheckpointError, lambda: read_tensors(path, access, source="x"))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_damaged_sparse_tensor_of_one_file_does_not_refuse_the_next(tmp_path: Path) -> None:
    outside = torch.sparse_coo_tensor(torch.tensor([[9]]), torch.ones(1), (3,), check_invariants=False)
    good, bad = saved(tmp_path / "good.pth", {"a": WEIGHT}), saved(tmp_path / "x.pth", {"a": outside, "f": Own()})
    refusal(CheckpointError, lambda: unpickle(bad))
    assert torch.equal(unpickle(good)["a"], WEIGHT)


def test_pipe_or_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pth")
    assert "regular file" in refusal(CheckpointError, lambda: unpickle(tmp_path / "x.pth"))
    assert "regular file" in refusal(CheckpointError, lambda: unpickle(Path("/dev/zero")))
