from __future__ import annotations

import pytest
from tiny_models import named, randomise
from tiny_models import tiny_model as make

from deit_models import create_model

MODELS = {
    "plain": lambda: randomise(create_model("deit_tiny_patch16_224")).eval(),
    "distilled": lambda: randomise(create_model("deit_tiny_distilled_patch16_224")).eval(),
    "small images": lambda: make("deit_micro_patch4_32"),
    "small images, distilled": lambda: make("deit_micro_distilled_patch4_32"),
    "not square": lambda: named(make("deit_tiny_patch16_224", num_classes=7, img_size=(96, 160))),
    "not square, distilled": lambda: named(
        make("deit_small_distilled_patch16_224", num_classes=7, img_size=(160, 96), mlp_ratio=3.0)
    ),
    "other size": lambda: named(make("deit_base_patch16_384", num_classes=7, img_size=128, qkv_bias=False)),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def tiny():
    return named(make(num_classes=7))
