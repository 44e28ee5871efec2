"""The cache of `optimize`: keys, timings, compiled networks and how many of them stay."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from deit_models import IntegrityError
from deit_models.deploy.kept import decision_key, keep, keep_network, kept_network, recall
from deit_models.hub.fetch import Access


@dataclass
class Row:
    name: str
    speed: float


def test_the_question_holds_what_changes_the_answer() -> None:
    cpu = torch.device("cpu")
    keys = {decision_key({"batch": 1}, cpu), decision_key({"batch": 2}, cpu)}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        keys.add(decision_key({"batch": 1}, cpu))
    finally:
        torch.set_num_threads(threads)
    assert len(keys) == 3


def test_timings_come_back_as_they_were(tmp_path: Path) -> None:
    access, rows = Access(cache_dir=tmp_path), [Row("a", 1.5), Row("b", 0.5)]
    assert recall("question", Row, access) == []
    keep("question", rows, access)
    assert recall("question", Row, access) == rows
    (file,) = tmp_path.rglob("*.json")
    for damage in ("{ torn", "[3]", '[{"name": "a"}]', '[{"name": "a", "speed": 1, "more": 2}]'):
        file.write_text(damage)
        assert recall("question", Row, access) == []


def test_networks_come_back_or_are_refused(tmp_path: Path) -> None:
    access = Access(cache_dir=tmp_path)
    assert kept_network("a", access) is None
    keep_network("a", b"line\nbytes\0", (1.0, 0.1, 32), access)
    assert kept_network("a", access) == (b"line\nbytes\0", [1.0, 0.1, 32])
    (file,) = tmp_path.rglob("*.network")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="its bytes have changed"):
        kept_network("a", access)


def test_networks_unused_for_longest_make_room(tmp_path: Path) -> None:
    access = Access(cache_dir=tmp_path)
    for age, name in ((30, "first"), (20, "second"), (10, "third")):
        keep_network(name, bytes(1000), (), access)
        (file,) = tmp_path.rglob(f"{name}.network")
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    assert kept_network("first", access) is not None, "used now"
    keep_network("fourth", bytes(1000), (), access, most=3500)
    assert {file.stem for file in tmp_path.rglob("*.network")} == {"first", "third", "fourth"}
    keep_network("large", bytes(9000), (), access, most=3500)
    assert {file.stem for file in tmp_path.rglob("*.network")} == {"large"}


def test_a_cache_that_cannot_be_made_costs_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    access = Access(cache_dir=tmp_path / "file")
    with caplog.at_level(logging.WARNING, logger="deit_models"):
        keep_network("a", b"", (), access)
        assert kept_network("a", access) is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the compiled network is not kept: the cache folder cannot be made")
