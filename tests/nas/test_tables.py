"""What a search leaves for people: the table, the list of candidates, the limit that is read back."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from nas.toy import toy_space

from deit_models import TrainingError
from deit_models.nas.evolution import ScoredCandidate
from deit_models.nas.tables import candidates_table, read_candidates, read_limit, write_tables

SPACE = toy_space()
FOUND = [
    ScoredCandidate(SPACE.largest(), 1234567.0, 71.25, 1),
    ScoredCandidate(SPACE.smallest(), 98765.0, 50.5, 0),
]


def test_tables_are_written_and_read_back(tmp_path: Path) -> None:
    write_tables(tmp_path, FOUND, unit="MACs", limit=2e6)
    rows = read_candidates(tmp_path)
    assert [row["key"] for row in rows] == [one.candidate.key() for one in FOUND]
    assert rows[0] == {"key": SPACE.largest().key(), "top1": 71.25, "cost": 1234567.0, "generation": 1}
    report = (tmp_path / "report.md").read_text()
    assert report == candidates_table(rows, unit="MACs", limit=2e6)
    assert report.startswith("# 2 networks within 2,000,000 MACs\n")
    assert "| 0 | 1 | 50.50 | 50.50 |" in report
    assert f"| 1 | 71.25 | 1,234,567 | {SPACE.largest().key().replace(' | ', '; ')} |" in report
    if find_spec("matplotlib"):
        assert (tmp_path / "candidates.png").read_bytes().startswith(b"\x89PNG")


def test_table_holds_the_best_only() -> None:
    rows = [{"key": "8: 1x8", "top1": 90.0 - i, "cost": 0.123456, "generation": 0} for i in range(5)]
    table = candidates_table(rows, unit="ms", limit=0.5, most=2)
    assert "| 2 | 89.00 | 0.1235 |" in table
    assert "| 3 |" not in table
    assert "| 0 | 5 | 90.00 | 88.00 |" in table


@pytest.mark.parametrize(("cost", "unit"), [("macs", "MACs"), ("latency", "ms")])
def test_limit_is_read_back(tmp_path: Path, cost: str, unit: str) -> None:
    (tmp_path / "search.toml").write_text(f"limit = 250\ncost = {json.dumps(cost)}\n")
    assert read_limit(tmp_path) == (unit, 250.0)


def test_folder_without_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no finished search; run the search to its end first"):
        read_candidates(tmp_path)
    for text in (None, "limit = 250\n", "cost = 'joules'\nlimit = 1\n", "not TOML", "cost = []\nlimit = {}\n"):
        if text is not None:
            (tmp_path / "search.toml").write_text(text)
        with pytest.raises(TrainingError, match=r"search\.toml does not say what the search was limited by"):
            read_limit(tmp_path)


def test_damaged_list_of_candidates_is_refused(tmp_path: Path) -> None:
    row = '{"key": "a", "top1": 1.0, "cost": 5, "generation": 0}\n'
    for text in (f"{row}[]\n", row.replace("5", '"5"'), f"{{\n{row}"):
        (tmp_path / "candidates.jsonl").write_text(text)
        with pytest.raises(TrainingError, match=r"candidates\.jsonl, line \d is not a row"):
            read_candidates(tmp_path)
