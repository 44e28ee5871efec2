"""Files are written whole or not at all, and bad ones are refused by name."""

import csv
import hashlib
import io
import json
import os
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit_models import CheckpointError, ConfigError, DeitModelsError, FetchError, IntegrityError, SaveError
from deit_models.files import (
    append_text,
    atomic_write,
    check_digest,
    csv_cell,
    csv_line,
    digest_of_tensors,
    markdown,
    parse_toml,
    printable,
    read_json,
    read_text,
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
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "is not JSON"),
        (b'{"a": ' * 50_000, "is not JSON"),
        (b"[" * 50_000 + b"]" * 50_000, "is not JSON"),
        (b'{"a": -' + b"7" * 6000 + b"}", "is not JSON"),
        (b'{"a": NaN}', "is not JSON: NaN is no number"),
        (b'{"a": [-Infinity]}', "is not JSON: -Infinity"),
        (b'{"a": 1, "b": 2, "a": 3}', "is not JSON: it gives 'a' two values"),
        (b'{"a": {"b": 2, "b": null}}', "is not JSON: it gives 'b' two values"),
        (json.dumps([1]).encode(), "holds a list; expected a table"),
        (b" " * 70_000_000, "is 70000000 bytes"),
    ],
)
def test_other_files_than_json_tables_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.json {message}"):
        read_json(tmp_path / "a.json")


def test_mark_in_front_and_repeated_entries_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_other_than_files_are_not_read_as_json(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "folder.json", tmp_path / "pipe.json", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match=f"{path.name} is .* no file"):
            read_json(path)


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


CELLS = ("plain", "a\rb", "two\nlines", 'a "quote"', "x;=1+1", " blank ", "'90s", "", "\x85\u2028", "ü猫")
FORMULAS = ("=1+1", "+49", "-x.png", "@SUM(A1)", "\tx", "\r=1", "\n", "'=1", "''-1", "\uff1d1")


def test_every_line_of_csv_is_read_back_as_it_was() -> None:
    text = csv_line(CELLS) + csv_line(FORMULAS) + csv_line([-1, 0.5])
    first, second, numbers = csv.reader(io.StringIO(text, newline=""))
    assert tuple(map(csv_cell, first)) == CELLS == tuple(first)
    assert tuple(map(csv_cell, second)) == FORMULAS
    assert all(cell.startswith("'") for cell in second), "a spreadsheet would compute it"
    assert numbers == ["-1", "0.5"]


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\rb", "two\nlines", "\u202egnp.exe", "\x9b31m", "a\udcffb", "\u2029"])
def test_printed_names_hold_no_control_characters(name: str) -> None:
    shown = printable(name)
    assert "\\" in shown
    assert not any(unicodedata.category(char)[0] in "CZ" for char in shown)


@pytest.mark.parametrize(
    "name", ["deit_tiny.png", "C:\\photos", "猫 und ü", "\u0645\u06cc\u200c\u062e", "\U0001f469\u200d\U0001f52c"]
)
def test_other_names_are_printed_as_they_are(name: str) -> None:
    assert printable(name) == name


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("cats|dogs", r"cats\|dogs"),
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("[a](http://b)", r"\[a\](http://b)"),
        ("`code` *bold* _sly_", r"\`code\` \*bold\* \_sly\_"),
        ("a\n# b", r"a\\n\# b"),
        ("&amp; ~~c~~", r"&amp;amp; \~\~c\~\~"),
        ("imagenet_1k-v2.0 (set)", "imagenet_1k-v2.0 (set)"),
    ],
)
def test_markdown_shows_a_name_as_it_is(name: str, written: str) -> None:
    assert markdown(name) == written


def test_text_is_read_with_a_byte_order_mark_and_refused_in_other_codings(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbfepochs = 3")
    assert read_text(path) == "epochs = 3"
    assert read_toml(path) == {"epochs": 3}
    for content in ("größe".encode("latin-1"), "epochs".encode("utf-16"), b"\x89PNG"):
        path.write_bytes(content)
        with pytest.raises(SaveError, match=r"a\.toml: not a text in utf-8"):
            read_text(path, error=SaveError)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_text(tmp_path)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "1" * 5000])
def test_toml_without_end_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^not TOML: "):
        parse_toml(text)


def test_names_that_are_no_unicode_are_written_with_escapes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"data": "caf\udce9"})
    assert read_json(tmp_path / "a.json") == {"data": "caf\udce9"}


def test_every_number_counts_for_the_digest() -> None:
    x = torch.arange(6.0)
    others = [x.clone(), x + 1e-6 * (x == 5), x.view(2, 3), x.double(), x.to(torch.bfloat16), x.flip(0)]
    digests = [digest_of_tensors([("x", x), ("other", other)]) for other in others]
    assert len(set(digests)) == 6
    parts, copies = ([("a", part), ("b", torch.tensor(3))] for part in (x[::2], x[::2].clone()))
    assert digest_of_tensors(parts) == digest_of_tensors(copies)
