"""The state dict of a model among all that a training script saved: its key, and the prefix of its names."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..formats.family import FamilyLayouts
from ..models.layers import ImageClassifier

# Keys of one script, the one whose accuracy its project reports first: timm and T2T-ViT by averaged weights, DeiT's
# main.py by the plain ones, DINO by the teacher.
_RULES = (("state_dict_ema", "state_dict"), ("model", "model_ema"), ("teacher", "student"))
_RULES_OF_FAMILY = {"vit_resnas": (("model_ema", "model"),)}
_USUAL = {"", "model", "state_dict", "state_dict_ema", "model_ema", "net"}
# Modules that wrap others, wherever in the model they stand.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_MOST_DEPTH, _MOST_PREFIXES = 4, 64


class Chosen(NamedTuple):
    """A state dict without wrappers' prefixes; `note` says what was guessed, if anything was."""

    tensors: dict[str, Tensor]
    note: str | None


class _Candidate(NamedTuple):
    """`label` is what `payload` names it by; `outside` are names that are not under its prefix."""

    label: str
    tensors: dict[str, Tensor]
    outside: list[str]


@dataclass(frozen=True, slots=True)
class Expected:
    """The model a file is said to be of; without layouts its names are the network's own."""

    network: nn.Module
    layouts: FamilyLayouts | None = None
    config: Any = None

    def resembles(self, tensors: Mapping[str, Tensor], *, by_shape: bool = True) -> bool:
        """Whether at least half of the model's tensors are there; heads and positions may be of another size."""
        state = self.network.state_dict()
        shells = {name: torch.empty(_shape(tensor), device="meta") for name, tensor in tensors.items()}
        if self.layouts is not None:
            try:
                shells = self.layouts.to_native(shells, state, config=self.config).tensors
            except (CheckpointError, RuntimeError):
                return False
        found = [name for name in state if name in shells and (not by_shape or shells[name].shape == state[name].shape)]
        return 2 * len(found) >= len(state)

    @property
    def key(self) -> str:
        """Tells apart models for which another state dict of a file may be chosen."""
        heads = self.network.head_names if isinstance(self.network, ImageClassifier) else ()
        shapes = {
            name: tuple(tensor.shape) if tensor.ndim == 1 and name.partition(".")[0] not in heads else None
            for name, tensor in self.network.state_dict().items()
        }
        return hashlib.sha256(repr((self.family, sorted(shapes.items()))).encode()).hexdigest()[:16]

    @property
    def family(self) -> str | None:
        """The family, if the model is one of ours."""
        return None if self.layouts is None else self.layouts.family


def choose(path: Path, data: Any, expected: Expected | None, payload: str | None) -> Chosen:
    """The state dict of a model, found in the contents of a file.

    Args:
        path: the file, for messages.
        data: its contents, a table of tensors or of tables.
        expected: the model; if not given, every table of tensors is taken for one.
        payload: the key, with dots between nested ones; a prefix of names counts as one.

    Raises: CheckpointError: no tensors there, several state dicts that fit and no rule that prefers one, or two names
        that become one.
    """
    _check_heads(path, data, expected)
    if payload is not None:
        states = list(_states(_under(data, payload), payload, set()))
        if not states:
            raise CheckpointError(f"{path} has no state dict under {payload!r}; it has {_labels(data)}")
    elif not isinstance(data, Mapping):
        raise CheckpointError(f"{path} has no state dict: it holds a {type(data).__name__}")
    else:
        states = list(_states(data, "", set()))
        if not states:
            raise CheckpointError(f"{path} holds no tensors, neither at its top nor under {_keys(data)}")
    fitting = _fitting(states, expected, by_shape=True) or _fitting(states, expected, by_shape=False)
    if not fitting:  # the comparison with the model says what differs
        preferred = [state for rule in _rules(expected) for label in rule for state in states if state[0] == label]
        largest = max(states, key=lambda state: len(state[1]))
        return Chosen(_renamed(path, (*preferred, largest)[0][1]), None)
    chosen = fitting[0] if len(fitting) == 1 else _preferred(path, fitting, expected)
    return Chosen(_renamed(path, chosen.tensors), None if payload is not None else _note(path, chosen, fitting))


def _check_heads(path: Path, data: Any, expected: Expected | None) -> None:
    """Raises: CheckpointError: MoCo v3's ViT-S, which has twice as many heads; no shape of a tensor tells."""
    config: Any = expected.config if expected is not None else None
    if getattr(config, "embed_dim", None) == 384 and getattr(config, "num_heads", 12) != 12:
        names = (name for _, tensors in _states(data, "", set()) for name in tensors)
        if any(name.startswith(("module.base_encoder.", "base_encoder.")) for name in names):
            raise CheckpointError(
                f"{path} is of MoCo v3, whose ViT-S has num_heads=12, not {config.num_heads}; register a model with as "
                f"many, register_model(name, DeiT, config, num_heads=12), and name it"
            )


def _states(data: Any, label: str, seen: set[int], *, depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All tables of tensors, each once; what optimisers keep has the names of weights and is not among them."""
    if not isinstance(data, Mapping) or id(data) in seen or depth > _MOST_DEPTH:
        return
    seen.add(id(data))
    tensors: dict[str, Tensor] = {}
    for key, value in data.items():
        if isinstance(value, Tensor):
            if str(key) in tensors:
                raise CheckpointError(f"two tensors have the name {str(key)!a}")
            tensors[str(key)] = value
    if tensors:
        yield label, tensors
    for key, value in data.items():
        if isinstance(key, str) and not key.lower().startswith("optim"):
            yield from _states(value, f"{label}.{key}" if label else key, seen, depth=depth + 1)


def _under(data: Any, payload: str) -> Any:
    """The value under a key, under nested keys, or under a prefix of names."""
    if not isinstance(data, Mapping):
        return None
    if payload in data:
        return data[payload]
    for key in data:
        if isinstance(key, str) and isinstance(data[key], Mapping) and payload.startswith(key + "."):
            found = _under(data[key], payload.removeprefix(key + "."))
            if found:
                return found
    prefix = payload + "."
    return {key.removeprefix(prefix): data[key] for key in data if isinstance(key, str) and key.startswith(prefix)}


def _labels(data: Any) -> str:
    return ", ".join(ascii(label or "tensors at its top") for label, _ in [*_states(data, "", set())][:6]) or "none"


def _keys(data: Mapping[Any, Any]) -> str:
    return ", ".join(ascii(key)[:60] for key in list(data)[:6]) or "any key"


def _fitting(
    states: list[tuple[str, dict[str, Tensor]]], expected: Expected | None, *, by_shape: bool
) -> list[_Candidate]:
    return [found for label, tensors in states for found in _under_prefixes(label, tensors, expected, by_shape)]


def _under_prefixes(
    label: str, tensors: dict[str, Tensor], expected: Expected | None, by_shape: bool
) -> Iterator[_Candidate]:
    """A state dict as it is or, if that is not the model, what is under the shortest prefixes that are."""
    if expected is None or expected.resembles(_unwrapped(tensors), by_shape=by_shape):
        yield _Candidate(label, tensors, [])
        return
    counts: Counter[str] = Counter()
    for name in tensors:
        words = name.split(".", 8)
        counts.update(".".join(words[:end]) + "." for end in range(1, min(len(words), 8)))
    least, tried = len(expected.network.state_dict()) // 2, 0
    taken: tuple[str, ...] = ()
    for prefix in sorted(counts, key=len):
        if counts[prefix] < least or prefix.startswith(taken) or tried > _MOST_PREFIXES:
            continue
        tried += 1
        inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if expected.resembles(_unwrapped(inner), by_shape=by_shape):
            taken += (prefix,)
            outside = [name for name in tensors if not name.startswith(prefix)]
            yield _Candidate(f"{label}.{prefix}".strip(".") if outside else label, inner, outside)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def _renamed(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    renamed = _unwrapped(tensors)
    if len(renamed) < len(tensors):
        raise CheckpointError(f"{path}: two names become one without the prefixes of wrappers")
    return renamed


def _rules(expected: Expected | None) -> tuple[tuple[str, ...], ...]:
    return _RULES_OF_FAMILY.get((expected and expected.family) or "", ()) + _RULES


def _preferred(path: Path, fitting: list[_Candidate], expected: Expected | None) -> _Candidate:
    by_key = {candidate.label.partition(".")[0]: candidate for candidate in fitting}
    for rule in _rules(expected):
        if by_key.keys() <= set(rule) and len(by_key) == len(fitting):
            return next(by_key[key] for key in rule if key in by_key)
    labels = ", ".join(ascii(candidate.label or "tensors at its top") for candidate in fitting[:6])
    example = next(candidate.label for candidate in fitting if candidate.label)
    raise CheckpointError(f"{path} holds several state dicts that fit: {labels}; say which, e.g. payload={example!a}")


def _note(path: Path, chosen: _Candidate, fitting: list[_Candidate]) -> str | None:
    others = [candidate.label for candidate in fitting if candidate is not chosen]
    why = "which its project evaluates" if others else "the one state dict that fits"
    if chosen.outside:
        why += f"; {len(chosen.outside)} tensors beside it are left out, such as {chosen.outside[0]!a:.80}"
    elif not others and chosen.label in _USUAL:
        return None
    other = others[0] if others else "..."
    return f"{path}: loading {chosen.label!a}, {why}; payload={other!a} takes another"


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if tensor.is_nested else tuple(tensor.shape)
