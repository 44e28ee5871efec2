"""From a model in training to a folder anyone can load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..hub.fetch import atomic_write
from ..models.layers import ImageClassifier
from .distributed import Process
from .records import ImageRecords

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
MODEL_FOLDERS = ("model", "best", "ema")
"""Where a run puts its last weights, those of its best epoch, and the averaged ones."""


def export_model(
    model: nn.Module,
    folder: Path,
    process: Process,
    *,
    divided: bool,
    records: ImageRecords,
    accuracy: Mapping[str, float | None],
) -> None:
    """Write a model in training into `folder`; called by every process, written by the first.

    Our models become what `from_pretrained` reads, with the class names, the data's name and the accuracy; of any other
    module the state dict is written, as `model.safetensors`.

    Args:
        model: on any device.
        folder: made if need be.
        process: this one.
        divided: whether each process holds but a part of the parameters.
        records: the training set.
        accuracy: `top1` and `top5` of these weights in percent, where they are known.

    Raises: FetchError: no space or no permission.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = dict(get_model_state_dict(model, options=options)) if divided else model.state_dict()
    if process.is_main:
        if isinstance(model, ImageClassifier) and model.origin is not None:
            known = {name: accuracy.get(name) for name in ("top1", "top5")}
            model.origin = model.origin.trained(records.name, class_names=records.classes, **known)
            # the card of an earlier epoch, which save_pretrained would keep, tells that one's accuracy
            (folder / CARD_NAME).unlink(missing_ok=True)
            (_rebuilt(model, state) if divided else model).save_pretrained(folder)
        else:
            with atomic_write(folder / WEIGHTS_NAME) as temporary:
                # copies, because safetensors refuses weights that two layers share
                save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, temporary)
    process.wait_for_all()


def _rebuilt(model: ImageClassifier, state: dict[str, Any]) -> ImageClassifier:
    """An undivided copy of a model whose parameters are spread over processes."""
    whole = type(model)(model.config)
    whole.load_state_dict(state)
    whole.origin = model.origin
    return whole
