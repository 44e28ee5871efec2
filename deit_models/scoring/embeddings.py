"""Embeddings of many images: files of features, retrieval, the vote of the nearest neighbours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batches.inputs import eval_batches
from ..batches.loading import DamageCount, Watch, explained_worker_failure, plain_watch, workers_beside
from ..data.datasets import open_images
from ..data.records import ImageRecords, some
from ..data.sources import ImageSources
from ..distributed import Process, join_processes
from ..errors import ConfigError, DataError, MissingExtraError, first_line
from ..files import digest_of_names
from ..images.transforms import EvalTransform, preprocessing_of
from ..models.layers import ImageClassifier
from ..recipes.recipe import Precision
from ..registry import own_model
from .evaluation import autocast, eval_mode, evaluate, resolved_precision
from .outcomes import Evaluation
from .parts import Parts, about_of, check_same_run, column, join_columns, texts

_KIND = "features that embed wrote"
_ROW_GROUP = 16_384
_QUERIES = 1024
"""Queries whose votes are counted at once."""
_SIMILARITIES = 1 << 22
"""Numbers of a matrix of similarities, at most: 16 MiB."""


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
        arrays = {"embeddings": vectors.to(kind).numpy(), "paths": texts(name for _, name, _ in known)}
        if labelled:
            arrays["labels"] = texts(label(i) for i, *_ in known)
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


def _join(path: Path, parts: Sequence[Path], errors: list[str], *, run: Mapping[str, Any], suffix: str) -> None:
    """Write the parts as one file, with the memory of a few of them."""
    with np.load(parts[0]) as arrays:
        names = list(arrays)
    about = json.dumps({**run, "unreadable": errors})
    if suffix == ".npz":
        join_columns(path, parts, names, about, run["images"] - len(errors))
    else:
        _join_as_parquet(path, parts, names, about)


def _join_as_parquet(path: Path, parts: Sequence[Path], names: Sequence[str], about: str) -> None:
    arrow = _parquet()
    first = column(parts[0], "embeddings")
    vector = arrow.list_(arrow.from_numpy_dtype(first.dtype), first.shape[1])
    fields = [(name.removesuffix("s"), vector if name == "embeddings" else arrow.string()) for name in names]
    schema = arrow.schema(fields, metadata={"deit_models": about})

    def table(part: Path) -> Any:
        rows, *texts = (column(part, name) for name in names)
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
    if path.suffix == ".npz":
        return about_of(path, _KIND)
    try:
        about: dict[str, Any] = json.loads(_parquet().parquet.read_schema(path).metadata[b"deit_models"].decode())
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{path} is no file of {_KIND}: {first_line(error)}") from error
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
    _check_temperature(temperature)
    similarity, found = nearest_neighbours(embeddings, queries, k=k)
    total = len(embeddings) + (0 if queries is None else len(queries))
    numbers = _label_numbers([*labels, *query_labels], total)
    right, wanted, classes = 0, numbers[-len(found) :], int(numbers.max()) + 1
    for start in range(0, len(found), _QUERIES):  # of a thousand classes, the votes of all queries are large
        part = slice(start, start + _QUERIES)
        votes = _votes(similarity[part].cpu(), numbers[found[part].cpu()], classes, temperature)
        right += int((votes.argmax(1) == wanted[part]).sum())
    return 100 * right / len(found)


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature}; expected above 0")


def _votes(similarity: Tensor, classes: Tensor, count: int, temperature: float) -> Tensor:
    """Votes (Q, count) of neighbours, by their similarities and classes, (Q, k) each."""
    weights = ((similarity - 1) / temperature).exp()  # as 1 is the largest cosine: the same winner, no overflow
    return weights.new_zeros(len(weights), count).scatter_add_(1, classes, weights)


class KnnClassifier(nn.Module):
    """The nearest neighbours of a model's features as a classifier: (B, C, H, W) -> (B, K), logarithms of vote shares.

    `embeddings` (N, D) are those of training images, `labels` (N,) their classes from 0; see `knn_accuracy`.
    """

    embeddings: Tensor
    labels: Tensor

    def __init__(
        self,
        model: ImageClassifier,
        embeddings: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        k: int = 20,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.backbone, self.k, self.temperature, self.num_classes = model, k, temperature, num_classes
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor) -> Tensor:
        """Classify x; a class without votes gets a share of 1e-12."""
        rows = self.backbone.embed(x)
        with torch.autocast(x.device.type, enabled=False):
            similarity, found = nearest_neighbours(self.embeddings, rows, k=self.k)
            votes = _votes(similarity, self.labels[found], self.num_classes, self.temperature)
        return (votes / votes.sum(1, keepdim=True)).clamp(min=1e-12).log()


def evaluate_knn(
    model: nn.Module,
    train: Any,
    data: Any,
    *,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 256,
    workers: int | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "float32",
    transform: EvalTransform | None = None,
    corrupt_limit: float = 0.01,
    watch: Watch = plain_watch,
) -> Evaluation:
    """Score a model's features without a head: the nearest images of `train` classify `data`, see `knn_accuracy`.

    Both are a folder or the name of a data set, or a Dataset, with one class an image; classes are matched by name, and
    `train` may have more. No image is augmented. Memory holds the embeddings of `train`. The other arguments are those
    of `evaluate`, the loss is that of the shares of votes.

    Raises: ConfigError: several labels an image, see also `knn_accuracy`. DataError: images missing or damaged, or
        classes that `train` lacks.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "corrupt_limit": corrupt_limit, "watch": watch}
    with join_processes(device) as process:
        backbone: ImageClassifier = own_model(model).to(process.device)
        known, records = open_images(train, "train"), open_images(data, "val")
        if known.multi_label or records.multi_label:
            raise ConfigError("k-NN accuracy is of one class an image; these images have several labels")
        if lacking := sorted({*records.classes} - {*known.classes}):
            raise DataError(f"{known.name}, the training images, lack classes of {records.name}: {some(lacking)}")
        options |= {"transform": transform or EvalTransform(preprocessing_of(backbone))}
        options |= {"precision": resolved_precision(precision, process)}
        options |= {"workers": workers_beside(process.device, workers)}
        rows, labels = _embedded(backbone, known, process, **options)
        places = {name: number for number, name in enumerate(dict.fromkeys([*records.classes, *known.classes]))}
        labels = torch.tensor([places[name] for name in known.classes])[labels]
        voters = KnnClassifier(backbone, rows, labels, num_classes=len(places), k=k, temperature=temperature)
        return evaluate(voters, records, device=process.device, **options)


@torch.inference_mode()
def _embedded(
    model: ImageClassifier,
    records: ImageRecords,
    process: Process,
    *,
    transform: EvalTransform,
    batch_size: int,
    workers: int,
    precision: Precision,
    corrupt_limit: float,
    watch: Watch,
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) float32 and labels (N,) of the images that can be read, of all processes, on the CPU."""
    damage, rows, labels = DamageCount(records, corrupt_limit), [], []
    batches = eval_batches(records, transform, process, batch_size=batch_size, workers=workers)
    with explained_worker_failure(workers), eval_mode(model), autocast(process.device, precision):
        for images, numbers, failures in watch(batches, len(batches)):
            damage.add(failures)
            rows.append(model.embed(images.to(process.device, non_blocking=True)).float().cpu())
            labels.append(numbers.cpu())
    damage.meet(process)
    shares = [share for share in process.gather((rows, labels)) if share[0]]
    found = torch.cat([part for _, share in shares for part in share])
    return torch.cat([part for share, _ in shares for part in share])[found >= 0], found[found >= 0]


def _label_numbers(labels: Sequence[Any], count: int) -> Tensor:
    """Labels of any kind as numbers from 0, (N,) int64. Raises: ConfigError: there are not so many."""
    if len(labels) != count:
        raise ConfigError(f"{len(labels)} labels of {count} embeddings; expected one for each")
    seen: dict[Any, int] = {}
    values = (label.item() if hasattr(label, "item") else label for label in labels)
    return torch.tensor([seen.setdefault(label, len(seen)) for label in values], dtype=torch.int64)
