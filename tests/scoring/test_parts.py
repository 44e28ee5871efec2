"""Results in parts that survive any kill, and that any number of processes go on with."""

import os
import random
import shutil
from itertools import chain
from pathlib import Path

import pytest
from tiny import ALONE

from deit_models.scoring.parts import Parts


def write_numbers(parts: Parts, block: range) -> None:
    errors: list[str] = []
    with parts.new(block, errors) as path:
        path.write_text("".join(f"{i}\n" for i in block))
        errors += [f"no {i}" for i in block if i % 10 == 3]


def joined(path: Path, files: list[Path], errors: list[str], *, begins: str = "") -> None:
    path.write_text(begins + "".join(file.read_text() for file in files) + " ".join(errors))


@pytest.mark.parametrize("seed", range(10))
def test_parts_hold_every_number_once_whatever_was_killed_and_however_many_go_on(tmp_path: Path, seed: int) -> None:
    draw, output, total = random.Random(seed), tmp_path / "numbers", 137
    output.write_text("earlier\n")
    while True:
        parts = Parts(output)
        assert parts.settle(ALONE, resume=True, overwrite=False), "earlier results are kept"
        parts.begin({"total": total}, total, ALONE)
        draw.shuffle(parts.mine)
        if not parts.mine:
            break
        for block in parts.mine[: draw.randint(1, 40)]:
            write_numbers(parts, block)
        (parts.folder / "000.part.abc.tmp").write_text("torn")
    errors = parts.finish(ALONE, lambda path, *found: joined(path, *found, begins=output.read_text()))
    assert errors == [f"no {i}" for i in range(3, total, 10)]
    lines = output.read_text().splitlines()
    assert lines == ["earlier", *map(str, range(total)), " ".join(errors)]
    assert [path.name for path in tmp_path.iterdir()] == ["numbers"]


def test_blocks_of_several_processes_are_all_blocks_once(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "x")
    parts.begin({}, 1000, ALONE)
    starts = [block.start for block in parts.mine]
    assert [i for block in parts.mine for i in block] == list(range(1000))
    shares = [starts[rank::3] for rank in range(3)]
    assert sorted(chain(*shares)) == starts
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_kill_between_joining_and_removing_parts_doubles_nothing(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "x")
    parts.begin({}, 3, ALONE)
    for block in parts.mine:
        write_numbers(parts, block)
    shutil.copytree(parts.folder, tmp_path / "copy")
    parts.finish(ALONE, joined)
    os.rename(tmp_path / "copy", parts.folder)
    again = Parts(tmp_path / "x")
    assert again.settle(ALONE, resume=True, overwrite=False), "the output is complete"
    assert not parts.folder.exists()


def test_parts_that_were_being_removed_are_not_gone_on_with(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "x")
    parts.begin({}, 3, ALONE)
    write_numbers(parts, parts.mine[0])
    (parts.folder / "run.json").unlink()
    assert not Parts(tmp_path / "x").settle(ALONE, resume=True, overwrite=False)
    assert not parts.folder.exists()
