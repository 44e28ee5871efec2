"""Every block of Python in the documents runs: page by page, in order, on small models and a few images, offline.

A block that cannot run has a comment before it, `<!-- not run: reason -->`.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY
from PIL import Image
from test_docs import DOCS, ROOT
from tiny_models import published_files

import deit_models
from deit_models.models.layers import ImageClassifier

BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
WITH_PYTHON = [page for page, text in DOCS.items() if "```python" in text]

_OTHERS = r"(?:deit3|dino|cait|resmlp|levit|t2t_vit|vit_res)\w+"
SMALLER = {
    r'"(?:facebook|timm)/deit.tiny[^"]*"': '"out/"',
    rf'deit_models\.(?:from_pretrained|create_model)\("({_OTHERS})"': r'small("\1"',
    rf'finetune\("({_OTHERS})"': r'finetune(small("\1")',
    r"deit_(?:tiny|small)(_distilled)?_patch16_224\b": r"deit_micro\1_patch4_32",
    r"1, 3, 224, 224\b": "1, 3, 32, 32",
    r'load\("OWNER/deit-models", ': f'load({str(ROOT)!r}, source="local", model=',
    r"\bepochs=\d+": "epochs=1, warmup_epochs=0",
    r"(?m)(finetune\((?!.*mode=).*)\)$": r'\1, mode="head")',
    r"\bseed=1\)": "seed=1, population=4, generations=2, parents=2, mutants=1, crossovers=1)",
    r"\bsample=32\b": 'sample=2, backend="eager", precision="float32"',
    r"\bnum_classes=10\b": "num_classes=2",
    r"\btoken_merging=8\b": "token_merging=1",
    r'"tench"': '"cat"',
}
"""What a page says -> what runs here in its place: models that come with the package, and less work."""


def small(name: str, **options: Any) -> ImageClassifier:
    """A model of any family, small and with random weights, in the place of one that would be downloaded."""
    if name.startswith("vit_res"):  # whose stem shrinks 32 pixels to nothing
        return deit_models.create_model("vit_res_micro_patch4_32", **options).eval()
    shape = {**TINY[deit_models.model_info(name).family], "img_size": 32}
    return deit_models.create_model(name, **{**shape, **options}).eval()


@pytest.fixture
def prepared(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory of a reader of the guides: the files and folders that pages name, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'"(\w+\.jpg)"', DOCS[page]):
        shutil.copy(ROOT / "examples" / "cat.jpg", name)
    for folder, images in (("photos/train", 10), ("photos/val", 2), ("cifar10/train", 20), ("cifar10/test", 2)):
        for label, colour in (("cat", (200, 150, 90)), ("dog", (60, 60, 80))):
            for number in range(images):
                path = tmp_path / folder / label / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), colour).save(path)
    files = [path.relative_to("photos") for path in sorted(Path("photos").rglob("*.jpg"))]
    Path("trips.csv").write_text("file,species\n" + "".join(f"{path},{path.parent.name}\n" for path in files))
    Path("labels.csv").write_text("file,label\n" + "".join(f"photos/{path},{path.parent.name}\n" for path in files))
    model = deit_models.from_pretrained("deit_micro_patch4_32")
    torch.save(model.state_dict(), "deit_tiny.pth")
    Path("out").mkdir()
    for name, content in published_files(model).items():
        (Path("out") / name).write_bytes(content)


@pytest.mark.parametrize("page", WITH_PYTHON)
@pytest.mark.usefixtures("prepared")
def test_python_of_a_page_runs(page: str) -> None:
    text, names = DOCS[page], dict[str, object](small=small)
    for block in BLOCK.finditer(text):
        code = block["code"]
        for said, done in SMALLER.items():
            code = re.sub(said, done, code)
        line = text.count("\n", 0, block.start("code"))
        compiled = compile("\n" * line + code, page, "exec")  # so that a traceback has the page's line
        if not block["reason"]:
            exec(compiled, names)


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_every_block_of_python_is_found(page: str) -> None:
    assert len(BLOCK.findall(DOCS[page])) == DOCS[page].count("```python")
    assert DOCS[page].count("<!-- not run") == sum(bool(block["reason"]) for block in BLOCK.finditer(DOCS[page]))
