"""For maintainers with a network: load every published copy once, and write what it is into the manifest.

Until a full SHA-256 is recorded, a copy is vouched for only by its first digits (the authors' files), by what the
server announces (Hub files), or by nothing. Once recorded, every later load is compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError, DeitModelsError
from .fetch import Access, atomic_write, sha256_of
from .load import load_source
from .manifest import Checkpoint, Source, parse_manifest
from .reference import REFERENCE_TOLERANCE, reference_input

NUM_LOGITS = 5


class Outcome(NamedTuple):
    """What recording a source gave; `error` is None where it worked."""

    model: str
    source: str
    error: str | None


def record(
    manifest: Path,
    names: Iterable[str] = (),
    *,
    access: Access | None = None,
    report: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Download each source of each checkpoint, verify it, and write digest, revision and first logits to the manifest.

    The copies of one model must agree in their logits, or none of them is recorded. The file is replaced after each
    model, so that an interrupted run keeps what it found.

    Args:
        manifest: the manifest.toml to read and to write.
        names: models to record; all with sources if none is given.
        access: token and cache.
        report: called with each outcome as it comes.

    Raises: ManifestError: the file is not a manifest.
    """
    checkpoints = parse_manifest(manifest.read_text(encoding="utf-8"))
    wanted = set(names) or set(checkpoints)
    outcomes: list[Outcome] = []
    for checkpoint in checkpoints.values():
        if checkpoint.sources and checkpoint.name in wanted:
            facts, found = _facts(checkpoint, access or Access())
            outcomes += found
            if report is not None:
                for outcome in found:
                    report(outcome)
            text = manifest.read_text(encoding="utf-8")
            for (source, key), value in facts.items():
                text = set_value(text, checkpoint.name, source, key, value)
            parse_manifest(text)
            with atomic_write(manifest) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return outcomes


def _facts(checkpoint: Checkpoint, access: Access) -> tuple[dict[tuple[Source | None, str], Any], list[Outcome]]:
    facts: dict[tuple[Source | None, str], Any] = {}
    outcomes: list[Outcome] = []
    reference: torch.Tensor | None = None
    for source in checkpoint.sources:
        try:
            located, model = load_source(checkpoint, source, access)
            with torch.inference_mode():
                logits = model.eval()(reference_input(model.config))[0, :NUM_LOGITS]
            if reference is None:
                reference = logits
            difference = float((logits - reference).abs().max())
            if difference > REFERENCE_TOLERANCE:
                raise CheckpointError(f"logits differ from those of {checkpoint.sources[0]} by {difference:.3g}")
        except DeitModelsError as error:
            outcomes.append(Outcome(checkpoint.name, str(source), str(error)))
            continue
        facts[source, "sha256"] = sha256_of(located.weights)
        if located.revision is not None:
            facts[source, "revision"] = located.revision
        outcomes.append(Outcome(checkpoint.name, str(source), None))
    if reference is not None:
        facts[None, "reference_logits"] = [round(value, 5) for value in reference.tolist()]
    return facts, outcomes


def set_value(text: str, model: str, source: Source | None, key: str, value: Any) -> str:
    """Set one key in the text of a manifest, keeping comments and order.

    Args:
        text: the manifest.
        model: the table's model.
        source: one of its sources, or None for the model's own table.
        key: replaced where it stands, otherwise put at the end of the table.
        value: a string or a list of numbers.
    """
    line = f"{key} = {_toml(value)}"
    chunks = re.split(r"(?m)^(?=\[)", text)
    for index, chunk in enumerate(chunks):
        header, _, body = chunk.partition("\n")
        wanted = f"[model.{model}]" if source is None else f"[[model.{model}.source]]"
        place = None if source is None else f'"{source.file or source.repo or source.url}"'
        if header.strip() == wanted and (place is None or place in body):
            pattern = re.compile(rf"(?m)^{key} = .*$")
            if pattern.search(chunk):
                chunks[index] = pattern.sub(lambda _: line, chunk, count=1)
            else:
                chunks[index] = f"{chunk.rstrip()}\n{line}\n\n"
            return "".join(chunks).rstrip() + "\n"
    raise CheckpointError(f"the manifest has no table for {model}" + ("" if source is None else f" from {source}"))


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
