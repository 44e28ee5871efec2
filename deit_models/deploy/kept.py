"""The cache of `optimize`: timings by machine and question, and compiled networks by weights."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..errors import IntegrityError, SaveError, first_line
from ..files import atomic_write
from ..hub.fetch import Access, assets_dir
from .hardware import machine

logger = logging.getLogger(__name__)

MOST_KEPT = 2 << 30
"""Bytes of compiled networks; those unused for longest are removed first."""
Row = TypeVar("Row")


def decision_key(question: dict[str, Any], device: torch.device) -> str:
    """File name for the timings of a question on this machine; depends on processor, threads and versions."""
    text = json.dumps({**question, **machine(device)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def recall(key: str, row: type[Row], access: Access) -> list[Row]:
    """Timings from the cache, fastest first; empty if there are none or the file is damaged."""
    try:
        found = json.loads((assets_dir("deploy", access) / f"{key}.json").read_text(encoding="utf-8"))
        return [row(**fields) for fields in found]
    except (OSError, ValueError, TypeError):
        return []


def keep(key: str, timings: Sequence[Any], access: Access) -> None:
    """Write timings (dataclasses) to the cache; if that fails, one log line, and the next call measures again."""
    try:
        with atomic_write(assets_dir("deploy", access) / f"{key}.json") as temporary:
            temporary.write_text(json.dumps([asdict(timing) for timing in timings], indent=2), encoding="utf-8")
    except SaveError as error:
        logger.warning("the choice is not kept: %s", error)


class KeptNetwork(NamedTuple):
    """Bytes of a compiled network, and the agreement that was found when it was compiled."""

    network: bytes
    agreement: list[Any]


def has_network(key: str, access: Access) -> bool:
    """Whether there is a network in the cache."""
    with suppress(SaveError):
        return (assets_dir("deploy", access) / f"{key}.network").exists()
    return False


def kept_network(key: str, access: Access) -> KeptNetwork | None:
    """A network from the cache; None if there is none.

    Raises: IntegrityError: its bytes have changed; a runtime may crash on such bytes. Any error of a damaged header.
    """
    try:
        path = assets_dir("deploy", access) / f"{key}.network"
        line, _, network = path.read_bytes().partition(b"\n")
        os.utime(path)
    except (OSError, SaveError):
        return None
    header = json.loads(line)
    if hashlib.sha256(network).hexdigest() != header["sha256"]:
        raise IntegrityError("its bytes have changed")
    return KeptNetwork(network, header["agreement"])


def keep_network(key: str, network: bytes, agreement: Sequence[Any], access: Access, *, most: int = MOST_KEPT) -> None:
    """Write a network: a line of JSON, then its bytes. If that fails, one log line. `most`: bytes of all networks."""
    header = {"agreement": agreement, "sha256": hashlib.sha256(network).hexdigest()}
    try:
        path = assets_dir("deploy", access) / f"{key}.network"
        with atomic_write(path) as temporary, temporary.open("wb") as out:
            out.write(json.dumps(header).encode() + b"\n")
            out.write(network)
        _remove_oldest(path, most)
    except (SaveError, OSError) as error:
        logger.warning("the compiled network is not kept: %s", first_line(error))


def _remove_oldest(newest: Path, most: int) -> None:
    kept = sorted(newest.parent.glob("*.network"), key=lambda file: -file.stat().st_mtime)
    for file, size in zip(kept, accumulate(file.stat().st_size for file in kept), strict=True):
        if size > most and file != newest:
            file.unlink(missing_ok=True)
