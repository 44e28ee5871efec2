"""A registered model "toy" and a manifest that lists it, in force for one test."""

import sys
from collections.abc import Mapping

import pytest

import deit_models
from deit_models.checkpoint import ModelInfo, load_manifest, parse_manifest
from deit_models.models.deit import DeiT
from deit_models.models.layers import ImageClassifier

HEAD = """\
# Toys, one table each.
schema = 1

"""
TABLE = """\
[model.{name}]  # small enough for a test
family = "deit"
params = 1
macs = 1
input_size = 32
num_classes = 10
eval = {{ resize = 36, crop = [32, 32] }}
"""


def toy_table(*sources: str, name: str = "toy", facts: str = "") -> str:
    """The text of a model's tables; `sources` are the lines of each."""
    tables = "".join(f"\n[[model.{name}.source]]\n{source}\n" for source in sources)
    return TABLE.format(name=name) + facts + tables


def register_toys(model: ImageClassifier, *names: str) -> None:
    """Needs the fixture `own_registry`."""
    for name in names or ("toy",):
        deit_models.register_model(name, DeiT, model.config)


def put_in_force(text: str, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, ModelInfo]:
    """Have the whole package read this manifest on top of the installed one."""
    return put_checkpoints_in_force(parse_manifest(text), monkeypatch)


def put_checkpoints_in_force(
    checkpoints: Mapping[str, ModelInfo], monkeypatch: pytest.MonkeyPatch
) -> Mapping[str, ModelInfo]:
    """The same for checkpoints made in the test."""
    table = {**load_manifest(), **checkpoints}
    for name, module in list(sys.modules.items()):
        if name.startswith("deit_models") and hasattr(module, "load_manifest"):
            monkeypatch.setattr(module, "load_manifest", lambda: table)
    return table
