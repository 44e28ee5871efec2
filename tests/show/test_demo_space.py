"""examples/space: its settings can be read, and its program builds the page offline."""

import asyncio
import configparser
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "examples" / "space"


def extra(name: str) -> dict[str, Requirement]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = parser["options.extras_require"][name].split()
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def test_settings_fit_the_package() -> None:
    settings = SpaceCard.load(SPACE / "README.md").data
    assert settings.sdk == "gradio"
    assert extra("demo")["gradio"].specifier.contains(settings.sdk_version)
    assert (SPACE / settings.app_file).is_file()
    assert settings.license == "apache-2.0"
    assert len(settings.short_description) <= 60, "the Hub takes no more"
    (needed,) = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("-")]
    assert Requirement(needed).name == "deit-models"


def test_program_builds_the_page_with_weights_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    gradio = pytest.importorskip("gradio", reason="needs gradio, see the extra [demo]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    async def run() -> dict[str, Any]:
        return runpy.run_path(str(SPACE / "app.py"))

    app = asyncio.run(run())["app"]  # in a loop, or gradio leaves one open
    assert isinstance(app, gradio.Blocks)
    assert app.analytics_enabled is False
    choices = [block.choices for block in app.blocks.values() if isinstance(block, gradio.Dropdown)]
    assert ("deit_micro_patch4_32", "deit_micro_patch4_32") in choices[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has 127.0.0.2 without more ado")
def test_program_serves_the_page_where_a_space_says(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs gradio, see the extra [demo]")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "GRADIO_SERVER_NAME": "127.0.0.2"}
    environment |= {"GRADIO_TEMP_DIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", SPACE / "app.py"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        try:
            assert url == "http://127.0.0.2:7860/"
            assert "deit-models" in httpx.get(url).text
        finally:
            process.terminate()
