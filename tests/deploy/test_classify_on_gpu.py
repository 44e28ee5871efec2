"""`Classifier` on a GPU, told by fake tensors and an imitated event: nothing waits, one read-back a batch."""

from collections import Counter

import pytest
import torch
from small_models import TINY, build
from synchronisations import Waits, put_on_fake_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

from deit_models import Classifier
from deit_models.data import loading as batches


@pytest.mark.parametrize("kind", TINY)
def test_launching_a_batch_waits_for_nothing_and_reads_back_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_event_after_all_work", lambda _: None)
    classifier, mode = Classifier(build(kind)), FakeTensorMode()
    put_on_fake_gpu(classifier.model, mode)
    with mode, Waits() as waits:
        (top,) = classifier._launch(torch.empty(4, 3, 64, 64, dtype=torch.uint8), 3)
    assert waits.found == Counter()
    assert waits.read_backs == 1
    assert (top.packed.device.type, tuple(top.packed.shape)) == ("cpu", (2, 4, 3))
