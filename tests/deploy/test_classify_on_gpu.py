"""`Classifier` on a GPU, told by fake tensors and an imitated event: nothing waits, one read-back a batch."""

import pytest
import torch
from fake_gpu import GPU, fake_gpu
from small_models import TINY, build

from deit_models import Classifier, predict


@pytest.mark.parametrize("kind", TINY)
def test_launching_a_batch_waits_for_nothing_and_reads_back_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "_event_after_all_work", lambda _: None)
    classifier = Classifier(build(kind))
    with fake_gpu(monkeypatch) as gpu:
        classifier.model.to(GPU)
        gpu.waits.clear()
        (top,) = classifier._launch(torch.empty(4, 3, 64, 64, dtype=torch.uint8), 3)
    assert (gpu.waits, gpu.read_backs) == ([], 1)
    assert (top.packed.device.type, tuple(top.packed.shape)) == ("cpu", (2, 4, 3))
