"""The report as a page: its figures, its names, and what a browser makes of it."""

from __future__ import annotations

import base64
import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coloured
import PIL.Image
import pytest
import torch
from browser import accessibility_faults, chromium, overflowing
from tiny import PREPROCESSING, Several, recipe
from tiny import Pictures as Noise
from tiny import model as tiny_model
from torchvision.transforms.v2 import functional as TF

import deit_models
from deit_models.data.records import ArrayRecords, ImageRecords
from deit_models.errors import SaveError
from deit_models.images.transforms import EvalTransform
from deit_models.scoring.outcomes import Outcomes, Tally
from deit_models.show.heat_maps import heat_maps
from deit_models.show.pages import Report, add_page, costs_of, evaluation_page, write_page
from deit_models.show.pictures import overlay, view

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = ["</td><script>alert(1)</script>", "a\"b'&amp;{{ 7 * 7 }}", "\u202egnp.cod", "قطة", "x" * 300, "\udcff\x00"]
VOID = {"meta", "img", "br"}
COSTS = costs_of(torch.device("cpu"), 12.34, speed=56.7)
ROWS = [
    {"epoch": n, "loss": 2 / (n + 1), "val_loss": 2.5 / (n + 1), "top1": 50 + 3 * n, "ema_top1": 52 + 3.1 * n}
    for n in range(9)
]


class Parsed(HTMLParser):
    """A page as parts of text and attributes; every tag must be closed in its order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.figures: dict[str, str] = {}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        figure = self.tags[-1][1].get("data-figure") if self.tags else None
        if figure:
            self.figures.setdefault(figure, data.strip())

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def outcomes(labels: Sequence[int], *, classes: int, seed: int = 0, skill: float = 3.0) -> Outcomes:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(labels), classes, generator=generator)
    logits[torch.arange(len(labels)), torch.tensor(labels)] += skill
    tally = Tally()
    tally.add([logits], torch.tensor(labels))
    return tally.outcomes()


def scored(count: int, classes: int, *, names: Sequence[str] = (), **options: Any) -> tuple[ImageRecords, Outcomes]:
    noise = Noise(count, classes=classes)
    records = ArrayRecords("noise", noise.levels.numpy(), noise.labels.tolist(), [*names] or noise.classes)
    return records, outcomes(noise.labels.tolist(), classes=classes, **options)


def several(count: int = 60) -> tuple[Several, Outcomes]:
    records = Several(count)
    generator = torch.Generator().manual_seed(1)
    tally = Tally()
    tally.add([torch.randn(count, 3, generator=generator) + 2 * records.labels - 1], records.labels)
    return records, tally.outcomes()


def report(val: tuple[ImageRecords, Outcomes] | None, **changes: Any) -> Report:
    given: dict[str, Any] = {"title": "Training on noise", "facts": {"data": "noise, 3 classes"}, "costs": COSTS}
    given |= {"scored": {} if val is None else {"val": val}, "curve": ROWS}
    return Report(**{**given, **changes})


def page(tmp_path: Path, val: tuple[ImageRecords, Outcomes] | None, **changes: Any) -> tuple[str, Parsed]:
    write_page(tmp_path / "report.html", report(val, **changes))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return text, Parsed(text)


# Figures


def test_figures_of_the_page_are_those_of_metrics_json(tmp_path: Path) -> None:
    train, test = coloured.Counted(30, shift=30), coloured.Counted(12, seed=100, shift=30)
    out = tmp_path / "out"
    options = {"mode": "head", "recipe": coloured.recipe(), "workers": 0, "device": "cpu"}
    deit_models.finetune(coloured.atom(), train=train, test=test, out=out, **options)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    found = Parsed((out / "report.html").read_text(encoding="utf-8"))
    for part in ("val", "test"):
        for name in ("top1", "top5", "balanced_accuracy", "macro_f1"):
            assert found.figures[f"{part}.{name}"] == f"{metrics[part][name]:.2f} %"
        assert found.figures[f"{part}.images"] == str(metrics[part]["images"])
        assert found.figures[f"{part}.loss"] == f"{metrics[part]['loss']:.4f}"
    for words in ("deit_micro_patch4_32", "counted, 3 classes: 24 images for training, 6 for validation", "L2 penalty"):
        assert words in found.text
    assert "seed 0, split.json" in found.text
    assert f"torch {torch.__version__}" in found.text


def test_table_of_classes_is_the_csv_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"mode": "head", "recipe": coloured.recipe(), "workers": 0, "device": "cpu"}
    deit_models.finetune(coloured.atom(), train=coloured.Counted(60, shift=20), out=out, **options)
    with (out / "per_class_val.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    text = Parsed((out / "report.html").read_text(encoding="utf-8")).text
    for row in rows:
        cells = rf"{row['class']} ?{row['images']} ?{float(row['accuracy']):.1f} %"
        assert re.search(cells, text), cells
    weakest = min(rows, key=lambda row: float(row["accuracy"]))["class"]
    table = text[text.index("most often taken for") :]
    assert min(table.index(row["class"]) for row in rows) == table.index(weakest)


def test_intervals_and_calibration_error_are_in_the_page(tmp_path: Path) -> None:
    val = scored(200, 4)
    _, found = page(tmp_path, val)
    right, n, z = int(val[1].right().sum()), 200, 1.959963984540054
    middle, half = right + z * z / 2, z * (right * (n - right) / n + z * z / 4) ** 0.5
    ends = [100 * (middle + side * half) / (n + z * z) for side in (-1, 1)]
    assert f"{ends[0]:.2f} to {ends[1]:.2f}, Wilson" in found.text
    low, high = map(float, re.search(r"macro F1 ?[\d.]+ % ?([\d.]+) to ([\d.]+), bootstrap", found.text).groups())
    assert low < val[1].evaluation().macro_f1 < high
    assert 2 < high - low < 20
    probability, hits = val[1].probability.double().numpy(), val[1].right().numpy()
    gaps = 0.0
    for bin_ in range(15):
        inside = (probability > bin_ / 15) & (probability <= (bin_ + 1) / 15)
        gaps += abs(probability[inside].sum() - hits[inside].sum())
    assert found.figures["ece"] == f"{100 * gaps / n:.2f} %"


def test_one_image_has_figures_too(tmp_path: Path) -> None:
    _, found = page(tmp_path, scored(1, 3))
    assert found.figures["val.images"] == "1"


def test_most_frequent_mistake_comes_first(tmp_path: Path) -> None:
    records = ArrayRecords("pets", torch.zeros(7, 8, 8, 3, dtype=torch.uint8).numpy(), [0, 0, 0, 1, 1, 2, 2], "abc")
    tally = Tally()
    tally.add(
        [10.0 * torch.nn.functional.one_hot(torch.tensor([2, 2, 0, 0, 1, 2, 2]), 3)],
        torch.tensor([0, 0, 0, 1, 1, 2, 2]),
    )
    text, _ = page(tmp_path, (records, tally.outcomes()))
    table = text[text.index("The most frequent mistakes") :]
    assert re.findall(r"<bdi>(\w)</bdi>", table)[:4] == ["a", "c", "b", "a"]
    assert "66.7" in table[: table.index("</tr>", table.index("<bdi>a</bdi>"))]


# Kinds of runs


def test_several_labels_have_their_figures_and_no_matrix(tmp_path: Path) -> None:
    val = several()
    _, found = page(tmp_path, val, thresholds=(0.25, 0.5, 0.75))
    assert found.figures["val.map"] == f"{val[1].evaluation((0.25, 0.5, 0.75)).map:.2f} %"
    assert found.figures["val.micro_f1"] == f"{val[1].evaluation((0.25, 0.5, 0.75)).micro_f1:.2f} %"
    for words in (
        "several labels, so there is no confusion matrix",
        "average precision",
        "threshold",
        "0.25",
        "recall",
    ):
        assert words in found.text
    assert "Confusion matrix" not in found.text


def test_run_without_mistakes_says_so(tmp_path: Path) -> None:
    _, found = page(tmp_path, scored(30, 3, skill=99.0))
    assert found.figures["val.top1"] == "100.00 %"
    assert "There are no mistakes." in found.text
    assert "No class was taken for another one." in found.text


@pytest.mark.parametrize("readable", [False, True])
def test_run_without_validation_images_has_a_page(tmp_path: Path, readable: bool) -> None:
    records, empty = Noise(0), Tally().outcomes()
    _, found = page(tmp_path, (records, empty) if readable else None)
    assert "There were no images to measure the model on" in found.text
    assert "Time and hardware" in found.text


def test_without_epochs_there_are_no_curves(tmp_path: Path) -> None:
    _, found = page(tmp_path, scored(9, 3), curve=())
    assert "There are no epochs to show." in found.text


def test_training_writes_a_report_of_its_last_weights_without_another_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    val = Noise(8, seed=1)
    options = {"workers": 0, "device": "cpu", "preprocessing": PREPROCESSING, "cache": "none"}
    settings = recipe(epochs=2, ema_decay=0.5)
    result = deit_models.train(tiny_model(), recipe=settings, train=Noise(8), val=val, out=tmp_path, **options)
    mistakes = 8 - round(result.log[-1]["ema_top1"] * 8 / 100)
    assert len(val.read) == 8 * 2 + mistakes  # two evaluations, and the thumbnails
    found = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert found.figures["val.top1"] == f"{result.log[-1]['ema_top1']:.2f} %"
    for words in ("averaged weights", "noise, 3 classes: 8 images for training, 8 for validation", "best/ is of epoch"):
        assert words in found.text
    before = (tmp_path / "report.html").stat()
    deit_models.train(tiny_model(), recipe=settings, train=Noise(8), val=val, out=tmp_path, **options)
    assert (tmp_path / "report.html").stat().st_mtime_ns == before.st_mtime_ns  # a finished run keeps its report
    assert "was not written" not in caplog.text


def test_training_without_validation_images_writes_a_report(tmp_path: Path) -> None:
    options = {"workers": 0, "device": "cpu", "preprocessing": PREPROCESSING}
    deit_models.train(tiny_model(), recipe=recipe(), train=Noise(8), out=tmp_path, **options)
    assert "There were no images to measure" in Parsed((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_evaluation_writes_a_report_on_request(tmp_path: Path) -> None:
    model, file = tiny_model(), tmp_path / "page.html"
    val = Noise(20)
    options = {"workers": 0, "device": "cpu", "transform": EvalTransform(PREPROCESSING)}
    write = evaluation_page(file, model, title="My model", transform=EvalTransform(PREPROCESSING))
    found = deit_models.evaluate(model, val, on_outcomes=write, ignore_class_names=True, **options)
    parsed = Parsed(file.read_text(encoding="utf-8"))
    assert parsed.figures["images.top1"] == f"{found.top1:.2f} %"
    assert "My model" in parsed.text


# Names and images that are not as they should be


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    val = scored(60, len(HOSTILE), names=HOSTILE, skill=0.5)
    facts = {"data": HOSTILE[0], HOSTILE[1]: HOSTILE[5]}
    text, found = page(tmp_path, val, title=HOSTILE[0], facts=facts, notes=[HOSTILE[0]])
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not re.search("[\x00\u202e]", text)
    assert "</td><script>alert(1)</script>" in found.text
    assert "a\"b'&amp;{{ 7 * 7 }}" in found.text
    for name in (r"\u202egnp.cod", "قطة", "x" * 300, r"\udcff\x00"):
        assert name in found.text


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    text, found = page(tmp_path, scored(60, 4, skill=1.0))
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("#", "data:image/jpeg;base64,")), (tag, value)
        assert not [name for name in attributes if name.startswith("on")], tag
    styles = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|https?:|//", styles)
    assert "http" not in re.sub(r"base64,[\w+/=]+|http-equiv", "", text)
    assert "default-src 'none'" in text


def test_image_that_is_gone_or_odd_costs_a_line_and_no_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Noise):
        def __getitem__(self, index: int) -> Any:
            if index % 3 == 0:
                raise KeyError(index)  # a user's own Dataset may raise anything
            if index % 3 == 1:
                return torch.full((5, 8, 8), 90, dtype=torch.uint8), 0
            return super().__getitem__(index)

    records = Odd(24)
    wrong = outcomes(records.labels.tolist(), classes=3, skill=-9.0)
    with caplog.at_level(logging.WARNING, logger="deit_models"):
        _, found = page(tmp_path, (records, wrong))
    assert found.text.count("The image cannot be read.") == 8
    assert [tag for tag, _ in found.tags].count("img") == 16
    assert len([line for line in caplog.messages if "no picture of image" in line]) == 8


def test_mistakes_have_heat_maps_of_the_prediction(tmp_path: Path) -> None:
    records, found = scored(12, 3, skill=-9.0)
    model, transform = tiny_model(), EvalTransform(PREPROCESSING)
    text, parsed = page(tmp_path, (records, found), model=model, transform=transform)
    pictures = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert "the parts that speak for the prediction" in parsed.text
    assert text.count('alt="Heat map of the same image"') == 12
    worst = found.worst(1)[0]
    index = int(found.index[worst])
    heat = heat_maps(model, transform(records[index][0])[None], method="gradient", target=int(found.predicted[worst]))
    expected = overlay(view(transform, records[index][0]).resize((192, 192)), heat[0])
    with PIL.Image.open(io.BytesIO(base64.b64decode(pictures[1].partition(",")[2]))) as picture:
        difference = (TF.pil_to_tensor(picture).float() - TF.pil_to_tensor(expected).float()).abs().mean()
    assert difference < 6  # of 255, by JPEG


def test_network_without_attention_has_mistakes_without_heat_maps(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    given = {"model": network, "transform": EvalTransform(PREPROCESSING)}
    _, parsed = page(tmp_path, scored(12, 3, skill=-9.0), **given)
    assert "There are no heat maps: Sequential has no attention maps to draw" in parsed.text
    assert [tag for tag, _ in parsed.tags].count("img") == 12


def test_thumbnails_are_small_pictures(tmp_path: Path) -> None:
    records = ArrayRecords("wide", torch.randint(0, 256, (3, 90, 600, 3), dtype=torch.uint8).numpy(), [0, 1, 2], "abc")
    _, found = page(tmp_path, (records, outcomes([0, 1, 2], classes=3, skill=-9.0)))
    (first, *_) = [attributes for tag, attributes in found.tags if tag == "img"]
    with PIL.Image.open(io.BytesIO(base64.b64decode(first["src"].partition(",")[2]))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (192, 29))
    assert first["alt"].startswith("Image of ")


def test_finished_run_does_not_fail_for_its_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "report.html").mkdir()
    with caplog.at_level(logging.WARNING, logger="deit_models"):
        add_page(tmp_path, lambda: report(scored(9, 3)))
    (line,) = caplog.messages
    assert "report.html was not written: " in line
    with pytest.raises(SaveError):
        write_page(tmp_path / "report.html", report(scored(9, 3)))


# Weight


@pytest.mark.parametrize(("classes", "most"), [(2, 0.5), (200, 1.0), (1000, 1.5)])
def test_page_is_light(tmp_path: Path, classes: int, most: float) -> None:
    records = ArrayRecords(
        "noise",
        Noise(3000, classes=classes).levels.numpy(),
        [n % classes for n in range(3000)],
        [f"n{n:08} a kind of animal" for n in range(classes)],
    )
    text, found = page(tmp_path, (records, outcomes([n % classes for n in range(3000)], classes=classes, skill=3.0)))
    assert [tag for tag, _ in found.tags].count("img") == 24
    assert len(text) < most * 1e6  # with 24 pictures of noise, which no format makes small
    cells = [attributes for tag, attributes in found.tags if attributes.get("class") == "cell"]
    assert len(cells) <= 900


def test_classes_that_neither_occur_nor_are_predicted_are_counted_and_left_out(tmp_path: Path) -> None:
    labels = [0, 1] * 10
    records = ArrayRecords("noise", Noise(20).levels.numpy(), labels, [f"kind {n}" for n in range(500)])
    _, found = page(tmp_path, (records, outcomes(labels, classes=500, skill=99.0)))
    assert "498 classes of the model without images here are left out." in found.text


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [*HOSTILE, *(f"kind {number}" for number in range(34))]
    path = tmp_path_factory.mktemp("page") / "report.html"
    notes = ["The validation images chose the weights."]
    write_page(path, report(scored(400, len(names), names=names, skill=2.0), notes=notes))
    return path


def opened(browser: Browser, file: Path, **options: Any) -> Page:
    page = browser.new_context(**options).new_page()
    page.goto(file.as_uri())
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_accessible(browser: Browser, file: Path, scheme: Any) -> None:
    shown = opened(browser, file, color_scheme=scheme)
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 21, 26)"}[scheme]
    assert accessibility_faults(shown) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_reaches_beyond_the_window(browser: Browser, file: Path, width: int) -> None:
    shown = opened(browser, file, viewport={"width": width, "height": 800})
    assert overflowing(shown) == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width


def column(shown: Page, number: int) -> list[str]:
    return shown.evaluate(
        "n => [...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[n].dataset.value)", number
    )


def test_classes_are_sorted_by_click_and_by_keyboard(browser: Browser, file: Path) -> None:
    shown = opened(browser, file)
    button = shown.get_by_role("button", name="images")
    for key, order in ((None, 1), ("Enter", -1), ("Space", 1)):
        button.click() if key is None else button.press(key)
        values = [int(value) for value in column(shown, 1)]
        assert values == sorted(values, reverse=order < 0)
        heading = shown.locator(".sortable th", has=button)
        assert heading.get_attribute("aria-sort") == ("ascending" if order > 0 else "descending")
    shown.get_by_role("button", name="F1").click()
    assert shown.locator("[aria-sort]").count() == 1
    values = [float(value) for value in column(shown, 4) if value]
    assert values == sorted(values)
    shown.get_by_role("button", name=re.compile("^class")).click()
    names = shown.locator(".sortable tbody th").all_inner_texts()
    assert names.index("kind 2") < names.index("kind 10")


def test_page_without_scripts_has_everything(browser: Browser, file: Path) -> None:
    with_scripts, without = opened(browser, file), opened(browser, file, java_script_enabled=False)
    body = without.locator("main").inner_text()
    for line in with_scripts.locator("main").inner_text().splitlines():
        assert line.strip() in body
    assert without.locator(".sortable tbody tr").count() == 40


def test_page_is_printed_light_and_whole(browser: Browser, file: Path) -> None:
    shown = opened(browser, file, color_scheme="dark")
    pdf = shown.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 8
    shown.emulate_media(media="print", color_scheme="dark")
    assert shown.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    assert not shown.locator("nav").is_visible()


def test_page_asks_the_network_for_nothing_and_raises_no_error(browser: Browser, file: Path) -> None:
    page = browser.new_context().new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.goto(file.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert errors == []
