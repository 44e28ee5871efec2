"""Curves as a picture: it is written, it shows every run, and a missing extra says what to install."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from deit_models.errors import MissingExtraError
from deit_models.training.state import plot_curves

ROWS = [{"epoch": 0, "loss": 2.0, "top1": 30.0}, {"epoch": 1, "loss": 1.5}, {"epoch": 2, "loss": 1.2, "top1": 50.0}]


def ink(path: Path) -> int:
    """Pixels that are neither white nor grey."""
    with Image.open(path) as image:
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
