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
from torch import Tensor

from ..checkpoint import ModelInfo, Source, TeacherInfo, parse_manifest, parse_teachers
from ..config import nearest
from ..errors import CheckpointError, DeitModelsError, ManifestError, UnknownModelError
from ..files import read_text, sha256_of, write_text
from .fetch import Access, commit_of
from .load import load_source, source_file
from .weights import REFERENCE_TOLERANCE, read_tensors, reference_logits

NUM_LOGITS = 5


class Outcome(NamedTuple):
    """Result of recording a source of a model or a teacher; `error` is None on success."""

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

    The copies of one model must agree in their logits, those of a teacher in their weights: one that differs from the
    first that loads is not recorded. The file is replaced after each model, so that an interrupted run keeps what it
    found.

    Args:
        manifest: the manifest.toml to read and to write.
        names: models and teachers to record; all with sources if none is given.
        access: token and cache.
        report: called with each outcome as it comes.

    Raises: ManifestError: the file is not a manifest. UnknownModelError: it lists no sources of a wanted model.
    """
    text = read_text(manifest, error=ManifestError)
    listed: list[ModelInfo | TeacherInfo] = [*parse_manifest(text).values(), *parse_teachers(text).values()]
    published = [info.name for info in listed if info.sources]
    wanted = list(names) or published
    for name in wanted:
        if name not in published:
            raise UnknownModelError(f"{manifest} lists no sources of {name!r}{nearest(name, published)}")
    outcomes: list[Outcome] = []
    for info in listed:
        if info.name in wanted:
            facts, found = _facts(info, access or Access())
            outcomes += found
            if report is not None:
                for outcome in found:
                    report(outcome)
            text = read_text(manifest, error=ManifestError)
            for (source, key), value in facts.items():
                text = set_value(text, _table_of(info), source, key, value)
            parse_manifest(text)
            write_text(manifest, text)
    return outcomes


def _facts(info: ModelInfo | TeacherInfo, access: Access) -> tuple[dict[tuple[Source | None, str], Any], list[Outcome]]:
    facts: dict[tuple[Source | None, str], Any] = {}
    outcomes: list[Outcome] = []
    reference: Tensor | None = None
    first = ""
    for source in info.sources:
        try:
            weights, revision, numbers = (
                _model(info, source, access) if isinstance(info, ModelInfo) else _teacher(source, access)
            )
            if reference is None:
                reference, first = numbers, str(source)
            _check_alike(numbers, reference, first, "logits" if isinstance(info, ModelInfo) else "weights")
        except DeitModelsError as error:
            outcomes.append(Outcome(info.name, str(source), str(error)))
            continue
        facts[source, "sha256"] = sha256_of(weights)
        if revision is not None:
            facts[source, "revision"] = revision
        outcomes.append(Outcome(info.name, str(source), None))
    if reference is not None and isinstance(info, ModelInfo):
        facts[None, "reference_logits"] = [round(value, 5) for value in reference.tolist()]
    return facts, outcomes


def _model(info: ModelInfo, source: Source, access: Access) -> tuple[Path, str | None, Tensor]:
    """File, revision and first logits of a copy of a model."""
    located, model = load_source(info, source, access)
    # float: a file may hold half precision
    return located.weights, located.revision, reference_logits(model.float(), NUM_LOGITS)


def _teacher(source: Source, access: Access) -> tuple[Path, str | None, Tensor]:
    """File and revision of a copy of a teacher, and the first number of each of its tensors, by name."""
    weights, digest = source_file(source, access)
    tensors, _ = read_tensors(weights, access, source=str(source), digest=digest, payload=source.payload)
    numbers = [tensors[name].flatten()[:1].float() for name in sorted(tensors) if tensors[name].is_floating_point()]
    return weights, commit_of(weights), torch.cat(numbers)


def _check_alike(numbers: Tensor, reference: Tensor, first: str, kind: str) -> None:
    difference = float((numbers - reference).abs().max()) if numbers.shape == reference.shape else torch.inf
    if not difference <= REFERENCE_TOLERANCE:
        raise CheckpointError(f"{kind} differ from those of {first} by {difference:.3g}")


def _table_of(info: ModelInfo | TeacherInfo) -> str:
    return f"{'model' if isinstance(info, ModelInfo) else 'teacher'}.{info.name}"


def set_value(text: str, table: str, source: Source | None, key: str, value: Any) -> str:
    """Set one key in the text of a manifest, keeping comments and order.

    Args:
        text: the manifest.
        table: name of a table, such as "model.deit_tiny_patch16_224" or "teacher.regnety_160".
        source: one of its sources, or None for that table itself.
        key: replaced if the table has it, otherwise added at the end.
        value: a string or a list of numbers.

    Raises: ManifestError: the manifest has no such table.
    """
    chunks = re.split(r"(?m)^(?=\[)", text)
    for index, chunk in enumerate(chunks):
        header, _, body = chunk.partition("\n")
        wanted = f"[{table}]" if source is None else f"[[{table}.source]]"
        place = None if source is None else f'"{source.file or source.repo or source.url}"'
        if header.partition("#")[0].strip() == wanted and (place is None or place in body):
            chunks[index] = _set_in_table(chunk, key, json.dumps(value))
            return "".join(chunks)
    raise ManifestError(f"the manifest has no table {table}" + ("" if source is None else f" from {source}"))


def _set_in_table(table: str, key: str, value: str) -> str:
    there = re.compile(rf"""(?m)^{key}\s*=\s*(?:"[^"\n]*"|'[^'\n]*'|\[[^\]]*\])""")
    if there.search(table):
        return there.sub(lambda _: f"{key} = {value}", table, count=1)
    # after the last key: comments at the end may belong to the next table
    lines = table.splitlines()
    last = max(i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#"))
    return "\n".join([*lines[: last + 1], f"{key} = {value}", *lines[last + 1 :], ""])
