"""A weights file read safely, and compared with the model it is said to be: tensors, and recorded logits."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, first_line
from ..files import check_digest, read_json, sha256_of, write_json, write_tensors
from ..formats.family import Mapped
from ..models.layers import ImageClassifier
from . import fetch
from .fetch import Access

logger = logging.getLogger(__name__)
_unpickling = threading.Lock()

PICKLE_SUFFIXES = {".pth", ".pt", ".bin", ".tar"}
# Keys of the state dict in training scripts' files; averaged weights first, because accuracies were measured with them.
PAYLOAD_KEYS = ("state_dict_ema", "model_ema", "model", "state_dict", "net")
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


# Errors of torch's unpickler for damaged bytes; BadZipFile is derived from none of the others.
_UNPICKLING_ERRORS: tuple[type[Exception], ...] = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError)
_UNPICKLING_ERRORS += (AttributeError, AssertionError, ArithmeticError, struct.error, zipfile.BadZipFile)


def read_tensors(
    path: Path, access: Access, *, source: str, digest: str | None = None, payload: str | None = None
) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a weights file, memory-mapped, and its SHA-256 where it was computed.

    A pickle is read with `weights_only=True` and converted to safetensors in the cache, once: later loads map the copy.
    A cached download that fails its digest is removed, so that the next load fetches it anew.

    Args:
        path: the file; its suffix tells a pickle from safetensors.
        access: where the cache is.
        source: where the file came from, for messages.
        digest: the leading digits of its SHA-256, where known.
        payload: the key of the state dict in a pickle, where known.

    Raises: CheckpointError: not a weights file, damaged, or a pickle that holds more than tensors.
        IntegrityError: the digest differs.
    """
    try:
        actual = check_digest(path, digest, name=source)
    except CheckpointError:
        fetch.forget(path, access)
        raise
    if path.suffix in PICKLE_SUFFIXES:
        actual = actual or sha256_of(path)
        return _read_pickle(path, access, source=source, digest=actual, payload=payload), actual
    return _read_safetensors(path), actual


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
        what = "a web page, not weights" if start.startswith((b"<!doctype", b"<html")) else "truncated or damaged"
        raise CheckpointError(f"{path} is {what} ({error})") from error


def _read_pickle(path: Path, access: Access, *, source: str, digest: str, payload: str | None) -> dict[str, Tensor]:
    converted = fetch.assets_dir("converted", access) / f"{digest}-{payload or 'auto'}.safetensors"
    record = converted.with_suffix(".json")
    if converted.is_file() and record.is_file():
        try:
            check_digest(converted, read_json(record)["sha256"])
            return _read_safetensors(converted)
        except (CheckpointError, LookupError, AttributeError, TypeError) as error:
            logger.warning("%s; converting %s again", error, path)
    tensors = unpickle_tensors(path, payload=payload)
    write_tensors(converted, tensors)
    write_json(record, {"source": source, "source_sha256": digest, "sha256": sha256_of(converted)})
    return _read_safetensors(converted)


def unpickle_tensors(path: Path, *, payload: str | None = None) -> dict[str, Tensor]:
    """The state dict of a `.pth`, read without running any code of it.

    Args:
        path: the file; beside tensors it may hold plain values and an `argparse.Namespace`, as training scripts save.
        payload: the key of the state dict; the usual ones are tried if not given.

    Raises: CheckpointError: truncated, holds other objects, or no state dict where expected.
    """
    try:
        # torch's list of allowed classes is one for all threads
        with _unpickling, torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a pickle that holds {foreign[1]}, not only tensors" if foreign else "damaged, or not a torch file"
        raise CheckpointError(f"{path} is refused: {what}") from error
    except _UNPICKLING_ERRORS as error:
        raise CheckpointError(f"{path} is truncated or damaged ({first_line(error)})") from error
    keys = (payload,) if payload is not None else PAYLOAD_KEYS
    state = next((data[key] for key in keys if isinstance(data, dict) and isinstance(data.get(key), Mapping)), data)
    if not isinstance(state, Mapping) or (payload is not None and state is data):
        raise CheckpointError(f"{path} has no state dict under {' or '.join(map(repr, keys))}")
    tensors = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors under {', '.join(map(repr, keys))} nor at its top")
    # contiguous and unshared, as safetensors demands
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


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
        if expected[name].is_floating_point() and not tensor.is_floating_point()
    ]
    problems = {"missing": mapped.missing, "unexpected": mapped.unexpected}
    problems |= {"wrong shape": shapes, "not floating point": types}
    if most := {0: 0, 1: 6}.get(sum(map(bool, problems.values())), 2):  # a message has room for so many names
        listings = (_listing(problem, entries, most=most) for problem, entries in problems.items() if entries)
        raise CheckpointError("not the weights of this model: " + "; ".join(listings))
    not_finite = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if not_finite:
        raise CheckpointError("damaged weights: " + _listing("NaN or infinity in", not_finite))
    return tensors


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
