"""The demo page: its answers, what it refuses, what it serves, and how it looks and works in a browser."""

import asyncio
import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from browser import accessibility_faults, chromium, overflowing
from PIL import Image

import deit_models
from deit_models import Classifier, ConfigError, ImageError, MissingExtraError
from deit_models.models.deit import DeiT
from deit_models.show import demo

if TYPE_CHECKING:
    from playwright.sync_api import Page

# gradio calls pandas in ways that pandas is about to drop
pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
ROOT = Path(__file__).resolve().parents[2]
NAMES = ["deit_micro_distilled_patch4_32", "deit_micro_patch4_32"]
"""Both come with the package."""
ALONE = "(no comparison)"


@pytest.fixture(scope="module")
def classifiers() -> dict[str, Classifier]:
    return demo.load_classifiers(NAMES)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A smooth picture of 90x60 pixels that is no two ways alike."""
    return photograph(tmp_path / "holiday photo.png")


def photograph(path: Path) -> Path:
    coarse = torch.randint(0, 256, (4, 6, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    Image.fromarray(coarse.numpy()).resize((90, 60), Image.Resampling.BICUBIC).save(path)
    return path


def uploaded(path: Path) -> dict[str, Any]:
    """An upload, as gradio gives it."""
    return {"path": str(path), "orig_name": path.name}


# Answers


def test_answer_has_the_probabilities_of_the_classifier_and_the_crop(
    classifiers: dict[str, Classifier], photo: Path
) -> None:
    found = demo.answer(classifiers[NAMES[0]], demo.read_upload(uploaded(photo)), None)
    expected = Classifier(NAMES[0])(str(photo)).predictions
    assert list(found.probabilities.items()) == [(label, probability) for label, probability, _ in expected]
    assert found.picture.width == found.picture.height
    assert found.picture.width >= 300, "large enough to look at"
    assert found.classify_ms > 0
    assert (found.heat_map_ms, found.note) == (None, "")


def test_each_method_draws_another_heat_map(classifiers: dict[str, Classifier], photo: Path) -> None:
    picture = demo.read_upload(uploaded(photo))
    found = [demo.answer(classifiers[NAMES[0]], picture, method) for method in (None, "rollout", "last", "gradient")]
    assert len({answer.picture.tobytes() for answer in found}) == 4
    assert len({answer.picture.size for answer in found}) == 1
    assert all(answer.probabilities == found[0].probabilities for answer in found)
    assert all(answer.heat_map_ms > 0 for answer in found[1:])


def test_model_without_attention_classifies_and_says_why_there_is_no_heat_map(photo: Path) -> None:
    class Silent(DeiT):
        @property
        def attention_maps(self) -> Any:
            raise AttributeError("attention_maps")

    known = deit_models.from_pretrained(NAMES[0])
    model = Silent(known.config)
    model.origin = known.origin
    found = demo.answer(Classifier(model), demo.read_upload(uploaded(photo)), "rollout")
    assert found.heat_map_ms is None
    assert "Silent has no attention maps" in found.note
    assert len(found.probabilities) == 5


def test_two_classes_of_one_name_are_both_shown(photo: Path) -> None:
    classifier = Classifier(NAMES[0], labels=["crane"] * 10)
    found = demo.answer(classifier, demo.read_upload(uploaded(photo)), None)
    assert len(found.probabilities) == 5
    assert sum(found.probabilities.values()) == pytest.approx(
        sum(row.probability for row in classifier(photo).predictions)
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_pictures_of_every_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    Image.new(mode, (50, 40), None if mode != "I;16" else 40000).save(path)
    picture = demo.read_upload(uploaded(path))
    assert (picture.mode, picture.size) == ("RGB", (50, 40))
    if mode == "RGBA":
        assert picture.getpixel((0, 0)) == (255, 255, 255), "nothing at all lies over white"


def test_photograph_on_its_side_is_turned_upright(photo: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photo) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    turned, upright = (demo.read_upload(uploaded(path)) for path in (tmp_path / "side.png", photo))
    assert turned.tobytes() == upright.tobytes()


# Refusals


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"not a picture", "not an image in a format Pillow knows"), (b"", "the file is empty|not an image")],
)
def test_bad_file_is_refused_by_its_name_without_its_path(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "0a1b2c.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"^cat\.jpg: ({reason})") as refused:
        demo.read_upload({"path": str(path), "orig_name": "cat.jpg"})
    assert str(tmp_path) not in str(refused.value)


def test_cut_file_and_missing_path_are_refused(photo: Path) -> None:
    whole = photo.read_bytes()
    photo.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"^holiday photo\.png: damaged image"):
        demo.read_upload(uploaded(photo))
    with pytest.raises(ImageError, match="the upload holds no file"):
        demo.read_upload({"path": None, "url": "data:image/png;base64,AAAA"})


def test_large_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("L", (300, 200)).save(path)
    path.write_bytes(path.read_bytes()[:60])  # its size stands in front; the rest is gone
    with pytest.raises(ImageError, match=r"^x\.png: 300x200 pixels, more than 0\.05 million; make it smaller"):
        demo.read_upload(uploaded(path), max_pixels=50_000)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "no model given"),
        ([NAMES[0], NAMES[0]], f"two models are called '{NAMES[0]}'"),
        (["deit_nano"], "deit_nano"),
    ],
)
def test_models_that_cannot_be_shown_are_refused(models: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.load_classifiers(models)


@pytest.mark.parametrize(
    ("options", "problem", "message"),
    [
        ({"num_classes": 0}, None, "num_classes=0"),
        ({"num_classes": 3}, "regression", "gives values, not classes"),
        ({"in_chans": 4}, None, "4 channels"),
    ],
)
def test_models_that_take_or_give_something_else_are_refused(
    options: dict[str, int], problem: str | None, message: str
) -> None:
    model = deit_models.create_model(NAMES[1], **options)
    model.origin = replace(model.origin, problem_type=problem)
    with pytest.raises(ConfigError, match=message):
        demo.load_classifiers(model)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for call in (demo.launch, demo.build_app):
        with pytest.raises(MissingExtraError, match=r"^the demo needs gradio; pip install 'deit-models\[demo\]'$"):
            call(["deit_nano"])


def test_address_that_cannot_be_used_is_refused_before_models_load() -> None:
    pytest.importorskip("gradio", reason="needs gradio, see the extra [demo]")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError,
            match=rf"^cannot listen on 127\.0\.0\.1, port {port} \(Address already in use\); choose another one",
        ):
            demo.launch(["deit_nano"], port=port)
    with pytest.raises(ConfigError, match=r"port=99999; expected a number from 1 to 65535"):
        demo.launch(["deit_nano"], port=99999)
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid"):
        demo.launch(["deit_nano"], host="no.such.host.invalid")


# The page, over HTTP


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def opened(models: Any, port: int, **options: Any) -> tuple[Any, str]:
    """A running demo and its address."""

    async def build() -> tuple[Any, str]:
        app = demo.build_app(models, **options)
        return app, demo.start(app, port=port)

    return asyncio.run(build())  # gradio makes event loops and leaves them open, unless it finds a running one


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a running demo of two models, and the folder for its temporary files."""
    pytest.importorskip("gradio", reason="needs gradio, see the extra [demo]")
    folder = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        app, url = opened(NAMES, free_port(), max_pixels=1_000_000)
        yield url, folder
        app.close(verbose=False)
    assert [path for path in folder.rglob("*") if path.is_file()] == [], "uploads are removed at the end"


def classify(url: str, photo: Any, *chosen: str) -> dict[str, Any]:
    """The answer of the page to its own request; the photo is a file to upload, or what is sent in its place."""
    if isinstance(photo, Path):
        files = {"files": (photo.name, photo.read_bytes(), "image/png")}
        (path,) = httpx.post(f"{url}gradio_api/upload", files=files).raise_for_status().json()
        photo = {"path": path, "orig_name": photo.name, "meta": {"_type": "gradio.FileData"}}
    sent = httpx.post(f"{url}gradio_api/call/classify", json={"data": [photo, *chosen]}).raise_for_status()
    answer = httpx.get(f"{url}gradio_api/call/classify/{sent.json()['event_id']}", timeout=60).text
    event, data = re.fullmatch(r"event: (\w+)\ndata: (.*)\n\n", answer).groups()
    names = ["message", "column", "heading", "label", "picture", "column 2", "heading 2", "label 2", "picture 2"]
    return dict(zip(names, json.loads(data), strict=True)) if event == "complete" else {"error": data}


def test_page_classifies_and_compares(page: tuple[str, Path], photo: Path) -> None:
    found = classify(page[0], photo, *NAMES, "Gradient")
    for name, number in zip(NAMES, ("", " 2"), strict=True):
        expected = Classifier(name)(photo).predictions
        labels = [(row["label"], row["confidence"]) for row in found[f"label{number}"]["confidences"]]
        assert labels == [(label, pytest.approx(probability)) for label, probability, _ in expected]
        shown, about, times = re.fullmatch(r"<h2>(.*)</h2><p>(.*)</p><p>(.*)</p>", found[f"heading{number}"]).groups()
        assert (shown, about) == (name, "10 classes of CIFAR-10, 32 x 32 pixels")
        assert re.fullmatch(r"\d+ ms to classify, \d+ ms for the heat map", times)
    served = [httpx.get(found[picture]["url"]) for picture in ("picture", "picture 2")]
    assert [response.headers["content-type"] for response in served] == ["image/webp"] * 2
    assert served[0].content != served[1].content
    alone = classify(page[0], photo, NAMES[1], ALONE, "None")
    assert alone["label"]["confidences"] == found["label 2"]["confidences"]
    assert alone["column 2"]["visible"] is False
    assert "heat map" not in alone["heading"]


def test_page_explains_bad_files_and_goes_on(page: tuple[str, Path], tmp_path: Path, photo: Path) -> None:
    (tmp_path / "<b>bad.png").write_bytes(b"no picture")
    Image.new("L", (1100, 1000)).save(tmp_path / "huge.png")
    for name, reason in (
        ("<b>bad.png", "bbad.png: not an image in a format Pillow knows"),
        ("huge.png", "huge.png: 1100x1000 pixels, more than 1 million; make it smaller"),
    ):
        found = classify(page[0], tmp_path / name, NAMES[0], ALONE, "Rollout")
        assert found["message"]["visible"]
        assert f'role="alert">{html.escape(reason)}' in found["message"]["value"].replace("&lt;b&gt;", "b")
        assert found["column"]["visible"] is False
    assert classify(page[0], photo, NAMES[0], ALONE, "Rollout")["message"]["visible"] is False
    assert classify(page[0], None, NAMES[0], ALONE, "Rollout")["message"]["value"].startswith("Drop a photograph")


def test_files_of_the_user_are_neither_read_nor_served(page: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = page
    private = photograph(tmp_path / "private.png")
    for path in (str(private), __file__, f"{url}config"):
        sent = {"path": path, "meta": {"_type": "gradio.FileData"}}
        assert "error" in classify(url, sent, NAMES[0], ALONE, "Rollout")
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)
    assert "private.png" not in [path.name for path in folder.rglob("*")]


def test_large_upload_is_refused(page: tuple[str, Path]) -> None:
    files = {"files": ("x.png", bytes(demo.MAX_UPLOAD_BYTES + 1), "image/png")}
    assert httpx.post(f"{page[0]}gradio_api/upload", files=files, timeout=60).status_code == 413


def test_page_is_served_to_this_computer_alone_and_names_no_other_host(page: tuple[str, Path]) -> None:
    url, _ = page
    port = int(url.split(":")[2].strip("/"))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    text = httpx.get(url).text
    assert {host for host in re.findall(r'(?:src|href)="https?://([^/"]+)', text)} == set()
    config = httpx.get(f"{url}config").json()
    assert config["analytics_enabled"] is False
    assert config["run_history"] is False


def test_ctrl_c_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    class App:
        closed = False

        def close(self, verbose: bool) -> None:
            self.closed = not verbose

    def interrupt(line: str) -> None:
        assert line == "the demo is at http://127.0.0.1:7860/ (Ctrl-C ends it)"
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "start", lambda _app, *, host, port: f"http://{host}:{port}/")
    app = App()
    demo.serve(app, announce=interrupt)
    assert app.closed


@pytest.mark.slow
def test_command_serves_until_ctrl_c(tmp_path: Path, photo: Path) -> None:
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    command = [sys.executable, "-W", "ignore", "-m", "deit_models", "demo", "--model", *NAMES, "--port", str(port)]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
        assert "label" in classify(f"http://127.0.0.1:{port}/", photo, NAMES[0], ALONE, "Last block")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "", "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [photo]


# The page, in a browser


@contextmanager
def visited(url: str, **options: Any) -> Iterator["Page"]:
    """The page in a headless browser; at the end, nothing may have been asked of another host."""
    asked: list[str] = []
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": options.pop("width", 1280), "height": 900}, **options)
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(url)
        tab.get_by_text("Drop a photograph on the field").wait_for()
        yield tab
        assert {urlsplit(one).hostname for one in asked if one.startswith(("http", "ws"))} == {"127.0.0.1"}


def upload(tab: "Page", path: Path, expected: str) -> None:
    """Upload a file, and wait for a text."""
    tab.locator("input[type=file]").set_input_files(path)
    tab.get_by_text(expected).first.wait_for()


def looks_right(tab: "Page") -> None:
    tab.wait_for_timeout(700)  # until nothing moves or fades any more
    assert accessibility_faults(tab) == []
    assert overflowing(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def picture_of(tab: "Page", number: int = 0) -> str:
    return tab.get_by_alt_text("The part of the photograph").nth(number).get_attribute("src")


@pytest.mark.slow
def test_browser_shows_bars_and_a_heat_map_and_compares(page: tuple[str, Path], photo: Path) -> None:
    first, second = (Classifier(name)(photo).predictions[0] for name in NAMES)
    with visited(page[0]) as tab:
        upload(tab, photo, "ms for the heat map")
        assert tab.get_by_test_id("label-output-value").all_inner_texts() == [first.label]
        looks_right(tab)
        gradient = picture_of(tab)
        tab.get_by_label("Rollout").check()
        tab.wait_for_function(f"!document.querySelector('img[src={json.dumps(gradient)}]')")
        tab.get_by_label("Compare with").click()
        tab.get_by_role("option", name=NAMES[1]).click()
        tab.get_by_role("heading", name=NAMES[1]).wait_for()
        tab.get_by_alt_text("The part of the photograph").nth(1).wait_for()
        assert tab.get_by_test_id("label-output-value").all_inner_texts() == [first.label, second.label]
        assert picture_of(tab) != picture_of(tab, 1)
        looks_right(tab)
        tab.get_by_label("Remove Image").click()
        tab.get_by_text("Drop a photograph on the field").wait_for()


@pytest.mark.slow
def test_browser_explains_a_bad_file_and_goes_on(page: tuple[str, Path], photo: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    with visited(page[0]) as tab:
        upload(tab, bad, "bad.jpg: not an image in a format Pillow knows")
        assert tab.get_by_role("alert").evaluate("alert => getComputedStyle(alert).color") == "rgb(127, 29, 29)"
        looks_right(tab)
        tab.get_by_label("Remove Image").click()
        tab.get_by_text("Drop a photograph on the field").wait_for()
        upload(tab, photo, "ms for the heat map")
        assert tab.get_by_role("alert").count() == 0
        tab.get_by_label("Remove Image").click()
        bad.with_suffix(".txt").write_text("no picture")
        upload(tab, bad.with_suffix(".txt"), "Invalid file type")


@pytest.mark.slow
def test_page_fits_a_phone_and_a_dark_room(page: tuple[str, Path], photo: Path) -> None:
    with visited(page[0], width=390, color_scheme="dark", has_touch=True) as tab:
        looks_right(tab)
        upload(tab, photo, "ms for the heat map")
        looks_right(tab)
