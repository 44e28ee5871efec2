"""examples/browser in headless Chromium, with a local copy of transformers.js: the classes of `Classifier`."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from browser import accessibility_faults, chromium, overflowing
from PIL import Image

import deit_models

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE, CAT = ROOT / "examples" / "browser", ROOT / "examples" / "cat.jpg"
MODEL = "deit_micro_distilled_patch4_32"
TOLERANCE = 0.02
"""Of a probability: the network resizes in floats and Pillow in bytes, to 32 pixels; JPEG decoders differ as well."""
PACKAGES = Path(os.environ.get("TRANSFORMERS_JS", ""), "node_modules")
needs_library = pytest.mark.skipif(
    not os.environ.get("TRANSFORMERS_JS") or not (PACKAGES / "@huggingface" / "transformers").is_dir(),
    reason="needs TRANSFORMERS_JS=the folder where @huggingface/transformers is installed",
)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as its README says: a model beside it, and a copy of the library."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"needs {library}, see the extra [export]")
    folder = tmp_path_factory.mktemp("browser") / "page"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("web", "library", "node_modules"))
    deit_models.export(deit_models.from_pretrained(MODEL), folder / "web", format="transformers.js")
    (folder / "library").mkdir()
    text = (folder / "README.md").read_text(encoding="utf-8")
    copied = re.findall(r"cp node_modules/(\S+) library", text)
    assert len(copied) == 2
    for pattern in copied:
        for file in PACKAGES.glob(pattern):
            shutil.copy(file, folder / "library")
    page = folder / "index.html"
    text = re.sub(r'"https://cdn[^"]*"', '"./library/transformers.min.js"', page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
    return folder


@contextmanager
def visited(folder: Path, **options: object) -> Iterator["Page"]:
    """The page of a folder in a headless browser; nothing may be asked of another host."""
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            with chromium() as browser:
                tab = browser.new_page(**{"viewport": {"width": 1100, "height": 760}, **options})
                tab.on("request", lambda request: asked.append(request.url))
                tab.goto(f"http://127.0.0.1:{server.server_port}/")
                yield tab
        finally:
            server.shutdown()
            thread.join()
    assert {urlsplit(url).hostname for url in asked if url.startswith("http")} == {"127.0.0.1"}


def found(tab: "Page", path: Path) -> dict[str, float]:
    """The classes that the page shows for a file, with their probabilities."""
    tab.locator("#photo").set_input_files(path)
    tab.locator("#status.result").wait_for()
    rows = [text.split("\n") for text in tab.locator("#classes li").all_inner_texts()]
    return {label: float(share.removesuffix(" %")) / 100 for label, share in rows}


def looks_right(tab: "Page") -> None:
    assert accessibility_faults(tab) == []
    assert overflowing(tab) == []


def test_page_and_readme_name_one_version_of_the_library() -> None:
    page, text = ((EXAMPLE / name).read_text(encoding="utf-8") for name in ("index.html", "README.md"))
    (address,) = re.findall(r"https://[^\"]+", page)
    (version,) = re.findall(r"^https://cdn\.jsdelivr\.net/npm/@huggingface/transformers@([\d.]+)/dist/", address)
    assert f"npm install --ignore-scripts --no-save @huggingface/transformers@{version}" in text
    assert "https://" not in (EXAMPLE / "classify.js").read_text(encoding="utf-8")


@needs_library
@pytest.mark.slow
def test_browser_gives_the_classes_and_probabilities_of_the_classifier(folder: Path, tmp_path: Path) -> None:
    classify = deit_models.Classifier(MODEL)
    with Image.open(CAT) as cat:
        small = cat.convert("RGB").resize((150, 100))
    exif, clear = Image.Exif(), small.convert("RGBA")
    exif[0x0112] = 8
    small.save(tmp_path / "turned.jpg", exif=exif, quality=95)  # browsers turn no PNG
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(tmp_path / "clear.png")
    with visited(folder) as tab:
        for path in (CAT, tmp_path / "turned.jpg", tmp_path / "clear.png"):
            shown, expected = found(tab, path), classify(path).predictions
            assert next(iter(shown)) == expected[0].label
            assert list(shown.values()) == pytest.approx([p.probability for p in expected], abs=TOLERANCE)
        assert tab.locator("#status").inner_text() == expected[0].label
        assert re.fullmatch(r"\d+ ms on this device, 150 x 100 pixels", tab.locator("#time").inner_text())
        looks_right(tab)
        small.resize((3000, 2000)).save(tmp_path / "large.png")
        found(tab, tmp_path / "large.png")
        assert tab.locator("#time").inner_text().endswith("2449 x 1633 pixels")


@needs_library
@pytest.mark.slow
def test_browser_explains_bad_files_and_goes_on(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    with visited(folder, viewport={"width": 390, "height": 844}, color_scheme="dark") as tab:
        found(tab, CAT)
        tab.locator("#photo").set_input_files(bad)
        tab.locator("#status.error").wait_for()
        assert tab.locator("#status").inner_text() == "bad.jpg: not an image that this browser can read"
        assert tab.locator("#classes li").count() == 0
        looks_right(tab)
        found(tab, CAT)
        looks_right(tab)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("missing", ["web/config.json", "library/transformers.min.js"])
def test_missing_parts_are_named_on_the_page(missing: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "page")
    (tmp_path / "page" / missing).unlink()
    with visited(tmp_path / "page") as tab:
        tab.locator("#status.error").wait_for()
        text = tab.locator("#status").inner_text()
        assert text.startswith("The model cannot be loaded from the folder web/: ")
        assert missing.rpartition("/")[2].removesuffix(".min.js") in text
