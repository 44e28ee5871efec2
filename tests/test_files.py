"""Files are written whole or not at all, and bad ones are refused by name."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit_models import CheckpointError, ConfigError, DeitModelsError, FetchError, IntegrityError, SaveError
from deit_models.files import (
    append_text,
    atomic_write,
    check_digest,
    parse_toml,
    read_json,
    read_toml,
    sha256_of,
    toml_lines,
    write_json,
    write_tensors,
    write_text,
)


def test_written_file_is_complete_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    write_text(path, "löwe\n")
    assert path.read_bytes() == "löwe\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_file_is_in_its_place_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def break_off() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half of the n")
            assert path.read_text() == "old"
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        break_off()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_text, append_text, write_json])
def test_place_that_cannot_be_written_is_a_save_error(tmp_path: Path, write: object) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match=r"cannot write .*file/a") as caught:
        write(tmp_path / "file" / "a", "text")
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, DeitModelsError)
    assert not isinstance(caught.value, FetchError)
    assert "\n" not in str(caught.value)


def test_full_disk_leaves_the_old_tensors(tmp_path: Path, full_disk: object) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    with full_disk(1000), pytest.raises(SaveError, match=r"cannot write .*a\.safetensors: .*too large"):
        write_tensors(path, {"a": torch.zeros(10_000)})
    assert load_file(path)["a"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_lines_are_added_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log"
    for line in ("1\n", "2\n"):
        append_text(path, line)
    assert path.read_text() == "1\n2\n"


def test_json_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, None], "ä": "ö"})
    assert read_json(tmp_path / "a.json") == {"b": [1, None], "ä": "ö"}
    assert "ö" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (json.dumps([1]).encode(), "holds a list; expected a table")],
)
def test_other_files_than_json_tables_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.json {message}"):
        read_json(tmp_path / "a.json")


def test_toml_comes_back(tmp_path: Path) -> None:
    values = {"a": 1, "b": [1.5, 2], "c": 'quote " and ä', "d": True}
    write_text(tmp_path / "a.toml", toml_lines(values))
    assert read_toml(tmp_path / "a.toml") == values


def test_bad_toml_is_refused_and_the_file_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^not TOML: "):
        parse_toml("a = ")
    (tmp_path / "a.toml").write_text("a = ")
    (tmp_path / "b.toml").write_bytes(b"\xff")
    for name, reason in (("a", "not TOML: "), ("b", ".*utf-8"), ("c", "No such file")):
        with pytest.raises(ConfigError, match=rf"{name}\.toml: {reason}"):
            read_toml(tmp_path / f"{name}.toml")


def test_digest_is_compared_as_far_as_it_is_known(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 3_000_000)
    digest = hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert sha256_of(path) == digest
    assert check_digest(path, None) is None
    assert check_digest(path, digest[:8]) == check_digest(path, digest) == digest
    with pytest.raises(IntegrityError, match=f"the source: SHA-256 is {digest[:16]}..., expected 0000"):
        check_digest(path, "0" * 64, name="the source")
