"""The super-network: the largest network of a space, trained so that every network inside it works too.

In training each batch is divided between several candidates, drawn anew, whose missing channels are masked; all of them
share one forward and one backward pass (multi-architectural sampling). A small network keeps the front of each tensor,
so channels are sorted by importance. In eval mode it is the largest network; `extract` cuts any candidate out of it.
Source: section 4 of the ViT-ResNAS paper; details as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import Layout
from ..errors import ConfigError, shown
from ..models.layers import HeadLogits, ImageClassifier
from ..models.transformer import Attention, Block, Mlp, attention
from ..models.vit_resnas import PatchLogits, PatchTraining, SpatialReduction, ViTResNAS
from ..registry import meta_model
from .settings import Sampling
from .space import BlockChoice, Candidate, SearchSpace, StageChoice


@torch.no_grad()
def reorder_channels(blocks: Iterable[nn.Module]) -> None:
    """Sort the hidden units and the heads of every block by importance, in place; the network computes the same.

    Importance is the sum of the magnitudes of all weights and biases of a unit or head. Stage widths are not sorted.
    Source: the paper's channel re-ordering, as in the authors' code.
    """
    for block in blocks:
        if isinstance(block, Block):
            _reorder_hidden(block.mlp)
            _reorder_heads(block.attn)


def _reorder_hidden(mlp: Mlp) -> None:
    weight = mlp.fc1.weight.abs().sum(1) + mlp.fc1.bias.abs() + mlp.fc2.weight.abs().sum(0)
    order = weight.argsort(descending=True, stable=True)
    for tensor in (mlp.fc1.weight, mlp.fc1.bias):
        tensor.copy_(tensor[order])
    mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])


def _reorder_heads(attention: Attention) -> None:
    heads, out = attention.num_heads, attention.proj.weight
    by_head = [_by_head(tensor, heads) for tensor in (attention.qkv.weight, attention.qkv.bias) if tensor is not None]
    columns = out.view(len(out), heads, -1)
    weight = sum((part.abs().sum((0, *range(2, part.ndim))) for part in by_head), columns.abs().sum((0, 2)))
    order = torch.as_tensor(weight).argsort(descending=True, stable=True)
    for part in by_head:
        part.copy_(part[:, order])
    columns.copy_(columns[:, order])


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q, k and v as (3, heads, head_dim, ...), a view."""
    return tensor.view(3, heads, -1, *tensor.shape[1:])


class SuperNetwork(ImageClassifier):
    """See the module docstring. `net` is the largest network of `space`."""

    family: ClassVar[str] = ViTResNAS.family
    head_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, net: ViTResNAS, space: SearchSpace, sampling: Sampling) -> None:
        """Wrap a network. Raises: ConfigError: it is not the space's largest."""
        super().__init__(net.config)
        wanted = space.config_of(space.largest()).stages
        if net.config.stages != wanted:
            raise ConfigError(
                f"a super-network of stages {shown(net.config.stages)}; the space's largest has {shown(wanted)}"
            )
        self.net, self.space, self.sampling = net, space, sampling
        self.origin = net.origin
        self.epoch = sampling.warmup_epochs

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for an epoch (from 0), in place: the choices that may be drawn, and the order of channels."""
        self.epoch = epoch
        if epoch <= self.sampling.warmup_epochs:
            reorder_channels(self.net.blocks)

    def draw(self, count: int) -> list[Candidate]:
        """Candidates for one batch, from torch's global generator.

        The enabled choices of each item (a width, a block's heads, its MLP, its presence) are dealt out evenly.
        """
        stages = []
        for choices in self.space.stages:
            widths = self._deal(choices.embed_dim, count)
            places = []
            for place in range(choices.depth):
                # as in the paper, a removable block is left out half of the time, and that choice is the last to join
                presence = (True, True, False, False) if place in choices.removable else (True,)
                heads, hidden = self._deal(choices.num_heads, count), self._deal(choices.mlp_hidden, count)
                kept = map(bool, self._deal(presence, count))
                places.append([BlockChoice(*chosen) for chosen in zip(heads, hidden, kept, strict=True)])
            blocks = zip(*places, strict=True)
            stages.append([StageChoice(*chosen) for chosen in zip(widths, blocks, strict=True)])
        return [Candidate(chosen) for chosen in zip(*stages, strict=True)]

    def _deal(self, choices: Sequence[int], count: int) -> list[int]:
        enabled = self.sampling.enabled(len(choices), self.epoch)
        rounds = -(-count // enabled)
        order = torch.randperm(enabled * rounds)[:count].tolist()
        return [choices[i % enabled] for i in order]

    def forward_heads(self, x: Tensor) -> HeadLogits:
        """The heads of `forward_training` that other models have too."""
        if not self.training:
            return self.net.forward_heads(x)
        # not through forward_training: torch.compile breaks its graph at the draw, which must not be two calls down
        return HeadLogits(*self._forward_kept(x, self._draw_kept(len(x), x.device))[:2])

    def forward_training(self, x: Tensor) -> PatchLogits:
        """Logits of the heads: in training of candidates drawn for this batch, in eval mode of the largest network."""
        if not self.training:
            return self.net.forward_training(x)
        return self._forward_kept(x, self._draw_kept(len(x), x.device))

    def extra_heads(self, *, mix_mode: str, mixup: float, cutmix: float) -> PatchTraining | None:
        """Mixing and loss for the patch head, as for the network inside."""
        return self.net.extra_heads(mix_mode=mix_mode, mixup=mixup, cutmix=cutmix)

    # the draw must be no part of a compiled graph
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
    def _draw_kept(self, images: int, device: torch.device) -> Tensor:
        """`_kept_of` the candidates for so many images, on the device, without waiting for it."""
        kept = _kept_of(self.space, self.draw(max(images // self.sampling.images, 1)))
        return kept.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else kept.to(device)

    def forward_masked(self, x: Tensor, candidates: Sequence[Candidate]) -> PatchLogits:
        """Logits of the heads, image i through candidate i modulo their number; x is (B, C, H, W)."""
        return self._forward_kept(x, _kept_of(self.space, candidates).to(x.device))

    def _forward_kept(self, x: Tensor, kept: Tensor) -> PatchLogits:
        """`forward_masked` for the result of `_kept_of`; the operators are the same for all candidates."""
        owner = torch.arange(len(x), device=x.device) % len(kept)
        counts, layers = iter(kept[owner].unbind(1)), iter(self.net.blocks)
        tokens, width = self.net.forward_tokens(x), None
        for number, choices in enumerate(self.space.stages):
            before, width = width, _channels(next(counts), choices.embed_dim)
            if number:
                tokens = _reduce(cast(SpatialReduction, next(layers)), tokens, before)
            tokens = _masked(tokens, width)
            for place in range(choices.depth):
                masks = (
                    width,
                    _channels(next(counts), [choices.head_dim * heads for heads in choices.num_heads]),
                    _channels(next(counts), choices.mlp_hidden),
                    _channels(next(counts), (1, 0) if place in choices.removable else (1,)),
                )
                tokens = _run_block(cast(Block, next(layers)), tokens, masks)
        return self.net.all_logits(_normed(self.net.norm, tokens, width))

    def set_drop_rates(self, **rates: float) -> None:
        """Change dropout and stochastic depth of the network inside."""
        self.net.set_drop_rates(**rates)
        self.config = self.net.config

    def no_weight_decay(self) -> set[str]:
        """Names of the network inside."""
        return {f"net.{name}" for name in self.net.no_weight_decay()}

    def save_pretrained(self, save_directory: str | PathLike[str], *, layout: Layout = "native") -> None:
        """Write the largest network; every other one can be cut out of it."""
        self.net.origin = self.origin
        self.net.save_pretrained(save_directory, layout=layout)


def _kept_of(space: SearchSpace, candidates: Sequence[Candidate]) -> Tensor:
    """Kept size of each item, (candidates, items) int64.

    Of each stage its width, then of each place the heads' channels, the hidden units, and 1 or 0 for the block.
    """
    rows = []
    for candidate in candidates:
        row = []
        for choices, stage in zip(space.stages, candidate.stages, strict=True):
            row.append(stage.embed_dim)
            for block in stage.blocks:
                row += [choices.head_dim * block.num_heads, block.mlp_hidden, int(block.kept)]
        rows.append(row)
    return torch.tensor(rows)


def _channels(kept: Tensor, choices: Sequence[int]) -> Tensor | None:
    """Mask of an item's channels for each image: (B,) int64 -> (B, 1, the largest choice) of ones and zeros.

    None where there is no choice, so that all channels are kept.
    """
    if len(choices) == 1:
        return None
    return (torch.arange(choices[0], device=kept.device) < kept[:, None]).float().unsqueeze(1)


def _masked(x: Tensor, *masks: Tensor | None) -> Tensor:
    for mask in masks:
        x = x if mask is None else x * mask
    return x


def _normed(norm: nn.LayerNorm, x: Tensor, width: Tensor | None) -> Tensor:
    """LayerNorm over the kept channels only; the others are zero in x and stay zero."""
    if width is None:
        return norm(x)
    count = width.sum(-1, keepdim=True)
    x = x.float()
    centred = (x - x.sum(-1, keepdim=True) / count) * width
    variance = centred.square().sum(-1, keepdim=True) / count
    return (centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias) * width


def _reduce(layer: SpatialReduction, x: Tensor, width: Tensor | None) -> Tensor:
    return layer.reduced(_normed(layer.norm, x, width)) + layer.shortcut(x)


def _run_block(block: Block, x: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """A block without its masked channels, (B, N, D) -> (B, N, D).

    The masks of tokens, heads and hidden units are (B, 1, channels), that of the whole block (B, 1, 1).
    """
    (width, heads, units, kept), attn, mlp = masks, block.attn, block.mlp
    mixed = attention(*attn.heads(_normed(block.norm1, x, width))).transpose(1, 2).flatten(2)
    x = x + block.drop_path(_masked(attn.proj_drop(attn.proj(_masked(mixed, heads))), width, kept))
    hidden = _masked(mlp.drop(F.gelu(mlp.fc1(_normed(block.norm2, x, width)))), units)
    return x + block.drop_path(_masked(mlp.drop(mlp.fc2(hidden)), width, kept))


def extract(largest: ViTResNAS, space: SearchSpace, candidate: Candidate) -> ViTResNAS:
    """A candidate as a network of its own, in eval mode, with copies of the weights it shares.

    A smaller network shares the leading corner of each tensor; q, k and v have a corner each.

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
    return network.eval()


def _source_names(candidate: Candidate) -> list[int]:
    """For each entry of the candidate's `blocks` the number of the entry in the largest network's."""
    kept: list[bool] = []
    for stage in candidate.stages:
        reduction = [True] if kept else []  # in front of every stage but the first
        kept += [*reduction, *(block.kept for block in stage.blocks)]
    return [number for number, stays in enumerate(kept) if stays]


def _corner(tensor: Tensor, wanted: Tensor, *, fused: int) -> Tensor:
    """The leading part of a tensor, or of each of the `fused` tensors that are stacked in it, as a copy."""
    if wanted.ndim == 0:
        return tensor.clone()
    parts = tensor.reshape(fused, -1, *tensor.shape[1:])
    shape = (fused, wanted.shape[0] // fused, *wanted.shape[1:])
    return parts[tuple(slice(size) for size in shape)].reshape(wanted.shape).clone()
