"""A trained model and pictures, for the tests of every command."""

import signal
from dataclasses import replace

import pytest
import torch
from command_line import CLASSES, MODELS, NAMES, save_class_folders, save_pictures
from torch import nn

import deit_models
from deit_models.models.deit import DeiT, DeiTConfig


@pytest.fixture(autouse=True)
def _colours_by_the_stream(monkeypatch):
    """The environment of whoever runs the tests neither asks for colours nor forbids them."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder that `save_pretrained` wrote: a model of a few thousand parameters with class names."""
    torch.manual_seed(0)
    model = deit_models.create_model("deit_micro_distilled_patch4_32", depth=1, embed_dim=16, num_heads=2)
    nn.init.normal_(model.head.weight)
    model.origin = replace(model.origin, class_names=NAMES)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def ctrl_c():
    """Processes that are started heed SIGINT; in a shell's background they would inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return save_pictures(folder, 3)


@pytest.fixture
def data(tmp_path):
    """A folder with 12 images for training and 6 for validation, of three classes told apart by their colour."""
    save_class_folders(tmp_path / "data" / "train", CLASSES, 4)
    return save_class_folders(tmp_path / "data" / "val", CLASSES, 2).parent


@pytest.fixture
def atoms(request):
    """Registers the smallest models that train, MODELS."""
    request.getfixturevalue("own_registry")
    config = DeiTConfig(img_size=16, patch_size=8, num_classes=3, embed_dim=16, depth=1, num_heads=2)
    for name, distilled in zip(MODELS, (False, True), strict=True):
        deit_models.register_model(name, DeiT, config, distilled=distilled)
