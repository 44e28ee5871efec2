"""Read a golden file, and make the weights and the input its figures were computed with."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from numpy.testing import assert_allclose
from torch import Tensor

from deit_models import create_model
from deit_models.models.layers import ImageClassifier

from .fill import fill, image


@cache
def read(name: str) -> dict[str, Any]:
    """The golden file of a registered model."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def weights(name: str) -> dict[str, Tensor]:
    """The filled state dict, under the authors' names and in their order."""
    entries = read(name)["state_dict"]
    return {e["name"]: torch.from_numpy(fill(e["name"], tuple(e["shape"]))) for e in entries if e["filled"]}


def inputs(size: int) -> Tensor:
    """The two images of noise, (2, 3, size, size)."""
    return torch.from_numpy(image(2, size))


def check_filling(name: str) -> None:
    """Weights and input are those the figures were computed with; if not, the model is not to blame."""
    recorded = read(name)
    check, values = recorded["weights_check"], torch.cat([w.flatten() for w in weights(name).values()])
    values = values.double()
    assert len(weights(name)) == check["entries"]
    assert values.numel() == check["values"]
    assert_allclose([values.sum(), values.square().sum()], [check["sum"], check["sum_of_squares"]], rtol=1e-6)

    check, x = recorded["input"]["check"], inputs(224)
    assert list(x.shape) == recorded["input"]["shape"]
    count = len(check["first"])
    assert_allclose(x.flatten()[:count], check["first"], rtol=1e-6)
    assert_allclose(x.flatten()[-count:], check["last"], rtol=1e-6)
    x = x.double()
    assert_allclose([x.sum(), x.square().sum()], [check["sum"], check["sum_of_squares"]], rtol=1e-6)


def filled(name: str) -> ImageClassifier:
    """The registered model with the filled weights, in eval mode."""
    check_filling(name)
    model = create_model(name)
    model.load_state_dict(weights(name))
    return model.eval()


@torch.inference_mode()
def check(model: ImageClassifier, name: str) -> None:
    """Names, shapes, order and number of a `filled` model's tensors, its logits and features are the authors'."""
    recorded = read(name)
    state = [(key, list(value.shape), str(value.dtype)) for key, value in model.state_dict().items()]
    assert state == [(e["name"], e["shape"], f"torch.{e['dtype']}") for e in recorded["state_dict"]]
    assert sum(p.numel() for p in model.parameters()) == recorded["num_params"]["total"]
    features = model.forward_features(inputs(224))
    assert_allclose(model.classify(features).cls, recorded["outputs"]["logits"], rtol=0, atol=1e-4)
    assert_allclose(model.pool(features)[0], recorded["outputs"]["features"], rtol=0, atol=1e-4)
