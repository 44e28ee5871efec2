"""A call of from_pretrained passes few modules, and builds the model once."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model
from tracing import calls_of, modules_run

from deit_models import create_model, from_pretrained
from deit_models.models.layers import ImageClassifier

NAME = "deit_micro_distilled_patch4_32"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(NAME).save_pretrained(tmp_path)
    return tmp_path


def test_loading_a_folder_runs_functions_of_few_modules(folder: Path) -> None:
    passed = modules_run(lambda: from_pretrained(folder))
    assert {"hub.load", "formats.layouts", "models.deit"} <= passed
    assert len(passed) <= 12, sorted(passed)


@pytest.mark.parametrize(
    "changes", [{}, {"num_classes": 3}, {"img_size": 48}, {"num_classes": 3, "img_size": (32, 64)}]
)
@pytest.mark.parametrize("layout", ["native", "timm", "transformers"])
def test_model_is_built_once(tmp_path: Path, layout: str, changes: dict[str, Any]) -> None:
    tiny_model(NAME).save_pretrained(tmp_path, layout=layout)
    assert calls_of(ImageClassifier.__init__, lambda: from_pretrained(tmp_path, **changes)) == 1


def test_bare_file_of_the_named_model_is_built_once(tmp_path: Path) -> None:
    create_model(NAME).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert calls_of(ImageClassifier.__init__, lambda: from_pretrained(tmp_path, model=NAME)) == 1
    assert calls_of(ImageClassifier.__init__, lambda: from_pretrained(tmp_path, model=NAME, num_classes=3)) == 1
