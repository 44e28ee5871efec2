"""Predictions as text, JSON lines and CSV: what is written, as it comes, and what is read back to resume a run."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deit_models.cli.results import resume_results, write_results, written_name
from deit_models.errors import ConfigError
from deit_models.predict import ImageResult, Prediction

RESULTS = [
    ImageResult("a.png", (Prediction("cat, tabby", 0.75, 3), Prediction('"dog"', 0.25, 5))),
    ImageResult("猫/ü\udcff.jpg", (), "猫/ü\udcff.jpg: the file is empty"),
    ImageResult("b.png", (Prediction("ça", 1 / 3, 0),)),
]


def test_json_lines_parse_back() -> None:
    stream = io.StringIO()
    errors = write_results(iter(RESULTS), stream, format="jsonl")
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert rows[0] == {
        "file": "a.png",
        "predictions": [
            {"label": "cat, tabby", "probability": 0.75, "index": 3},
            {"label": '"dog"', "probability": 0.25, "index": 5},
        ],
    }
    assert rows[1] == {"file": RESULTS[1].source, "error": RESULTS[1].error}
    assert rows[2]["predictions"][0]["probability"] == 1 / 3
    assert errors == [RESULTS[1].error]


def test_csv_parses_back_with_a_row_a_prediction() -> None:
    stream = io.StringIO()
    errors = write_results(iter(RESULTS), stream, format="csv")
    assert "\r" not in stream.getvalue()
    rows = list(csv.DictReader(io.StringIO(stream.getvalue())))
    assert list(rows[0]) == ["file", "rank", "label", "index", "probability", "error"]
    assert [row["rank"] for row in rows] == ["1", "2", "", "1"]
    assert [row["label"] for row in rows] == ["cat, tabby", '"dog"', "", "ça"]
    assert float(rows[3]["probability"]) == 1 / 3
    assert rows[2]["file"] == r"猫/ü\udcff.jpg"
    assert rows[2]["error"].endswith("the file is empty")
    assert errors == [RESULTS[1].error]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_name_that_is_not_unicode_can_be_written_to_a_utf8_file(tmp_path: Path, form: str) -> None:
    with (tmp_path / "out").open("w", encoding="utf-8") as stream:
        assert write_results(RESULTS, stream, format=form) == [RESULTS[1].error]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_rows_are_written_as_they_come(tmp_path: Path, form: str) -> None:
    path = tmp_path / "out"
    sizes = []

    def slowly() -> Iterator[ImageResult]:
        for result in RESULTS:
            sizes.append(path.stat().st_size)
            yield result

    with path.open("w", encoding="utf-8") as stream:
        write_results(slowly(), stream, format=form)
    assert len(set(sizes)) == len(RESULTS)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="format='xml'; expected 'text', 'jsonl' or 'csv'"):
        write_results([], io.StringIO(), format="xml")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_written_results_are_read_back_and_a_torn_end_is_cut_off(tmp_path: Path, form: str) -> None:
    path = tmp_path / "out"
    with path.open("w", encoding="utf-8", newline="") as stream:
        write_results(RESULTS, stream, format=form)
    whole = path.read_bytes()
    kept = whole.rindex(b'{"file"') if form == "jsonl" else whole.index("猫".encode())  # csv: the last whole image, too
    path.write_bytes(whole[:-3])
    names, errors = resume_results(path, format=form)
    found = [RESULTS[1]] if form == "jsonl" else []
    assert names == {"a.png", *(written_name(result.source) for result in found)}
    assert errors == [result.error for result in found]
    assert path.read_bytes() == whole[:kept]


def test_text_cannot_be_read_back(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format='text' cannot be resumed"):
        resume_results(tmp_path / "out", format="text")


@pytest.mark.parametrize(
    "name", ["a\rb.png", "two\nlines.png", 'a "b".png', "=1+1.png", "@x", "'-x", "\t.png", ";.png"]
)
def test_odd_names_are_read_back_from_csv(tmp_path: Path, name: str) -> None:
    """So that a resumed run does none of them twice, nor leaves one out."""
    prediction = Prediction("=cmd|' /C calc'!A0", 0.5, 0)
    results = [
        ImageResult(name, (prediction,)),
        ImageResult("-", (), f"{name}: empty"),
        ImageResult("z", (prediction,)),
    ]
    path = tmp_path / "o.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        write_results(results, stream, format="csv")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert not any(cell.startswith(tuple("=+-@\t\r")) for row in rows for cell in row)
    assert resume_results(path, format="csv") == ({name, "-"}, [f"{name}: empty"])


def test_csv_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    for row in ("a\rb,1,x,0,1,\n", f"a,{'x' * 200_000},,,,\n"):
        path.write_bytes(b"file,rank,label,index,probability,error\n" + row.encode())
        with pytest.raises(ConfigError, match=r"o\.csv holds other things than results as csv"):
            resume_results(path, format="csv")


@pytest.mark.parametrize(
    ("name", "shown"), [("a\x1b[2J.png", r"a\x1b[2J.png"), ("\u202eb", r"\u202eb"), ("a\rb", r"a\rb")]
)
def test_text_shows_control_characters_as_escapes(name: str, shown: str) -> None:
    stream = io.StringIO()
    write_results([ImageResult(name, (Prediction(name, 0.5, 0),))], stream, format="text")
    assert stream.getvalue() == f"{shown}\n   50.00 %  {shown}\n"
