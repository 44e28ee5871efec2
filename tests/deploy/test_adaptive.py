"""A model that optimises itself where that pays: when it does, what it says, and that results stay."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build, needs, normalised, pixels
from torch import Tensor

import deit_models
from deit_models import AgreementError
from deit_models.deploy.adaptive import AdaptiveClassifier
from deit_models.deploy.optimize import is_kept, optimize
from deit_models.models.layers import HeadLogits, ImageClassifier

BATCH = 4


class Clock:
    """A clock that moves by the seconds of each batch."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(ImageClassifier):
    """A model that takes some seconds a batch, by a clock; `offset` is added to its logits."""

    def __init__(self, model: ImageClassifier, clock: Clock, seconds: Iterator[float], offset: float = 0.0) -> None:
        super().__init__(model.config)
        self.model, self.origin = model, model.origin
        self.clock, self.seconds, self.offset, self.calls = clock, seconds, offset, 0

    def forward_heads(self, x: Tensor) -> HeadLogits:
        self.calls += 1
        self.clock.now += next(self.seconds)
        return HeadLogits(self.model(x) + self.offset, None)


class Run:
    """An adaptive model that was shown some batches of four: a second each, and afterwards `fast` seconds each."""

    def __init__(
        self,
        *,
        images: int,
        slow: float = 1.0,
        fast: float = 0.1,
        offset: float = 0.0,
        kept: bool = False,
        batches: int = 9,
    ) -> None:
        clock, self.made = Clock(), []
        self.model = Timed(build("one block"), clock, itertools.chain([9.0], itertools.repeat(slow)))
        self.fast = Timed(self.model.model, clock, itertools.chain([9.0, 9.0], itertools.repeat(fast)), offset)

        def make(model: ImageClassifier, **options: Any) -> ImageClassifier:
            assert model is self.model
            self.made.append(options)
            if fast < 0:
                raise AgreementError("no backend could compute this model")
            return self.fast

        self.adaptive = AdaptiveClassifier(
            self.model, images=images, clock=clock, make=make, kept=lambda *_, **__: kept
        )
        x = normalised(self.model, pixels(BATCH))
        with torch.inference_mode():
            logits = [self.adaptive(x) for _ in range(batches)]
            for found in logits:
                torch.testing.assert_close(found, self.model.model(x), atol=1e-4, rtol=0)


def test_many_images_are_worth_an_optimised_network_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(images=10_000)
    assert run.adaptive.network is run.fast
    (options,) = run.made
    assert (options["sample"], options["precision"]) == (BATCH, "float32")
    assert [record.getMessage() for record in caplog.records] == [
        "9984 images to come, about 2496 s at 4 images/s: optimising the network, about 35 s (--no-optimize: not)"
    ]


@pytest.mark.parametrize(("images", "kept", "pays"), [(500, False, False), (500, True, True), (16 + 50, True, False)])
def test_it_pays_where_the_images_to_come_take_longer_than_preparing(images: int, kept: bool, pays: bool) -> None:
    """At 4 images/s: 35 s to prepare, or 13 s if it is kept; a quarter of the time that is left is saved."""
    run = Run(images=images, kept=kept)
    assert len(run.made) == pays
    assert run.adaptive.network is (run.fast if pays else run.model)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"fast": 2.0}, "the optimised network is not faster here; going on with the model"),
        ({"offset": 1e-3}, "going on with the model: logits would change by 0.001"),
        ({"fast": -1.0}, "going on with the model: no backend could compute this model"),
    ],
)
def test_network_that_is_slower_or_wrong_or_fails_is_given_up(
    facts: dict[str, float], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(images=10_000, batches=20, **facts)
    assert run.adaptive.network is run.model
    assert len(run.made) == 1
    assert [record.getMessage() for record in caplog.records][1:] == [message]


def test_half_precision_goes_on_as_it_is() -> None:
    model = build("one block").to(torch.bfloat16)
    adaptive = AdaptiveClassifier(model, images=10**9, make=lambda *_, **__: pytest.fail("was optimised"))
    x = normalised(model, pixels(2)).to(torch.bfloat16)
    with torch.inference_mode():
        for _ in range(9):
            assert torch.equal(adaptive(x), model(x))


@pytest.mark.parametrize("backend", ["openvino", "eager"])
def test_real_network_gives_the_classifiers_results_in_order(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "openvino":
        needs("openvino")
    else:
        monkeypatch.setitem(sys.modules, "openvino", None)
    model, images = build("distilled"), list(pixels(40))
    plain = deit_models.Classifier(model, batch_size=4)(images)
    clock = itertools.count(0.0, 5.0)
    adaptive = AdaptiveClassifier(model, images=10**6, cache_dir=tmp_path, clock=lambda: next(clock))
    found = deit_models.Classifier(adaptive, batch_size=4)(images)
    assert adaptive.network is not model
    assert adaptive.network.choice.backend == backend
    for a, b in zip(plain, found, strict=True):
        assert [p.probability for p in a.predictions] == pytest.approx([p.probability for p in b.predictions], abs=1e-4)


def test_kept_network_is_found_without_building_it(tmp_path: Path) -> None:
    needs("openvino")
    model, options = build("one block"), {"sample": 4, "precision": "float32", "backend": "openvino"}
    assert not is_kept(model, cache_dir=tmp_path, **options)
    optimize(model, cache_dir=tmp_path, **options)
    assert is_kept(model, cache_dir=tmp_path, **options)
    assert not is_kept(build("distilled"), cache_dir=tmp_path, **options)
