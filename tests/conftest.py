"""Fixtures that several test files need."""

import pytest
import torch

from deit_models import registry
from deit_models.hub.manifest import load_manifest

# Models in tests are small, and two threads that share their cores with other work wait for each other: one is faster.
torch.set_num_threads(1)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test registers is forgotten after it."""
    for name in load_manifest():
        registry.model_spec(name)  # a family registers once, on import: it must not land in the copy alone
    monkeypatch.setattr(registry, "_specs", dict(registry._specs))
