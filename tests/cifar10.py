"""The JPEG copy of CIFAR-10 that may stand beside a checkout."""

import io
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import deit_models
from deit_models.models.layers import ImageClassifier

ARCHIVE = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10_jpeg.tar.gz"
needs_cifar10 = pytest.mark.skipif(not ARCHIVE.exists(), reason="needs the JPEG copy of CIFAR-10 in ../shared/data")


def first_images(model: ImageClassifier, split: str, per_class: int) -> tuple[Tensor, Tensor]:
    """The first images of each class through the model's own transform, and their labels."""
    transform, labels = deit_models.transform_for(model), model.origin.class_names
    seen: dict[str, int] = defaultdict(int)
    images, targets = [], []
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if not member.isfile() or split not in parts or seen[parts[-2]] >= per_class:
                continue
            seen[parts[-2]] += 1
            images.append(transform(Image.open(io.BytesIO(archive.extractfile(member).read()))))
            targets.append(labels.index(parts[-2]))
    assert dict(seen) == dict.fromkeys(labels, per_class)
    return torch.stack(images), torch.tensor(targets)
