"""Embeddings of many images: results on disk in parts by any number of processes, files of features, retrieval."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.sources import ImageSources
from ..distributed import Process, join_processes
from ..errors import ConfigError, DataError, MissingExtraError, first_line, shown
from ..files import atomic_write, read_json, write_json

_BLOCK, _BLOCKS_EACH = 1024, 16
"""Images of a block, at most; blocks of a process, where the list is long enough."""
_ROW_GROUP = 16_384
_SIMILARITIES = 1 << 22
"""Numbers of a matrix of similarities, at most: 16 MiB."""


class Parts:
    """Results of a long list of images on disk: blocks of the list by any number of processes, joined in order.

    Beside the output, say labels.csv, stands the folder labels.csv.parts: run.json, the run's settings, and a file for
    each finished block. A file takes its place once complete, so a kill at any time loses only the blocks under way,
    and the run goes on with any number of processes. Several machines must share the folder.

    Attributes:
        folder: of the parts.
        mine: the blocks that this process is to make, as ranges of the list.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".parts")
        self.mine: list[range] = []
        self._run, self._total, self._block = self.folder / "run.json", 0, _BLOCK

    @property
    def unfinished(self) -> bool:
        """Whether there are parts that are not in the output yet; they are joined to it as it was at the beginning."""
        return self._run.exists() and read_json(self._run).get("size") == self._size()

    def _size(self) -> int:
        return self.output.stat().st_size if self.output.is_file() else 0

    def settle(self, process: Process, *, resume: bool, overwrite: bool) -> bool:
        """Decide, for all processes, about earlier results; returns whether the output holds some, to be kept.

        Raises: ConfigError: there are some, and neither `resume` nor `overwrite` is on.
        """
        if process.is_main:
            if overwrite:
                self.output.unlink(missing_ok=True)
            elif not resume and (self._size() or self.folder.exists()):
                there = self.output if self._size() else self.folder
                raise ConfigError(f"{there} exists; --resume (resume=True) goes on with it, --overwrite replaces it")
            if overwrite or not self.unfinished:  # joined right before a kill, or about to be removed
                shutil.rmtree(self.folder, ignore_errors=True)
        kept: bool = process.gather(self._size() > 0 if process.is_main else None)[0]
        return kept

    def begin(self, run: Mapping[str, Any], total: int, process: Process) -> None:
        """Share the blocks that are missing of a list of `total` images; all processes call this.

        Raises: ConfigError: the parts are of a run with other settings, or not all machines see the folder.
        """
        if process.is_main and not self._run.exists():
            block = min(max(total // (_BLOCKS_EACH * process.world), 1), _BLOCK)
            write_json(self._run, {**run, "block": block, "size": self._size()})
        process.wait_for_all()
        if not self._run.exists():
            raise ConfigError(f"process {process.rank} sees no {self._run}: machines must share the output's folder")
        known = read_json(self._run)
        check_same_run(run, known, where=self.folder)
        self._total, self._block = total, int(known["block"])
        # as the first process sees it: a shared folder may show each machine another state
        starts: list[int] = process.gather(self._missing() if process.is_main else None)[0]
        mine = starts[process.rank :: process.world]
        self.mine = [range(start, min(start + self._block, total)) for start in mine]

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:012}.part"

    def _missing(self) -> list[int]:
        present = {path.name for path in self.folder.iterdir()}
        return [start for start in range(0, self._total, self._block) if self._path(start).name not in present]

    @contextmanager
    def new(self, block: range, errors: list[str]) -> Iterator[Path]:
        """A file to write a block's results to; it counts once complete, with the reasons of the block's failures.

        Raises: SaveError: no space, no permission.
        """
        with atomic_write(self._path(block.start)) as path:
            yield path
            if errors:
                write_json(self._path(block.start).with_suffix(".errors"), {"errors": errors})

    def finish(self, process: Process, join: Callable[[Path, list[Path], list[str]], object]) -> list[str]:
        """Wait for all parts; the first process joins them in order as the new output, and removes them.

        `join` writes a file from the parts and the reasons of all failures, which the first process gets back.
        """
        errors: list[str] = []
        if not process.is_main:
            while self.folder.exists():
                time.sleep(0.2)
            return errors
        while self._missing():
            time.sleep(0.2)
        for path in sorted(self.folder.glob("*.errors")):
            errors += read_json(path)["errors"]
        with atomic_write(self.output) as temporary:
            join(temporary, [self._path(start) for start in range(0, self._total, self._block)], errors)
        shutil.rmtree(self.folder)
        return errors


def check_same_run(run: Mapping[str, Any], known: Mapping[str, Any], *, where: Path) -> None:
    """Raise ConfigError, which names the setting, unless results on disk are of a run with the same settings."""
    for name, value in run.items():
        if known.get(name) != value:
            change = f"{name}: {shown(known.get(name))} then, {shown(value)} now"
            raise ConfigError(f"{where} is of another run ({change}); repeat that one, or --overwrite starts anew")


def digest_of_names(names: Iterable[str]) -> str:
    """Sixteen hex digits of a list of names in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


# Files of features


class Embeddings(NamedTuple):
    """Embeddings of images, as a file holds them.

    Attributes:
        embeddings: (N, D) float32 or float16; images that could not be read have no row.
        paths: of the images.
        labels: their classes by name, where they are known.
        about: the run's settings, and under "unreadable" the reason for each image without a row.
    """

    embeddings: Tensor
    paths: tuple[str, ...]
    labels: tuple[str, ...] | None
    about: Mapping[str, Any]


class EmbeddedFiles(NamedTuple):
    """A file of features: its path, rows and columns, and the reason for each image without a row."""

    path: Path
    images: int
    width: int
    unreadable: tuple[str, ...]


def check_features_file(path: Path, storage: str) -> None:
    """Raise ConfigError for another suffix or storage, MissingExtraError for Parquet without pyarrow."""
    if path.suffix not in (".npz", ".parquet") or storage not in ("float32", "float16"):
        raise ConfigError(f"{path}, storage={storage!r}; expected .npz or .parquet, and 'float32' or 'float16'")
    if path.suffix == ".parquet":
        _parquet()


def write_features(
    output: Path,
    images: ImageSources,
    embed: Callable[[Iterable[Any], int], Iterator[tuple[str, Tensor | None, str | None]]],
    run: Mapping[str, Any],
    *,
    device: torch.device,
    resume: bool,
    overwrite: bool,
) -> EmbeddedFiles:
    """Write a file of features, by all processes; see `Classifier.embed_files`.

    `embed` gives of some images, of which there are so many, each one's name, its embedding (D,), and the reason if
    there is none. `run` holds the settings that fix the rows, with `width` and `storage`.
    """
    numbers, kind = range(len(images)), getattr(torch, run["storage"])
    labelled = any(images.label(i) is not None for i in numbers)

    def label(i: int) -> str:
        known = images.label(i) or ""
        return known if isinstance(known, str) else ";".join(known)

    names = digest_of_names(f"{images.name(i)}\t{label(i) if labelled else None}" for i in numbers)
    run, parts = {**run, "images": len(images), "names": names}, Parts(output)
    with join_processes(device) as process:
        if parts.settle(process, resume=resume, overwrite=overwrite):
            check_same_run(run, _about(output), where=output)
            return _written(output)
        parts.begin(run, len(images), process)
    rows = embed((images[i] for block in parts.mine for i in block), sum(map(len, parts.mine)))
    for block in parts.mine:
        found = list(zip(block, islice(rows, len(block)), strict=True))
        known = [(i, name, row) for i, (name, row, _) in found if row is not None]
        vectors = torch.stack([torch.empty(run["width"]), *(row for *_, row in known)])[1:]
        arrays = {"embeddings": vectors.to(kind).numpy(), "paths": _texts(name for _, name, _ in known)}
        if labelled:
            arrays["labels"] = _texts(label(i) for i, *_ in known)
        errors = [error for _, (*_, error) in found if error is not None]
        with parts.new(block, errors) as path, path.open("wb") as file:
            np.savez(file, **arrays)
    parts.finish(process, partial(_join, run=run, suffix=output.suffix))
    return _written(output)


def _written(path: Path) -> EmbeddedFiles:
    about = _about(path)
    unreadable = tuple(about["unreadable"])
    return EmbeddedFiles(path, about["images"] - len(unreadable), about["width"], unreadable)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        text = "Parquet needs pyarrow: pip install 'deit-models[data]'; .npz needs nothing"
        raise MissingExtraError(text) from error
    return pyarrow


def _texts(texts: Iterable[str]) -> Any:
    escaped = [text.encode("utf-8", "backslashreplace").decode() for text in texts]  # for bytes that are no Unicode
    return np.array(escaped, dtype=str if escaped else "<U1")


def _column(part: Path, name: str) -> Any:
    with np.load(part) as arrays:
        return arrays[name]


def _join(path: Path, parts: Sequence[Path], errors: list[str], *, run: Mapping[str, Any], suffix: str) -> None:
    """Write the parts as one file, with the memory of a few of them."""
    with np.load(parts[0]) as arrays:
        names = list(arrays)
    about = json.dumps({**run, "unreadable": errors})
    if suffix == ".npz":
        _join_as_npz(path, parts, names, about, run["images"] - len(errors))
    else:
        _join_as_parquet(path, parts, names, about)


def _join_as_npz(path: Path, parts: Sequence[Path], names: Sequence[str], about: str, rows: int) -> None:
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name in names:
            first = _column(parts[0], name)
            kinds = {_column(part, name).dtype for part in parts} if name != "embeddings" else {first.dtype}
            kind = np.result_type(*kinds)  # the width of the longest text
            shape = (rows, *first.shape[1:])
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(_column(part, name).astype(kind).tobytes())
        with archive.open(zipfile.ZipInfo("about.npy"), "w") as member:
            np.lib.format.write_array(member, np.array(about))


def _join_as_parquet(path: Path, parts: Sequence[Path], names: Sequence[str], about: str) -> None:
    arrow = _parquet()
    first = _column(parts[0], "embeddings")
    vector = arrow.list_(arrow.from_numpy_dtype(first.dtype), first.shape[1])
    fields = [(name.removesuffix("s"), vector if name == "embeddings" else arrow.string()) for name in names]
    schema = arrow.schema(fields, metadata={"deit_models": about})

    def table(part: Path) -> Any:
        rows, *texts = (_column(part, name) for name in names)
        vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.reshape(-1)), type=vector)
        return arrow.Table.from_arrays(
            [vectors, *(arrow.array(text.tolist(), arrow.string()) for text in texts)], schema=schema
        )

    with arrow.parquet.ParquetWriter(path, schema) as writer:
        waiting: list[Any] = []
        for part in parts:
            waiting.append(table(part))
            if sum(map(len, waiting)) >= _ROW_GROUP or part == parts[-1]:
                writer.write_table(arrow.concat_tables(waiting))
                waiting = []


def _about(path: Path) -> dict[str, Any]:
    """A file's settings alone. Raises: DataError: it is no file of features."""
    try:
        if path.suffix == ".npz":
            text = str(_column(path, "about"))
        else:
            text = _parquet().parquet.read_schema(path).metadata[b"deit_models"].decode()
        about: dict[str, Any] = json.loads(text)
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no file of features that embed wrote: {first_line(error)}") from error
    return about


def load_features(path: str | PathLike[str]) -> Embeddings:
    """Read a file that `Classifier.embed_files` or `deit-models embed` wrote.

    Raises: DataError: it is no such file. MissingExtraError: Parquet without pyarrow.
    """
    place = Path(path)
    about = _about(place)
    if place.suffix == ".npz":
        with np.load(place) as arrays:
            rows, *texts = (arrays[name] for name in arrays if name != "about")
        names = [text.tolist() for text in texts]
    else:
        table = _parquet().parquet.read_table(place)
        rows = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        names = [table.column(name).to_pylist() for name in table.column_names[1:]]
    embeddings = torch.from_numpy(np.array(rows)).reshape(-1, about["width"])
    return Embeddings(embeddings, tuple(names[0]), tuple(names[1]) if names[1:] else None, about)


# Retrieval


def nearest_neighbours(embeddings: Tensor, queries: Tensor | None = None, *, k: int = 10) -> tuple[Tensor, Tensor]:
    """Cosine similarities and numbers of the `k` rows most similar to each query, the most similar first; (Q, k) each.

    Args:
        embeddings: (N, D), of any floating-point type.
        queries: (Q, D); default: each row, compared with all others.
        k: how many to find; all, if there are fewer.

    Beside the embeddings in float32, memory does not grow with their number. Raises: ConfigError: k below 1, wrong
    shapes, nothing to find.
    """
    found = len(embeddings) - (queries is None)
    if k < 1 or found < 1:
        raise ConfigError(f"k={k}, {len(embeddings)} embeddings; expected 1 or more, and others to find")
    tops = [chunk.topk(min(k, found)) for _, chunk in _similarities(embeddings, queries)]
    return torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])


def _similarities(embeddings: Tensor, queries: Tensor | None) -> Iterator[tuple[range, Tensor]]:
    """Some queries and their cosines (chunk, N); without `queries` -inf for each row and itself."""
    asked = embeddings if queries is None else queries
    if embeddings.ndim != 2 or asked.ndim != 2 or embeddings.shape[1] != asked.shape[1]:
        raise ConfigError(f"shapes {tuple(embeddings.shape)} and {tuple(asked.shape)}; expected (N, D) and (Q, D)")
    rows = F.normalize(embeddings.float(), dim=1)
    size = max(_SIMILARITIES // max(len(rows), 1), 1)
    for start in range(0, len(asked), size):
        chunk = F.normalize(asked[start : start + size].float(), dim=1) @ rows.T
        numbers = range(start, start + len(chunk))
        if queries is None:
            chunk[range(len(chunk)), numbers] = -torch.inf
        yield numbers, chunk


class Retrieval(NamedTuple):
    """Quality of retrieval: each image is a query against all others.

    Attributes:
        recall: for each k the percent of queries with an image of their class among the k nearest.
        mean_average_precision: in percent, the mean over queries of the average precision of the whole ranking: of the
            precision at the place of each other image of the query's class.
        queries: images with another of their class. Images without are found, but not asked for.
    """

    recall: dict[int, float]
    mean_average_precision: float
    queries: int


def retrieval(embeddings: Tensor, labels: Sequence[Any], *, ks: Sequence[int] = (1, 5, 10)) -> Retrieval:
    """Score embeddings (N, D) by retrieval of images of the same class, by cosine; of equals, the first comes first.

    Source: recall@k as in Training Vision Transformers for Image Retrieval, El-Nouby et al. 2021, which builds on DeiT.
    Raises: ConfigError: a label is missing, k below 1. DataError: no class with two images.
    """
    numbers = _label_numbers(labels, len(embeddings))
    others = torch.bincount(numbers)[numbers] - 1
    if not ks or min(ks) < 1:
        raise ConfigError(f"ks={tuple(ks)}; expected numbers of neighbours, 1 or more")
    if not (others > 0).any():
        raise DataError(f"{len(numbers)} images, no two of one class: there is nothing to retrieve")
    firsts, precisions = [], []
    for asked, chunk in _similarities(embeddings, None):
        order = chunk.argsort(dim=1, descending=True, stable=True)[:, :-1].cpu()  # the query itself comes last
        hits = numbers[order] == numbers[asked, None]
        precision = hits.cumsum(1) / torch.arange(1, len(numbers))
        firsts.append(hits.float().argmax(1) + 1)
        precisions.append((precision * hits).sum(1) / others[asked])
    first, precision = torch.cat(firsts)[others > 0], torch.cat(precisions)[others > 0]
    recall = {k: 100 * float((first <= k).double().mean()) for k in ks}
    return Retrieval(recall, 100 * float(precision.double().mean()), len(first))


def knn_accuracy(
    embeddings: Tensor,
    labels: Sequence[Any],
    queries: Tensor | None = None,
    query_labels: Sequence[Any] = (),
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Percent of queries whose class wins the vote of their `k` nearest neighbours, exp(cosine / temperature) each.

    Without queries each image is classified by all others. Source: DINO, Caron et al. 2021, its k and temperature.
    Raises: ConfigError: a label is missing, a temperature of 0 or below, see also `nearest_neighbours`.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature}; expected above 0")
    similarity, found = nearest_neighbours(embeddings, queries, k=k)
    total = len(embeddings) + (0 if queries is None else len(queries))
    numbers = _label_numbers([*labels, *query_labels], total)
    weights = ((similarity - 1) / temperature).exp()  # as 1 is the largest cosine: the same winner, no overflow
    votes = torch.zeros(len(found), int(numbers.max()) + 1).scatter_add_(1, numbers[found.cpu()], weights.cpu())
    return 100 * float((votes.argmax(1) == numbers[-len(found) :]).double().mean())


def _label_numbers(labels: Sequence[Any], count: int) -> Tensor:
    """Labels of any kind as numbers from 0, (N,) int64. Raises: ConfigError: there are not so many."""
    if len(labels) != count:
        raise ConfigError(f"{len(labels)} labels of {count} embeddings; expected one for each")
    seen: dict[Any, int] = {}
    values = (label.item() if hasattr(label, "item") else label for label in labels)
    return torch.tensor([seen.setdefault(label, len(seen)) for label in values], dtype=torch.int64)
