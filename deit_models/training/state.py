"""The files of a run: log.jsonl and its curves, folders of exported models, and last.pt, the state to resume from.

Each is written whole or not at all. Random numbers need no saving: every epoch seeds its generators from (seed, epoch,
process), and every sample from (seed, epoch, place in the epoch).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..data.records import ImageRecords
from ..distributed import Process
from ..errors import TrainingError, first_line
from ..files import append_text, atomic_write, digest_of_numbers, read_text, write_tensors, write_text
from ..formats.layouts import CARD_NAME
from ..models.layers import ImageClassifier
from ..recipes.recipe import Recipe, recipe_from_toml
from ..scoring.metrics import in_words
from ..trackers import Trackers
from .learner import Learner, TokenHeads

logger = logging.getLogger(__name__)

LOG_NAME, STATE_NAME, WEIGHTS_NAME = "log.jsonl", "last.pt", "model.safetensors"
MODEL_FOLDERS = ("model", "best", "ema")
"""The last weights of a run, those of its best epoch, and the averaged ones."""


class RunLog:
    """Appends a row for each epoch to `log.jsonl` in a folder, and reads them back.

    Args:
        out: the folder.
        first_epoch: rows of this epoch and later ones, left by an interrupted run, are dropped.
        writes: whether this process writes at all.
        trackers: get every row, too, those of earlier epochs if they lack them.

    Raises: SaveError: no space or no permission. TrainingError: the folder's log is damaged.
    """

    def __init__(self, out: Path, *, first_epoch: int, writes: bool, trackers: Trackers | None = None) -> None:
        self.path = out / LOG_NAME
        self.rows = [row for row in read_log(self.path, {"epoch": int}) if row["epoch"] < first_epoch]
        self._writes = writes
        self._trackers = trackers
        self._size = 0
        if writes:
            write_text(self.path, "".join(map(_line, self.rows)))
            self._size = self.path.stat().st_size
        for row in self.rows:
            self._report(row)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; it has an `epoch`.

        Raises: SaveError: no space or no permission. TrainingError: another run has written into the file.
        """
        self.rows.append(row)
        if self._writes:
            if self.path.exists() and self.path.stat().st_size != self._size:
                raise TrainingError(f"another run writes into {self.path.parent}; end one of them, or use two folders")
            append_text(self.path, _line(row))
            self._size = self.path.stat().st_size
        self._report(row)

    def _report(self, row: dict[str, Any]) -> None:
        if self._trackers is not None:
            self._trackers.add(row, row["epoch"])


def read_log(path: Path, kinds: Mapping[str, type] | None = None) -> list[dict[str, Any]]:
    """The complete rows of a log; a last line that a killed process left unfinished is dropped.

    Raises: TrainingError: not a log, or a row without a field of `kinds`, which gives their types.
    """
    rows: list[dict[str, Any]] = []
    lines = read_text(path, error=TrainingError).split("\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no table")
            if wrong := [name for name, kind in (kinds or {}).items() if not isinstance(row.get(name), kind)]:
                raise ValueError(f"no {wrong[0]}")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            text = f"{path}, line {number} is not a row of this log: {first_line(error)}"
            raise TrainingError(f"{text}; mend or remove the file, or use a new folder") from error
        rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _whole_state(model: nn.Module, *, divided: bool) -> dict[str, Any]:
    """The state dict of a model; parameters that are divided between processes are joined, on the CPU."""
    return dict(get_model_state_dict(model, options=_FULL)) if divided else model.state_dict()


def export_model(
    model: nn.Module,
    folder: Path,
    process: Process,
    *,
    divided: bool,
    records: ImageRecords,
    accuracy: Mapping[str, float | None],
    thresholds: tuple[float, ...] | None = None,
) -> None:
    """Write a model in training into `folder`; called by every process, written by the first.

    `from_pretrained` reads our models back, with the class names and name of `records`, which they were trained on, and
    the validation figures in `accuracy`, in percent, where known, see `FIGURES`. `thresholds` are those of several
    labels. Of any other module the state dict is written, as `model.safetensors`. `divided`: each process holds only a
    part of the parameters.

    Raises: SaveError: no space or no permission.
    """
    state = _whole_state(model, divided=divided)
    if process.is_main:
        if isinstance(model, ImageClassifier) and model.origin is not None:
            one = {} if records.multi_label else {name: accuracy.get(name) for name in ("top1", "top5")}
            others = in_words({name: value for name, value in accuracy.items() if name not in one})
            model.origin = model.origin.trained(
                records.name,
                class_names=records.classes,
                multi_label=records.multi_label,
                thresholds=thresholds,
                notes=f"On the validation images: {others}." if others else None,
                **one,
            )
            # save_pretrained would keep the card of an earlier epoch, with its accuracy
            (folder / CARD_NAME).unlink(missing_ok=True)
            (_rebuilt(model, state) if divided else model).save_pretrained(folder)
        else:
            # copies, because safetensors refuses weights that two layers share
            write_tensors(folder / WEIGHTS_NAME, {name: tensor.clone().contiguous() for name, tensor in state.items()})
    process.wait_for_all()


def _rebuilt(model: ImageClassifier, state: dict[str, Any]) -> ImageClassifier:
    """An undivided copy of a model whose parameters are divided between processes."""
    whole = type(model)(model.config)
    whole.load_state_dict(state)
    whole.origin = model.origin
    return whole


_FORMAT = 1
_MAY_CHANGE = {"eval_every", "save_every", "compile", "grad_checkpointing", "precision", "accumulate"}
"""Recipe fields that change the last weights of a run by no more than rounding; and `accumulate`, which a machine with
less memory may need, although it decides which images are mixed with each other."""


def _goes_on(name: str, before: Any, now: Any, *, done: int) -> bool:
    """Whether a run may go on with another value.

    It may with a field that changes little, with more images of the same classes, and with more epochs, or fewer than
    are `done`.
    """
    if name in _MAY_CHANGE:
        return True
    if name == "epochs":
        return bool(now > before or now <= done)
    (images, classes), (more, same) = (str(value).partition(" ")[::2] for value in (before, now))
    return name == "data" and classes == same and images.isdecimal() and int(more) > int(images)


@dataclass(slots=True)
class Progress:
    """Position of a run.

    Attributes:
        epoch: the next epoch to run, from 0.
        best_top1: the best validation accuracy so far in percent, or another figure, see `choosing_figure`; below 0
            before the first evaluation.
        best_epoch: the epoch it was reached in; -1 before the first evaluation.
        unreadable: numbers of the training images that could not be read so far.
        thresholds: of several labels an image, from the last evaluation, by the prefix of the weights' figures.
    """

    epoch: int = 0
    best_top1: float = -1.0
    best_epoch: int = -1
    unreadable: list[int] = field(default_factory=list)
    thresholds: dict[str, tuple[float, ...]] = field(default_factory=dict)


def identity_of(learner: Learner, records: ImageRecords) -> dict[str, str]:
    """Fingerprint of a run; it must match to resume: model, data, teacher, label maps, trained parameters, sharding."""
    model, teacher, classes = learner.bare.model, learner.teacher, records.classes
    names = hashlib.sha256("\0".join(classes).encode()).hexdigest()[:8]
    identity = {
        "model": str(model.config) if isinstance(model, ImageClassifier) else type(model).__name__,
        "data": f"{len(records)} images in {len(classes)} {'labels' if records.multi_label else 'classes'} ({names})",
    }
    if teacher is not None:
        network = getattr(teacher.network, "__qualname__", type(teacher.network).__name__)
        identity["teacher"] = f"{network} for {teacher.img_size or 'any'} pixels ({digest_of_numbers(teacher)})"
    if learner.mixing.tokens is not None:
        identity["label_maps"] = str(learner.mixing.tokens.maps)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if len(trained) < len(list(model.parameters())):
        identity["trained"] = f"{trained[0]} and {len(trained) - 1} more tensors"
    # a divided optimiser is saved under other names
    return identity | ({"shard": "fsdp"} if learner.divided else {})


def save_state(out: Path, learner: Learner, progress: Progress, *, run: dict[str, str]) -> None:
    """Write the state of a run into `out`; called by every process, written by the first. `run`: see `identity_of`.

    Raises: SaveError: no space or no permission; the previous state is left as it was.
    """
    state = {
        "format": _FORMAT,
        "recipe": learner.recipe.to_toml(),
        "parts": learner.parts,
        "run": run,
        "progress": asdict(progress),
        "scaler": learner.scaler.state_dict(),
        **{name: _whole_state(model, divided=learner.divided) for name, model in _models(learner).items()},
        # after the models: reading them divides the parameters again that a forward pass has joined
        "optimizer": get_optimizer_state_dict(learner.bare.model, learner.optimizer, options=_FULL)
        if learner.divided
        else learner.optimizer.state_dict(),
    }
    if learner.process.is_main:
        with atomic_write(out / STATE_NAME) as temporary:
            _write(state, temporary)
    learner.process.wait_for_all()


def _models(learner: Learner) -> dict[str, nn.Module]:
    """The models of a state: `model`, and `ema_model` where an average is kept; each with an extra head for patches."""
    found: dict[str, nn.Module] = {}
    for prefix, heads in learner.versions().items():
        found[f"{prefix}model"] = heads.model
        if isinstance(heads, TokenHeads) and heads.extra is not None:
            found[f"{prefix}patch_head"] = heads.extra
    return found


def _write(state: dict[str, Any], path: Path) -> None:
    """torch.save; the file is on the disk when this returns. Raises: OSError: it could not be written."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        # torch's error for a full disk; the reason is in its context
        reason = error.__context__
        raise (reason if isinstance(reason, OSError) else OSError(first_line(error))) from error


def remove_leftovers(out: Path) -> None:
    """Delete the half-written files of killed runs in `out` and the folders of exported models."""
    for folder in (out, *(out / name for name in MODEL_FOLDERS)):
        for name in (STATE_NAME, WEIGHTS_NAME):
            for leftover in folder.glob(f"{name}.*.tmp"):
                leftover.unlink(missing_ok=True)


def load_state(out: Path, learner: Learner, *, run: dict[str, str]) -> Progress | None:
    """Put a saved run back into the learner; None if `out` holds none.

    Raises: TrainingError: the state is damaged, or was saved by a run with other settings; they are named.
    """
    path = out / STATE_NAME
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            if (name := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {name} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds one {type(state).__name__}")
        _check_same_run(path, state, learner.recipe, run)
        _restore(learner, state)
        return Progress(**state["progress"])
    except _DAMAGES as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(f"{path} is damaged or not a state of this package: {first_line(error)}") from error


_DAMAGES = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError, MemoryError),
    *(OSError, EOFError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""Errors raised by reading a damaged archive of tensors."""


def _check_same_run(path: Path, state: dict[str, Any], recipe: Recipe, run: dict[str, str]) -> None:
    if state["format"] != _FORMAT:
        raise TrainingError(
            f"{path} has format {state['format']}, this version reads {_FORMAT}; train into a new folder"
        )
    before, now = asdict(recipe_from_toml(state["recipe"])) | state["run"], asdict(recipe) | run
    changed = [name for name in now | before if name != "preset" and before.get(name) != now.get(name)]
    done = state["progress"]["epoch"] - recipe.cooldown_epochs
    if going_on := [name for name in changed if _goes_on(name, before.get(name), now.get(name), done=done)]:
        if "data" in going_on:
            state["progress"]["unreadable"] = []  # the images have other numbers now
        settings = ", ".join(f"{name}={before[name]!r} (now {now[name]!r})" for name in going_on)
        logger.warning("%s goes on; it was saved with %s", path, settings)
    if changed := [name for name in changed if name not in going_on]:
        pairs = [(name, before.get(name), now.get(name)) for name in changed]
        settings = ", ".join(f"{name}={_apart(old, new)!r} (now {_apart(new, old)!r})" for name, old, new in pairs)
        raise TrainingError(f"{path} was saved with {settings}; use those settings, or train into a new folder")


def _apart(value: Any, other: Any) -> Any:
    """Of the text of a configuration its beginning and the fields in which it differs from another; else the value."""
    if not (isinstance(value, str) and isinstance(other, str) and "(" in value):
        return value
    first, *fields = value.split(", ")
    return ", ".join([first, *(entry for entry in fields if entry not in other.split(", "))])


def _restore(learner: Learner, state: dict[str, Any]) -> None:
    """Put saved weights and optimiser back; where parameters are divided, each process takes its part."""
    for name, model in _models(learner).items():
        if learner.divided:
            set_model_state_dict(model, state[name], options=_FULL)
        else:
            model.load_state_dict(state[name])
    if learner.divided:
        # not strict: a head that is not trained has no state
        options = replace(_FULL, strict=False)
        set_optimizer_state_dict(learner.bare.model, learner.optimizer, state["optimizer"], options=options)
    else:
        learner.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty unless the run was in fp16
        learner.scaler.load_state_dict(state["scaler"])
    # a batch is done in as many parts as before, to mix the same images
    parts = int(state.get("parts", 1))
    if recipe_from_toml(state["recipe"]).accumulate == learner.recipe.accumulate and learner.batch_size % parts == 0:
        learner.parts = parts
