"""What was found fastest on this machine, kept in the package's cache so that it is measured once."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import FetchError
from ..hub.fetch import Access, assets_dir, atomic_write
from .backends import BackendName, Precision
from .timing import machine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How fast one way to compute was.

    Attributes:
        backend: what computed.
        precision: in what.
        images_per_second: over all timed calls.
        latency_ms: the median of a call with one batch.
    """

    backend: BackendName
    precision: Precision
    images_per_second: float
    latency_ms: float


def decision_key(question: dict[str, Any], device: torch.device) -> str:
    """A name for a question on this machine: it changes with the processor, the threads and the versions."""
    text = json.dumps({**question, **machine(device)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def recall(key: str, access: Access) -> list[Timing]:
    """The kept timings, fastest first; empty if there are none that can be read."""
    try:
        rows = json.loads((assets_dir("deploy", access) / f"{key}.json").read_text(encoding="utf-8"))
        return [Timing(**row) for row in rows]
    except (OSError, ValueError, TypeError):
        return []


def keep(key: str, timings: list[Timing], access: Access) -> None:
    """Write timings down; a cache that cannot be written costs a log line and the next measurement."""
    try:
        with atomic_write(assets_dir("deploy", access) / f"{key}.json") as temporary:
            temporary.write_text(json.dumps([asdict(timing) for timing in timings], indent=2), encoding="utf-8")
    except FetchError as error:
        logger.warning("the choice is not kept: %s", error)
