"""One network of the space, alone: the shared weights cut down to a candidate's."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ..hub.weights import meta_model
from ..models.vit_resnas import ViTResNAS
from .space import Candidate, SearchSpace


def extract(largest: ViTResNAS, space: SearchSpace, candidate: Candidate) -> ViTResNAS:
    """A candidate as a network of its own, in eval mode, with copies of the weights it shares.

    A tensor's leading corner is what a smaller network shares of it; q, k and v have a corner each.

    Args:
        largest: the space's largest network, see `SearchSpace.largest`.
        space: the space.
        candidate: the choice.
    """
    config, shared = largest.config, largest.state_dict()
    common = {
        name: getattr(config, name)
        for name in ("img_size", "in_chans", "num_classes", "distilled", "patch_head", "drop_rate", "drop_path_rate")
    }
    network = meta_model(ViTResNAS, space.config_of(candidate, **common))
    sources = _source_names(candidate)
    state = {}
    for name, wanted in network.state_dict().items():
        number, _, rest = name.removeprefix("blocks.").partition(".")
        source = f"blocks.{sources[int(number)]}.{rest}" if name.startswith("blocks.") else name
        state[name] = _corner(shared[source], wanted, fused=3 if ".qkv." in name else 1)
    network.load_state_dict(state, assign=True)
    return cast(ViTResNAS, network.eval())


def _source_names(candidate: Candidate) -> list[int]:
    """Which entry of the largest network's `blocks` each entry of the candidate's comes from."""
    numbers, number = [], 0
    for place, stage in enumerate(candidate.stages):
        if place:  # the reduction in front of the stage
            numbers.append(number)
            number += 1
        for block in stage.blocks:
            if block.kept:
                numbers.append(number)
            number += 1
    return numbers


def _corner(tensor: Tensor, wanted: Tensor, *, fused: int) -> Tensor:
    """The leading part of a tensor, or of each of the `fused` tensors that are stacked in it, as a copy."""
    if wanted.ndim == 0:
        return tensor.clone()
    parts = tensor.reshape(fused, -1, *tensor.shape[1:])
    shape = (fused, wanted.shape[0] // fused, *wanted.shape[1:])
    return parts[tuple(slice(size) for size in shape)].reshape(wanted.shape).clone()
