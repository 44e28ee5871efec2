"""Cost of a candidate: multiply-accumulates in closed form, or milliseconds measured on this machine."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ..distributed import Process
from ..errors import ConfigError
from ..files import append_text, write_text
from ..models.vit_resnas import ViTResNAS, ViTResNASConfig
from ..training.state import read_log
from .space import Candidate, SearchSpace


class Ledger(dict[str, float]):
    """Numbers by key, kept in a file of JSON lines; an interrupted search finds there the numbers it had.

    Each line is written as soon as it is known. A line that a killed process left unfinished is dropped.

    Args:
        path: the file; made with the first number.
        name: of the number in each line.
        writes: whether this process writes; the others of a search keep the same numbers in memory.

    Raises: SaveError: no space or no permission. TrainingError: the file is damaged.
    """

    def __init__(self, path: Path, name: str, *, writes: bool = True) -> None:
        super().__init__({row["key"]: row[name] for row in read_log(path, {"key": str, name: Real})})
        self._path, self._name, self._writes = path, name, writes
        if writes and path.exists():
            write_text(path, "".join(map(self._line, self)))

    def add(self, key: str, number: float) -> None:
        """Keep a number. Raises: SaveError: no space or no permission."""
        self[key] = number
        if self._writes:
            append_text(self._path, self._line(key))

    def _line(self, key: str) -> str:
        return json.dumps({"key": key, self._name: self[key]}) + "\n"


CostKind = Literal["macs", "latency"]
LATENCY_NAME = "latency.jsonl"


class Cost(Protocol):
    """A number for each candidate, which a search keeps below a limit; `unit` is printed behind it in tables."""

    unit: str

    def __call__(self, candidate: Candidate) -> float:
        """The candidate's cost."""
        ...


class Macs:
    """Multiply-accumulates for one image, counted from the architecture."""

    unit = "MACs"

    def __init__(self, space: SearchSpace, num_classes: int) -> None:
        self.space, self.num_classes = space, num_classes

    def __call__(self, candidate: Candidate) -> float:
        """Exact, see `closed_form_macs`."""
        return closed_form_macs(self.space.config_of(candidate, num_classes=self.num_classes))


def closed_form_macs(config: ViTResNASConfig) -> int:
    """Multiply-accumulates of a ViT-ResNAS for one image, without building it: a search asks for thousands.

    Equal to `deit_models.count_macs`: matrix products and convolutions count; norms, activations, softmax, pooling and
    padding do not. The patch head is not counted, since it is not used in eval mode.
    """
    prefix, before, total = config.num_prefix_tokens, 0, _stem_macs(config)
    for stage, (height, width) in zip(config.stages, config.grids, strict=True):
        dim, patches = stage.embed_dim, height * width
        tokens = prefix + patches
        if before:  # a reduction: a 3x3 convolution for the patches, a linear layer for the prefix tokens
            total += (9 * patches + prefix) * before * dim
        for heads, hidden in zip(stage.num_heads, stage.mlp_hidden, strict=True):
            attn_dim = heads * stage.head_dim
            projections, attention, mlp = 4 * dim * attn_dim, 2 * tokens * attn_dim, 2 * dim * hidden
            total += tokens * (projections + attention + mlp)
        before = dim
    return total + prefix * before * config.num_classes


def _stem_macs(config: ViTResNASConfig) -> int:
    """Three 3x3 convolutions on a map of half the sides, if there are any, then one for each patch."""
    total, chans, side = 0, config.in_chans, config.patch_size
    if config.stem == "conv":
        height, width = config.image_hw
        total = (height // 2) * (width // 2) * 9 * (chans + 2 * config.stem_dim) * config.stem_dim
        chans, side = config.stem_dim, side // 2
    return total + math.prod(config.grids[0]) * chans * side**2 * config.stages[0].embed_dim


class Latency:
    """Milliseconds for a batch of images: the sum over a candidate's parts, each measured once and kept in a file.

    There are few different parts and very many candidates, and a search that goes on must find the same numbers again.
    The time of a part is the median of five runs after two that do not count. Of several processes the first measures.

    Args:
        space: the space.
        num_classes: logits.
        folder: where `latency.jsonl` is kept; it belongs to one machine.
        process: whose device is measured; all processes ask for the same candidates in the same order.
        batch: images at once.
    """

    unit = "ms"

    def __init__(self, space: SearchSpace, num_classes: int, folder: Path, *, process: Process, batch: int) -> None:
        self.space, self.num_classes, self.process, self.batch = space, num_classes, process, batch
        self.device = process.device
        self._known = Ledger(folder / LATENCY_NAME, "ms", writes=process.is_main)

    def __call__(self, candidate: Candidate) -> float:
        """Sum of the times of its parts."""
        config = self.space.config_of(candidate, num_classes=self.num_classes)
        keys = [f"{self.device.type} {self.batch}: {part}" for part in _parts(config)]
        if any(key not in self._known for key in keys):
            measured = self.process.gather(list(self._measure(config)) if self.process.is_main else None)[0]
            for key, milliseconds in zip(keys, measured, strict=True):
                if key not in self._known:
                    self._known.add(key, milliseconds)
        return sum(self._known[key] for key in keys)

    @torch.inference_mode()
    def _measure(self, config: ViTResNASConfig) -> Iterator[float]:
        model = ViTResNAS(config).to(self.device).eval()
        x = torch.zeros(self.batch, config.in_chans, *config.image_hw, device=self.device)
        steps: list[Callable[[Tensor], Any]] = [model.forward_tokens, *model.blocks]
        for step in steps:
            yield self._milliseconds(step, x)
            x = step(x)
        yield self._milliseconds(lambda x: model.classify(model.norm(x)), x)

    def _milliseconds(self, step: Callable[[Tensor], Any], x: Tensor) -> float:
        times = []
        for _ in range(7):
            self._wait()
            start = time.perf_counter()
            step(x)
            self._wait()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times[2:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _parts(config: ViTResNASConfig) -> Iterator[str]:
    """Names of the stem, each entry of `blocks` and the heads, in order; parts of one name take the same time."""
    yield f"stem {config.stages[0].embed_dim}"
    for number, stage in enumerate(config.stages):
        if number:
            before = config.stages[number - 1].embed_dim
            yield f"reduction {config.grids[number - 1]} {before} {stage.embed_dim}"
        for heads, hidden in zip(stage.num_heads, stage.mlp_hidden, strict=True):
            yield f"block {config.grids[number]} {stage.embed_dim} {heads}x{stage.head_dim} {hidden}"
    yield f"heads {config.grids[-1]} {config.stages[-1].embed_dim} {config.num_classes}"


def make_cost(
    kind: CostKind, space: SearchSpace, num_classes: int, folder: Path, *, process: Process, batch: int
) -> Cost:
    """The cost that a search limits: "macs" or "latency". Raises: ConfigError: neither."""
    if kind not in get_args(CostKind):
        raise ConfigError(f"cost={kind!r}; expected {' or '.join(map(repr, get_args(CostKind)))}")
    if kind == "macs":
        return Macs(space, num_classes)
    return Latency(space, num_classes, folder, process=process, batch=batch)
