"""Charts as SVG: every mark is where its number says, and names, whatever they are, stay text."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import PIL.Image
import pytest
import torch
from coloured import save_folders

from deit_models.data.datasets import open_dataset
from deit_models.errors import MissingExtraError
from deit_models.scoring.metrics import calibration
from deit_models.scoring.outcomes import Outcomes, Tally
from deit_models.show.charts import (
    confusion_matrix,
    draw_confusion,
    draw_mistakes,
    line_chart,
    plot_curves,
    reliability_diagram,
    shortened,
)

HOSTILE = ["<script>alert(1)</script>", "a\"b'c&d", "\u202egnp.cod", "قطة صغيرة", "x" * 300, "", "\udcff\x00\n"]


def parsed(svg: str) -> ET.Element:
    """The chart as XML, which is stricter than HTML."""
    root = ET.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root[0].tag == "title"
    assert root[0].text == root.get("aria-label")
    assert len(root.get("aria-label")) > 20
    return root


def texts(root: ET.Element) -> list[str]:
    return ["".join(part.tail or "" for part in text) + (text.text or "") for text in root.iter("text")]


def test_points_of_a_line_lie_where_the_ticks_say() -> None:
    root = parsed(line_chart({"one": [(1, 20.0), (2, 40.0), (3, 60.0)]}, title="top-1", x="epoch", y="top-1 (%)"))
    points = [tuple(map(float, at.split(","))) for at in root.find(".//polyline").get("points").split()]
    by_row = {text.text: float(text.get("y")) - 4 for text in root.iter("text") if text.get("class") == "end"}
    by_column = {
        text.text: float(text.get("x")) for text in root.iter("text") if text.get("class") == "mid" and text.get("x")
    }
    assert [y for _, y in points] == pytest.approx([by_row["20"], by_row["40"], by_row["60"]], abs=0.11)
    assert [x for x, _ in points] == pytest.approx([by_column["1"], by_column["2"], by_column["3"]], abs=0.11)
    assert "top-1, by epoch: one from 20 to 60." in root.get("aria-label")


def test_epochs_are_whole_numbers_on_the_axis() -> None:
    root = parsed(line_chart({"one": [(1, 0.5), (2, 0.25)]}, title="loss", x="epoch", y="loss"))
    columns = [text.text for text in root.iter("text") if text.get("class") == "mid" and text.get("x")]
    assert columns == ["1", "2", "epoch"]


def test_penalties_have_a_logarithmic_axis() -> None:
    root = parsed(line_chart({"val": [(1.0, 5), (0.1, 6), (0.01, 7)]}, title="loss", x="penalty", y="loss", log_x=True))
    places = [float(mark.get("cx")) for mark in root.iter("circle")]
    assert places[0] - places[1] == pytest.approx(places[1] - places[2], abs=0.2)
    assert places[0] > places[1]


@pytest.mark.parametrize("points", [[], [(1, float("nan"))], [(1, float("inf"))]])
def test_line_without_numbers_is_a_sentence(points: list[tuple[float, float]]) -> None:
    assert line_chart({"<one>": points}, title="loss", x="epoch", y="loss") == "<p>loss: no figures.</p>"


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [0.0, 1e-12], [1e9, -1e9], [float("nan"), 2.0]])
def test_odd_numbers_stay_inside_the_chart(values: list[float]) -> None:
    root = parsed(line_chart({"one": [*enumerate(values)]}, title="loss", x="epoch", y="loss"))
    _, _, width, height = map(float, root.get("viewBox").split())
    for mark in root.iter("circle"):
        assert 0 <= float(mark.get("cx")) <= width
        assert 0 <= float(mark.get("cy")) <= height
    assert len([text for text in root.iter("text") if text.get("class") == "end"]) <= 8


def test_three_lines_differ_by_more_than_their_colour() -> None:
    lines = {name: [(1, 1.0), (2, 2.0)] for name in ("a", "b", "c")}
    root = parsed(line_chart(lines, title="loss", x="epoch", y="loss"))
    assert [group.get("class") for group in root.iter("g")] == ["line0", "line1", "line2"]  # dashes in report.html
    assert {"a", "b", "c"} <= set(texts(root))


def test_bars_of_the_reliability_diagram_are_the_shares() -> None:
    found = calibration(torch.tensor([0.95, 0.95, 0.5, 0.5]), torch.tensor([True, False, True, True]))
    root = parsed(reliability_diagram(found, unit="cats"))
    bars = {bar.get("class"): [] for bar in root.iter("rect")}
    for bar in root.iter("rect"):
        bars[bar.get("class")].append(float(bar.get("height")))
    assert bars["bar"] == pytest.approx([2 * bars["bar"][1], bars["bar"][1]], abs=0.11)
    assert bars["count"][0] == bars["count"][1] > 0
    told = [title.text for title in root.iter("title")]
    assert "probability 93 to 100 %: 2 cats, 50.0 % right" in told
    assert "calibration error 47.50 %" in root.get("aria-label")


def test_cell_of_the_matrix_is_the_share_of_its_class() -> None:
    root = parsed(confusion_matrix(["cat", "dog"], torch.tensor([[3, 1], [0, 2]]), torch.tensor([8, 2])))
    told = [group[0].text for group in root.iter("g")]
    assert told == [
        "cat, predicted cat: 3 images, 37.5 %",
        "cat, predicted dog: 1 images, 12.5 %",
        "dog, predicted dog: 2 images, 100.0 %",
    ]
    cells = [rect for rect in root.iter("rect") if rect.get("class") == "cell"]
    cells = [(rect.get("x"), rect.get("y"), float(rect.get("opacity"))) for rect in cells]
    assert [cell[2] for cell in cells] == pytest.approx([0.38, 0.12, 0.98], abs=0.006)
    assert cells[0][1] == cells[1][1] != cells[2][1]
    assert cells[1][0] == cells[2][0] != cells[0][0]


@pytest.mark.parametrize("classes", [1, 2, 10, 30])
def test_numbers_fit_their_cells(classes: int) -> None:
    counts = torch.full((classes, classes), 7)
    root = parsed(confusion_matrix([f"kind {n}" for n in range(classes)], counts, counts.sum(1)))
    sides = {float(rect.get("width")) for rect in root.iter("rect") if rect.get("class") == "cell"}
    assert min(sides) >= 26  # "100" at 13 pixels is 24 wide
    assert float(root.get("viewBox").split()[2]) < 1200


def test_hostile_names_stay_text() -> None:
    size = len(HOSTILE)
    root = parsed(confusion_matrix(HOSTILE, torch.eye(size).long(), torch.ones(size).long()))
    assert not list(root.iter("script"))
    names = texts(root)
    assert "<script>alert(1)</scr…" in names
    assert "\\u202egnp.cod" in names  # which would reverse the text
    assert "قطة صغيرة" in names
    assert max(map(len, names)) <= 22
    assert "x" * 300 in [title.text for title in root.iter("title")]
    assert shortened("\udcff\x00\n") == r"\udcff\x00\n"


def test_no_chart_refers_to_anything_outside_itself() -> None:
    charts = [
        line_chart({"one": [(1, 1.0)]}, title="loss", x="epoch", y="loss"),
        confusion_matrix(["url(http://x)"], torch.ones(1, 1).long(), torch.ones(1).long()),
        reliability_diagram(calibration(torch.rand(9), torch.ones(9))),
    ]
    for chart in charts:
        assert not re.search(r"(href|src|style|xlink|id)=|<style|on\w+=", chart)


# PNG files


def outcomes(labels: list[int], predicted: list[int], *, classes: int = 3) -> Outcomes:
    """The outcomes of a model that is sure of its predictions; a label of -1 is an unreadable image."""
    tally = Tally()
    tally.add([10.0 * torch.nn.functional.one_hot(torch.tensor(predicted), classes)], torch.tensor(labels))
    return tally.outcomes()


ROWS = [{"epoch": 0, "loss": 2.0, "top1": 30.0}, {"epoch": 1, "loss": 1.5}, {"epoch": 2, "loss": 1.2, "top1": 50.0}]


def ink(path: Path) -> int:
    """Pixels that are neither white nor grey."""
    with PIL.Image.open(path) as image:
        pixels = image.convert("RGB").get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata()
        return sum(max(pixel) - min(pixel) > 60 for pixel in pixels)


def test_every_run_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the extra [plot]")
    plot_curves({"one": ROWS}, tmp_path / "new" / "one.png", title="a title")
    plot_curves({"one": ROWS, "two": [{**row, "loss": row["loss"] + 1} for row in ROWS]}, tmp_path / "two.png")
    plot_curves({"empty": []}, tmp_path / "empty.png")
    assert ink(tmp_path / "empty.png") == 0
    assert 100 < ink(tmp_path / "new" / "one.png") < ink(tmp_path / "two.png")


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deit-models\[plot\]'"):
        plot_curves({"one": ROWS}, tmp_path / "one.png")


@pytest.fixture
def _pictures() -> None:
    pytest.importorskip("matplotlib", reason="the pictures need the extra [plot]")


def is_drawn(path: Path) -> bool:
    with PIL.Image.open(path) as picture:
        return picture.format == "PNG" and len(picture.convert("L").getcolors(256)) > 8


@pytest.mark.usefixtures("_pictures")
def test_curve_is_drawn_by_epoch_or_by_penalty(tmp_path: Path) -> None:
    rows = [{"epoch": 0, "loss": 1.0, "top1": 50.0}, {"epoch": 1, "loss": 0.5, "top1": 60.0}]
    plot_curves({"fine-tuning": rows}, tmp_path / "a.png")
    plot_curves({"fine-tuning": [{"penalty": 1.0, "loss": 1.0, "balanced_accuracy": 50.0}]}, tmp_path / "b.png")
    assert is_drawn(tmp_path / "a.png")
    assert is_drawn(tmp_path / "b.png")


@pytest.mark.usefixtures("_pictures")
def test_confusion_of_many_classes_shows_those_with_mistakes(tmp_path: Path) -> None:
    names = [f"species {number}" for number in range(5000)]
    draw_confusion(outcomes([4000, 4999, 7], [4999, 4000, 7], classes=5000), names, tmp_path / "confusion.png")
    assert is_drawn(tmp_path / "confusion.png")


@pytest.mark.usefixtures("_pictures")
def test_mistakes_are_drawn_also_when_there_are_none_or_an_image_is_gone(tmp_path: Path) -> None:
    photos = open_dataset(save_folders(tmp_path / "photos"), "train")
    Path(photos.describe(0)).unlink()
    draw_mistakes(outcomes([0, 0], [1, 2]), photos, tmp_path / "some.png")
    draw_mistakes(outcomes([0, 0], [0, 0]), photos, tmp_path / "none.png")
    assert is_drawn(tmp_path / "some.png")
    assert (tmp_path / "none.png").exists()
