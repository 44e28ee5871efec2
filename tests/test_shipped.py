"""The checkpoints in weights/ are what the manifest says: digest, labels, accuracy on the test images."""

import pytest
import torch
from cifar10 import first_images, needs_cifar10

import deit_models
from deit_models.checkpoint import load_manifest, weights_dir
from deit_models.registry import DEFAULT_MODEL
from deit_models.scoring.embeddings import knn_accuracy

SHIPPED = [c.name for c in load_manifest().values() if any(source.file for source in c.sources)]
MAX_BYTES = 12_000_000


def test_something_is_shipped() -> None:
    assert "deit_micro_patch4_32" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_is_small_and_loads_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    info = deit_models.model_info(name)
    source = info.sources[0]
    assert (weights_dir() / source.file).stat().st_size <= MAX_BYTES
    assert len(source.sha256) == 64  # so that every load compares it
    model = deit_models.from_pretrained(name, local_files_only=True)
    assert model.origin.sha256 == source.sha256
    assert len(model.origin.class_names) == model.num_classes == info.num_classes
    assert not model.training


def test_every_weights_file_is_in_the_manifest() -> None:
    listed = {source.file for c in load_manifest().values() for source in c.sources if source.file}
    assert {path.name for path in weights_dir().glob("*.safetensors")} == listed


def accuracy(name: str, per_class: int) -> float:
    """Top-1 in percent over the first test images of each class."""
    model = deit_models.from_pretrained(name)
    images, targets = first_images(model, "test", per_class)
    with torch.inference_mode():
        found = torch.cat([model(batch).argmax(1) for batch in images.split(500)])
    return 100 * float((found == targets).float().mean())


@needs_cifar10
@pytest.mark.parametrize("name", SHIPPED)
def test_accuracy_on_some_test_images_is_near_the_recorded_one(name: str) -> None:
    recorded = deit_models.model_info(name).top1
    assert accuracy(name, 50) == pytest.approx(recorded, abs=6)  # 500 images: a standard error of about 2 points


@needs_cifar10
@torch.inference_mode()
def test_features_are_about_as_good_as_the_head_by_their_nearest_neighbours() -> None:
    model = deit_models.from_pretrained(DEFAULT_MODEL)
    images, targets = first_images(model, "test", 60)  # of each image, all others are asked
    found = knn_accuracy(torch.cat([model.embed(x) for x in images.split(300)]), targets)
    assert found == pytest.approx(deit_models.model_info(DEFAULT_MODEL).top1, abs=6)


@pytest.mark.slow
@needs_cifar10
@pytest.mark.parametrize("name", SHIPPED)
def test_accuracy_on_all_test_images_is_the_recorded_one(name: str) -> None:
    assert accuracy(name, 1000) == pytest.approx(deit_models.model_info(name).top1, abs=0.05)
