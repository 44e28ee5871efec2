"""A weights file read safely, and compared with the model it is said to be: tensors, and recorded logits."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, first_line
from ..files import check_digest, check_regular, read_json, sha256_of, write_json, write_tensors
from ..formats.family import Mapped
from ..models.layers import ImageClassifier
from . import fetch
from .fetch import Access
from .payload import Expected, choose
from .pickles import other_kind, unpickle

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.json"
_SHARDS = (".safetensors", ".bin")
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_DTYPES = FLOATS | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_MOST_HEADER_BYTES, _SMALL_BYTES = 16 << 20, 64 << 20
REFERENCE_TOLERANCE = 1e-3


def reference_input(config: Any) -> Tensor:
    """The fixed image of the recorded logits: waves of different length per channel, (1, C, H, W) float32."""
    height, width = config.image_hw
    rows, columns = torch.arange(height).float()[:, None], torch.arange(width).float()[None, :]
    return torch.stack([torch.sin(rows * (0.05 + 0.03 * c) + columns * 0.07 + c) for c in range(config.in_chans)])[None]


@torch.inference_mode()
def reference_logits(model: ImageClassifier, count: int) -> Tensor:
    """The first `count` logits for `reference_input`, in eval mode; the model's mode is left as it was."""
    training = model.training
    logits: Tensor = model.eval()(reference_input(model.config).to(next(model.parameters())))[0, :count]
    model.train(training)
    return logits.float().cpu()


def check_reference(model: ImageClassifier, expected: tuple[float, ...]) -> None:
    """Compare the first logits for `reference_input` with recorded ones.

    Raises: CheckpointError: they differ by more than REFERENCE_TOLERANCE; the weights are not the published ones.
    """
    difference = float((reference_logits(model, len(expected)) - torch.tensor(expected)).abs().max())
    if not difference <= REFERENCE_TOLERANCE:
        raise CheckpointError(f"logits differ from the recorded ones by {difference:.3g}; not the published weights")


def read_tensors(
    path: Path,
    access: Access,
    *,
    source: str,
    digest: str | None = None,
    payload: str | None = None,
    expected: Expected | None = None,
) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a weights file, memory-mapped, and its SHA-256 where it was computed.

    The format is told from the content. A pickle is read with `weights_only=True` and converted to safetensors in the
    cache, once: later loads map the copy. A cached download that fails its digest is removed, so that the next load
    fetches it anew.

    Args:
        path: the file, or the index of several files beside it.
        access: where the cache is.
        source: where the file came from, for messages.
        digest: the leading digits of its SHA-256, where known.
        payload: the key of the state dict, where known.
        expected: the model, by which its state dict is found among others.

    Raises: CheckpointError: not a weights file, damaged, or a pickle that holds more than tensors.
        IntegrityError: the digest differs.
    """
    check_regular(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _chosen(path, _read_shards(path, access), payload, expected), None
    actual = _checked_digest(path, digest, access, source=source)
    if _is_safetensors(path):
        return _chosen(path, _read_safetensors(path), payload, expected), actual
    actual = actual or sha256_of(path)
    return _read_pickle(path, access, source=source, digest=actual, payload=payload, expected=expected), actual


def read_uncached(path: Path, expected: Expected) -> dict[str, Tensor]:
    """The tensors of any weights file, without a converted copy. Raises: CheckpointError: as `read_tensors`."""
    check_regular(path)
    if _is_safetensors(path):
        return _chosen(path, _read_safetensors(path), None, expected)
    return unpickle_tensors(path, expected=expected)


def _checked_digest(path: Path, digest: str | None, access: Access, *, source: str) -> str | None:
    try:
        return check_digest(path, digest, name=source)
    except CheckpointError:
        fetch.forget(path, access)
        raise


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < _MOST_HEADER_BYTES:
        return True
    pickled = start.startswith((b"PK", b"\x80"))
    return path.suffix.lower() == ".safetensors" and not pickled  # then its damage is to be named


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        _check_header(path)
        return load_file(path)
    except Exception as error:  # whatever its reader makes of any bytes
        what = other_kind(path) or f"truncated or damaged ({first_line(error)})"
        raise CheckpointError(f"{path} is {what}") from error


def _check_header(path: Path) -> None:
    """Raises: ValueError: it does not begin with a header, or one that names a tensor twice, of which one is lost."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MOST_HEADER_BYTES:
            raise ValueError("header too large")
        header = file.read(size)
    json.loads(header, object_pairs_hook=_without_twins)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("one name twice in its header")
    return table


def shard_names(index: Path) -> list[str]:
    """The files that an index names, beside it. Raises: CheckpointError: not an index, or a path out of the folder."""
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor by its name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map; expected a file's name for each tensor")
    for name in sorted(set(weight_map.values())):
        if name != PurePosixPath(name).name or "\\" in name or ":" in name or not name.endswith(_SHARDS):
            raise CheckpointError(f"{index} names {name!a:.80}; expected weights files in its own folder")
    return weight_map


def _read_shards(index: Path, access: Access) -> dict[str, Tensor]:
    weight_map = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.with_name(name)
        if not shard.is_file():
            raise CheckpointError(f"{index} names {name}, which is not beside it; fetch all of its files")
        _checked_digest(shard, fetch.etag_digest(shard), access, source=str(shard))
        part = _read_safetensors(shard) if _is_safetensors(shard) else _copies(shard, _table_of_tensors(shard))
        if part.keys() != {tensor for tensor, file in weight_map.items() if file == name}:
            raise CheckpointError(f"{shard} does not hold the tensors that {index.name} names; they are of two models")
        tensors |= part
    return tensors


def _read_pickle(
    path: Path, access: Access, *, source: str, digest: str, payload: str | None, expected: Expected | None
) -> dict[str, Tensor]:
    choice = f"{payload!a} {expected and expected.key}"
    name = f"{digest}-{hashlib.sha256(choice.encode()).hexdigest()[:16]}.safetensors"
    converted = fetch.assets_dir("converted", access) / name
    record = converted.with_suffix(".json")
    if converted.is_file() and record.is_file():
        try:
            facts = read_json(record)
            check_digest(converted, facts["sha256"])
            tensors = _read_safetensors(converted)
        except (CheckpointError, LookupError, AttributeError, TypeError) as error:
            logger.warning("%s; converting %s again", error, path)
        else:
            _tell(facts.get("note"))
            return tensors
    tensors, note = _unpickled(path, payload, expected)
    write_tensors(converted, tensors)
    facts = {"source": source, "source_sha256": digest, "sha256": sha256_of(converted)}
    write_json(record, facts if note is None else facts | {"note": note})
    _tell(note)
    return _read_safetensors(converted)


def unpickle_tensors(path: Path, *, payload: str | None = None, expected: Expected | None = None) -> dict[str, Tensor]:
    """The state dict of a `.pth`, read without running any code of it.

    Args:
        path: the file; beside tensors it may hold plain values and harmless objects, as training scripts save.
        payload: the key of the state dict, with dots between nested ones.
        expected: the model, by which its state dict is found among others.

    Raises: CheckpointError: truncated, holds other objects, or no state dict where expected.
    """
    tensors, note = _unpickled(path, payload, expected)
    _tell(note)
    return tensors


def _unpickled(path: Path, payload: str | None, expected: Expected | None) -> tuple[dict[str, Tensor], str | None]:
    tensors, note = choose(path, unpickle(path), expected, payload)
    return _copies(path, tensors), note


def _table_of_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one of several pickles, under the very names of their index."""
    data = unpickle(path)
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        raise CheckpointError(f"{path} is no table of tensors")
    return {name: value for name, value in data.items() if isinstance(value, Tensor)}


def _copies(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors contiguous and unshared, as safetensors demands. Raises: CheckpointError: of other kinds, or inflated."""
    _check_kinds(path, tensors)
    total = sum(torch.numel(tensor) * tensor.dtype.itemsize for tensor in tensors.values())
    if total > 2 * path.stat().st_size + _SMALL_BYTES:
        raise CheckpointError(f"{path} is refused: {path.stat().st_size} bytes whose tensors would take {total}")
    try:
        dense = torch.contiguous_format
        return {name: torch.clone(tensor.data, memory_format=dense) for name, tensor in tensors.items()}
    except (RuntimeError, TypeError, MemoryError) as error:
        raise CheckpointError(f"{path} holds tensors that cannot be read ({first_line(error)})") from error


def _chosen(
    path: Path, tensors: dict[str, Tensor], payload: str | None, expected: Expected | None
) -> dict[str, Tensor]:
    chosen = choose(path, tensors, expected, payload)
    _check_kinds(path, chosen.tensors)
    _tell(chosen.note)
    return chosen.tensors


def _tell(note: Any) -> None:
    if isinstance(note, str):
        logger.warning("%s", note)


def _check_kinds(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises: CheckpointError: a tensor that is not a plain table of common numbers, or has no proper name."""
    for name, tensor in tensors.items():
        if not name.isprintable():  # surrogates, which no other file can hold, are not either
            raise CheckpointError(f"{path} holds a tensor with the name {name!a:.80}, which is no name of a weight")
        kind = None
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        elif tensor.is_meta or tensor.dtype not in _DTYPES:
            kind = "without values (meta)" if tensor.is_meta else str(tensor.dtype).removeprefix("torch.")
        if kind is not None:
            raise CheckpointError(f"{path}: {name[:80]} is {kind}; expected plain tensors of 16, 32 or 64-bit floats")


def verified_state(mapped: Mapped, model: nn.Module, *, made_for: Any = None) -> dict[str, Tensor]:
    """Native tensors, fitted to the model and compared with it.

    Args:
        mapped: the tensors of a file.
        model: the model they are said to be of.
        made_for: their config, if the model's is of another size or other classes: then positions are resized, and
            heads of other classes are left out.

    Raises: CheckpointError: names missing or unexpected, a wrong shape, whole numbers in the place of others, or NaN
        or infinity inside. All mismatches are listed in one message.
    """
    expected, tensors = model.state_dict(), mapped.tensors
    comparable = True
    if isinstance(model, ImageClassifier) and made_for not in (None, model.config):
        comparable = not (mapped.missing or mapped.uneven)
        tensors = _fitted(tensors, model, made_for) if comparable else tensors
    shapes = mapped.uneven + [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if comparable and tensor.shape != expected[name].shape
    ]
    types = [
        f"{name} is {tensor.dtype}"
        for name, tensor in tensors.items()
        if name in expected and expected[name].is_floating_point() and not tensor.is_floating_point()
    ]
    counts = {name: t for name, t in tensors.items() if name in expected and not expected[name].is_floating_point()}
    uncounted = [name for name, t in counts.items() if not torch.equal(t, t.long().to(t.dtype))]
    problems = {"unexpected": mapped.unexpected, "missing": mapped.missing}
    problems |= {"wrong shape": shapes, "not floating point": types, "not whole": uncounted}
    if most := {0: 0, 1: 6}.get(sum(map(bool, problems.values())), 2):  # a message has room for so many names
        listings = (_listing(problem, entries, most=most) for problem, entries in problems.items() if entries)
        raise CheckpointError("not the weights of this model: " + "; ".join(listings))
    not_finite = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if not_finite:
        raise CheckpointError("damaged weights: " + _listing("NaN or infinity in", not_finite))
    variances = [name for name, tensor in tensors.items() if name.endswith("running_var") and float(tensor.amin()) < 0]
    if variances:
        raise CheckpointError("damaged weights: " + _listing("negative variance in", variances))
    return tensors | {name: tensor.to(expected[name].dtype) for name, tensor in counts.items()}


def check_range(model: nn.Module, dtype: torch.dtype) -> None:
    """Raises: CheckpointError: weights that are finite now and would not be in the wanted type."""
    most = torch.finfo(dtype).max
    parts = [(name, t) for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()]
    beyond = [name for name, t in parts if torch.finfo(t.dtype).max > most and float(t.abs().max()) > most]
    if beyond:
        raise CheckpointError(_listing(f"beyond the range of {dtype}", beyond) + "; pass another dtype")


def _fitted(tensors: dict[str, Tensor], model: ImageClassifier, made_for: Any) -> dict[str, Tensor]:
    try:
        tensors = model.fit_state(tensors, made_for)
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"positions of a wrong shape for img_size={made_for.img_size}: {error}") from error
    if made_for.num_classes != model.num_classes:
        tensors = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in model.head_names}
    return tensors


def _finite(tensor: Tensor) -> bool:
    # The extremes carry a NaN or an infinity out without a mask the size of the tensor.
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())


def _listing(problem: str, entries: list[str], *, most: int = 6) -> str:
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return f"{len(entries)} {problem}: {', '.join(entries[:most])}{more}"
