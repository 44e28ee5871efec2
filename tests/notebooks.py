"""Notebooks that are kept with their outputs: run them again, and compare what comes out with what is stored.

Text must be equal but for paths of temporary folders, speeds and times; decimal numbers may differ by a tenth, since
other machines round differently and training amplifies it. Pictures must be there, of the same kind and size.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NAMES = tuple(sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
MOST_BYTES = 500_000

_MEASURED = re.compile(r" *\d[\d,.]*(?= ?(?:images/s|s|ms|seconds)\b)")
_TEMPORARY = re.compile(r"(?:/[\w.-]+)*/tmp[\w.-]*")
_NUMBER = re.compile(r"-?\d[\d,]*\.\d+")
_NEAR = {"rel_tol": 0.1, "abs_tol": 0.05}
_PICTURES = ("image/png", "image/jpeg")
_SIZE = 0.05


class Shown(NamedTuple):
    """Outputs of a cell: its text, all of it in one, and kind and size of each picture."""

    text: str
    pictures: list[tuple[str, tuple[int, int]]]


def run_notebook(path: Path) -> Any:
    """Run a notebook as a user does, in its folder and without internet; gives it with new outputs.

    Raises: nbclient's CellExecutionError, with the traceback of the cell.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    # timing would differ at every run
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources, record_timing=False)
    # one thread: beside other tests it is faster, and everywhere it adds numbers up in the same order
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    client.execute(env=environment)
    return notebook


def write_notebook(notebook: Any, path: Path) -> None:
    """Keep a notebook with its outputs, without the facts of the machine that ran it."""
    import nbformat

    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


def shown(cell: Any) -> Shown:
    """What a reader sees below a cell of code."""
    text, pictures = [], []
    for output in cell["outputs"]:
        data = output.get("data", {})
        kind = next((kind for kind in _PICTURES if kind in data), None)
        if kind is not None:
            with PIL.Image.open(io.BytesIO(base64.b64decode("".join(data[kind])))) as picture:
                pictures.append((kind, picture.size))
        else:
            text.append("".join(output.get("text", data.get("text/plain", ""))))
    return Shown("".join(text), pictures)


def differences(stored: Any, found: Any) -> list[str]:
    """What is out of date in the outputs of a stored notebook, a line for each cell."""
    pairs = zip(code_cells(stored), code_cells(found), strict=True)
    return [f"cell {cell['id']}: {why}" for cell, again in pairs if (why := _difference(shown(cell), shown(again)))]


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _difference(stored: Shown, found: Shown) -> str:
    kinds, new = ([kind for kind, _ in each.pictures] for each in (stored, found))
    if kinds != new:
        return f"pictures {kinds} are stored, {new} come out"
    for (_, before), (_, after) in zip(stored.pictures, found.pictures, strict=True):
        if not all(math.isclose(a, b, rel_tol=_SIZE) for a, b in zip(before, after, strict=True)):
            return f"a picture of {before} pixels is stored, one of {after} comes out"
    if not _alike(stored.text, found.text):
        return f"stored is\n{stored.text}\nnow comes\n{found.text}"
    return ""


def _alike(stored: str, found: str) -> bool:
    (before, first), (after, second) = map(_taken_apart, (stored, found))
    return before == after and all(math.isclose(a, b, **_NEAR) for a, b in zip(first, second, strict=True))


def _taken_apart(text: str) -> tuple[list[str], list[float]]:
    """Text without what differs from run to run, and its decimal numbers."""
    text = _TEMPORARY.sub("FOLDER", _MEASURED.sub("SOME", text))
    numbers = [float(number.replace(",", "")) for number in _NUMBER.findall(text)]
    return _NUMBER.sub("NUMBER", text).split(), numbers
