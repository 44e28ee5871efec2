"""For maintainers with a network: load every published copy once, and write its digest and logits into the manifest.

Until a full SHA-256 is recorded, a copy is compared with its first digits (the authors' files), with the server's
announcement (Hub files), or with nothing; afterwards with the recorded one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint import ModelInfo, Source, parse_manifest
from ..config import nearest
from ..errors import CheckpointError, DeitModelsError, ManifestError, UnknownModelError
from ..files import read_text, sha256_of, write_text
from .fetch import Access
from .load import load_source
from .weights import REFERENCE_TOLERANCE, reference_logits

NUM_LOGITS = 5


class Outcome(NamedTuple):
    """Result of recording a source; `error` is None on success."""

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

    The copies of one model must agree in their logits: one that differs from the first that loads is not recorded. The
    file is replaced after each model, so that an interrupted run keeps what it found.

    Args:
        manifest: the manifest.toml to read and to write.
        names: models to record; all with sources if none is given.
        access: token and cache.
        report: called with each outcome as it comes.

    Raises: ManifestError: the file is not a manifest. UnknownModelError: it lists no sources of a wanted model.
    """
    checkpoints = parse_manifest(read_text(manifest, error=ManifestError))
    published = [info.name for info in checkpoints.values() if info.sources]
    wanted = list(names) or published
    for name in wanted:
        if name not in published:
            raise UnknownModelError(f"{manifest} lists no sources of {name!r}{nearest(name, published)}")
    outcomes: list[Outcome] = []
    for info in checkpoints.values():
        if info.name in wanted:
            facts, found = _facts(info, access or Access())
            outcomes += found
            if report is not None:
                for outcome in found:
                    report(outcome)
            text = read_text(manifest, error=ManifestError)
            for (source, key), value in facts.items():
                text = set_value(text, info.name, source, key, value)
            parse_manifest(text)
            write_text(manifest, text)
    return outcomes


def _facts(info: ModelInfo, access: Access) -> tuple[dict[tuple[Source | None, str], Any], list[Outcome]]:
    facts: dict[tuple[Source | None, str], Any] = {}
    outcomes: list[Outcome] = []
    reference: torch.Tensor | None = None
    first = ""
    for source in info.sources:
        try:
            located, model = load_source(info, source, access)
            logits = reference_logits(model.float(), NUM_LOGITS)  # float: a file may hold half precision
            if reference is None:
                reference, first = logits, str(source)
            difference = float((logits - reference).abs().max())
            if not difference <= REFERENCE_TOLERANCE:
                raise CheckpointError(f"logits differ from those of {first} by {difference:.3g}")
        except DeitModelsError as error:
            outcomes.append(Outcome(info.name, str(source), str(error)))
            continue
        facts[source, "sha256"] = sha256_of(located.weights)
        if located.revision is not None:
            facts[source, "revision"] = located.revision
        outcomes.append(Outcome(info.name, str(source), None))
    if reference is not None:
        facts[None, "reference_logits"] = [round(value, 5) for value in reference.tolist()]
    return facts, outcomes


def set_value(text: str, model: str, source: Source | None, key: str, value: Any) -> str:
    """Set one key in the text of a manifest, keeping comments and order.

    Args:
        text: the manifest.
        model: the table's model.
        source: one of its sources, or None for the model's own table.
        key: replaced if the table has it, otherwise added at the end.
        value: a string or a list of numbers.

    Raises: ManifestError: the manifest has no such table.
    """
    chunks = re.split(r"(?m)^(?=\[)", text)
    for index, chunk in enumerate(chunks):
        header, _, body = chunk.partition("\n")
        wanted = f"[model.{model}]" if source is None else f"[[model.{model}.source]]"
        place = None if source is None else f'"{source.file or source.repo or source.url}"'
        if header.partition("#")[0].strip() == wanted and (place is None or place in body):
            chunks[index] = _set_in_table(chunk, key, json.dumps(value))
            return "".join(chunks)
    raise ManifestError(f"the manifest has no table for {model}" + ("" if source is None else f" from {source}"))


def _set_in_table(table: str, key: str, value: str) -> str:
    there = re.compile(rf"""(?m)^{key}\s*=\s*(?:"[^"\n]*"|'[^'\n]*'|\[[^\]]*\])""")
    if there.search(table):
        return there.sub(lambda _: f"{key} = {value}", table, count=1)
    # after the last key: comments at the end may belong to the next table
    lines = table.splitlines()
    last = max(i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#"))
    return "\n".join([*lines[: last + 1], f"{key} = {value}", *lines[last + 1 :], ""])
