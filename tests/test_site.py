"""The documentation site: it builds without a warning, its reference is complete, its pages are accessible."""

import argparse
import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import accessibility_faults, chromium, overflowing

import deit_models
from deit_models.checkpoint import load_manifest
from deit_models.cli import build_parser
from deit_models.recipes.presets import PRESETS
from deit_models.recipes.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
FAULTS_OF_MATERIAL = {
    # Material's scroll boxes have no tabindex; Chromium and Firefox let the keyboard scroll them without one.
    "scrollable-region-focusable",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    for module in ("material", "mkdocstrings"):
        if find_spec(module) is None:
            pytest.skip(f"needs {module}, see the extra [docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def page(site: Path, address: str) -> str:
    return (site / address / "index.html").read_text(encoding="utf-8")


def first_cells(html: str) -> set[str]:
    """The text of the first cell of every row of all tables."""
    return {unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<tr>\s*<td[^>]*>(.*?)</td>", html)}


def test_reference_describes_every_public_name(site: Path) -> None:
    reference = "".join(file.read_text(encoding="utf-8") for file in site.glob("reference/*/index.html"))
    described = set(re.findall(r'id="deit_models\.(\w+)"', reference))
    assert set(deit_models.__all__) - {"__version__"} <= described


def test_docstrings_of_the_reference_are_read_as_they_are_meant(site: Path) -> None:
    loading = page(site, "reference/loading")
    assert loading.count("<code>img_size</code>") == 1
    for error in ("ConfigError", "SaveError", "MissingExtraError", "FetchError"):  # `push_to_hub` has one paragraph
        assert re.search(rf'Raises:.*title="{error}|Raises:.*>{error}<', loading, re.DOTALL), error
    assert "Raises: " not in loading


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from commands(command)


def test_every_command_is_shown_with_all_its_options(site: Path) -> None:
    html = page(site, "reference/command")
    sections = dict(re.findall(r'<h[1-3] id="([^"]*)">(.*?)(?=<h[1-3] id=|</article>)', html, re.DOTALL))
    for parser in commands(build_parser()):
        name = parser.prog.partition(" ")[2].replace(" ", "-") or "the-command-deit-models"
        shown = unescape(re.sub("<.*?>", "", sections[name]))
        for action in parser._actions:
            if action.dest != "help" and action.help != argparse.SUPPRESS:
                assert all(option in shown for option in action.option_strings), f"{name} {action.option_strings}"


def test_every_preset_and_field_of_a_recipe_is_shown(site: Path) -> None:
    assert {*PRESETS, *(field.name for field in fields(Recipe))} == first_cells(page(site, "reference/recipes"))


def test_every_model_is_shown_with_links_to_its_weights(site: Path) -> None:
    families = [path.stem for path in (ROOT / "docs" / "families").glob("*.md")]
    html = "".join(page(site, f"families/{family}") for family in families)
    assert set(load_manifest()) <= first_cells(html)
    links = set(re.findall(r'href="(https://[^"]*)"', html))
    for checkpoint in load_manifest().values():
        for source in checkpoint.sources:
            address = f"https://huggingface.co/{source.repo}" if source.repo else source.url
            assert source.file or address in links, checkpoint.name
    overview = page(site, "models")
    assert all(f'href="../families/{family}/"' in overview for family in families)


def test_documents_of_the_repository_are_pages(site: Path) -> None:
    for address in ("CHANGELOG", "CONTRIBUTING", "MODEL_CARD", "SECURITY", "weights", "benchmarks", "examples"):
        assert "<h1" in page(site, address)
    results = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert {path.parent.name for path in site.glob("benchmarks/results/*/index.html")} == results
    assert 'href="../SECURITY/"' in page(site, "loading")  # ../SECURITY.md in the repository


# In a browser


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site's address on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=site))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_pages_are_accessible_fit_and_ask_no_other_host(address: str, width: int, scheme: str) -> None:
    with chromium() as browser:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        tab = context.new_page()
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        for place in ("", "reference/loading/", "families/deit/"):
            tab.goto(address + place)
            tab.wait_for_load_state("networkidle")
            faults = [fault for fault in accessibility_faults(tab) if fault.partition(":")[0] not in FAULTS_OF_MATERIAL]
            assert faults == []
            assert overflowing(tab) == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert len(asked) > 3


def test_the_switch_to_dark_and_the_search_work(address: str) -> None:
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(120_000)  # a busy machine builds the index slowly
        tab.goto(address)
        ground = "getComputedStyle(document.body).backgroundColor"
        light = tab.evaluate(ground)
        tab.click("label[title=Dark]")
        assert tab.evaluate(ground) != light
        tab.goto(address)
        tab.wait_for_load_state("networkidle")
        assert tab.evaluate(ground) != light  # it is kept
        tab.click("input[name=query]")
        tab.keyboard.type("pillow-heif")
        tab.wait_for_selector(".md-search-result__link[href*='loading/']", state="attached")
