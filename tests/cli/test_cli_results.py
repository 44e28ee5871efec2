"""Predictions as text, JSON lines and CSV: what is written, as it comes, and what is read back to resume a run."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Terminal
from tqdm.utils import disp_len

from deit_models.cli.results import look_of, resume_results, write_results, written_name
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
    assert list(rows[0]) == ["file", "rank", "label", "index", "probability", "above_threshold", "error"]
    assert {row["above_threshold"] for row in rows} == {""}, "of a model for one class an image"
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


def test_csv_marks_the_labels_above_their_thresholds() -> None:
    stream = io.StringIO()
    two = (Prediction("sun", 0.9, 1), Prediction("sea", 0.4, 0))
    write_results([ImageResult("a.png", two, labels=("sun",)), ImageResult("b", two, labels=())], stream, format="csv")
    rows = list(csv.DictReader(io.StringIO(stream.getvalue())))
    assert [(row["label"], row["above_threshold"]) for row in rows] == [
        *[("sun", "1"), ("sea", "0")],
        *[("sun", "0"), ("sea", "0")],
    ]


def test_csv_of_an_older_version_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    whole = "file,rank,label,index,probability,error\na.png,1,cat,3,0.9,\nb.png,1,cat,3,0.9,\n"
    path.write_text(whole)
    with pytest.raises(ConfigError, match=r"old\.csv was begun by an older version, without .* above_threshold"):
        resume_results(path, format="csv")
    assert path.read_text() == whole


def test_csv_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    for row in ("a\rb,1,x,0,1,,\n", f"a,{'x' * 200_000},,,,,\n"):
        path.write_bytes(b"file,rank,label,index,probability,above_threshold,error\n" + row.encode())
        with pytest.raises(ConfigError, match=r"o\.csv holds other things than results as csv"):
            resume_results(path, format="csv")


@pytest.mark.parametrize(
    ("name", "shown"), [("a\x1b[2J.png", r"a\x1b[2J.png"), ("\u202eb", r"\u202eb"), ("a\rb", r"a\rb")]
)
def test_text_shows_control_characters_as_escapes(name: str, shown: str) -> None:
    stream = io.StringIO()
    write_results([ImageResult(name, (Prediction(name, 0.5, 0),))], stream, format="text")
    assert stream.getvalue() == f"{shown}\n   50.00 %  {shown}\n"


# On a terminal


def drawn(monkeypatch: pytest.MonkeyPatch, *predictions: Prediction, columns: int = 80, **more: object) -> list[str]:
    """The lines of one image on a terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal(more.pop("encoding", "utf-8"))
    write_results([ImageResult("a.png", predictions, **more)], stream, format="text")
    return stream.getvalue().splitlines()


def test_terminal_gets_a_bar_by_the_probability_and_the_likeliest_class_in_bold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    name, cat, dog = drawn(monkeypatch, Prediction("cat", 0.75, 0), Prediction("dog", 0.25, 1))
    assert name == "a.png"
    assert cat == f"   75.00 %  \x1b[32m{'█' * 17}▎{' ' * 5}\x1b[0m  \x1b[1mcat\x1b[0m"
    assert dog == f"   25.00 %  \x1b[36m{'█' * 5}▊{' ' * 17}\x1b[0m  dog"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_terminal_without_colours_gets_bars_alone(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert drawn(monkeypatch, Prediction("cat", 1.0, 0))[1] == f"  100.00 %  {'█' * 23}  cat"


def test_code_page_without_blocks_gets_ascii_bars_and_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    lines = drawn(monkeypatch, Prediction("猫" * 9, 0.5, 0), Prediction("é", 0.5, 1), columns=50, encoding="cp1252")
    label = r"\u732b" * 9
    assert lines[1] == f"   50.00 %  {'#' * 6}{' ' * 7}  {label[:19]}..."
    assert lines[2] == f"   50.00 %  {'#' * 6}{' ' * 7}  é"


@pytest.mark.parametrize("columns", [20, 30, 40, 80, 200])
@pytest.mark.parametrize("label", ["tabby, " * 40, "虎斑猫" * 40, "cat"])
def test_no_line_is_wider_than_the_terminal(columns: int, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for labels in (None, (label,)):
        line = drawn(monkeypatch, Prediction(label, 0.5, 0), columns=columns, labels=labels)[1]
        assert disp_len(line) < columns
        assert ("…" in line) == (len(label) > 3)
        assert line.endswith(" *") == (labels is not None)


def test_values_of_a_regression_have_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, Prediction("years", 41.5, 0))[1] == "      41.5  years"


def test_colours_are_forced_into_a_pipe_but_not_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stdout", pipe)
    assert look_of(pipe) is None
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert look_of(pipe) is not None
    assert look_of(io.StringIO()) is None
    monkeypatch.setenv("NO_COLOR", "1")
    assert look_of(pipe) is None
