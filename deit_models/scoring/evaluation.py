"""Accuracy and loss of models on labelled images; each image is counted exactly once, also by several processes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batches.inputs import eval_batches
from ..batches.loading import Batch, DamageCount, Watch, explained_worker_failure, plain_watch, workers_beside
from ..checkpoint import weights_dir
from ..data.datasets import open_images
from ..data.records import ImageRecords, SubsetRecords, some
from ..distributed import Process, has_bf16, join_processes
from ..errors import ConfigError, DataError
from ..files import digest_of_names, digest_of_numbers, read_text
from ..images.transforms import EvalTransform, preprocessing_of
from ..models.layers import HeadLogits, ImageClassifier, check_has_classes
from ..recipes.recipe import Precision
from ..registry import own_model
from .outcomes import Evaluation, Outcomes, Tally, in_blocks, join_blocks, read_outcomes, write_block
from .parts import Parts

logger = logging.getLogger(__name__)

_WORDNET_ID = re.compile(r"n\d{8}")
_WORDNET_FILE = "imagenet_wordnet_ids.txt"


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 256,
    workers: int | None = None,
    device: str | torch.device | None = None,
    precision: Precision = "float32",
    transform: EvalTransform | None = None,
    ignore_class_names: bool = False,
    corrupt_limit: float = 0.01,
    watch: Watch = plain_watch,
    on_outcomes: Callable[[ImageRecords, Outcomes], None] | None = None,
    output: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Evaluation:
    """Score a model on labelled images, each exactly once, also under torchrun.

    Args:
        model: gives (B, K) logits; moved to the device, the mode of each of its modules is left as found.
        data: a folder or the name of a data set, or a Dataset. Its classes are matched with the model's by name; by
            number where the model has no class names (which is logged), or is no model of this package.
        batch_size: images at once, in each process.
        workers: loading processes.
        device: where to compute; default: the GPU if there is one.
        precision: of the forward pass; "auto": bf16 where the device computes in it, else float32.
        transform: default: the one that belongs to the model's weights.
        ignore_class_names: match by number although the names differ.
        corrupt_limit: fraction of the images that may be unreadable.
        watch: wraps the batches, for a progress bar.
        on_outcomes: called in the first process with the images, labelled as the model numbers its classes, and their
            outcomes; `show.pages.evaluation_page` makes one that writes a report.
        output: an .npz file to write with a row for each image that can be read: its name, label, predicted class and
            more, see `Outcomes`. Until it is complete, its rows are kept in parts beside it.
        resume: go on with an interrupted run, by any number of processes; a complete file is read instead.
        overwrite: replace the file, and what an interrupted run has left.

    Raises: DataError: images missing or damaged, other classes than the model's. ConfigError: no transform known; an
        output that exists, without `resume` or `overwrite`; a run to resume with other images, weights or settings.
    """
    check_output(output, resume=resume, overwrite=overwrite)
    with join_processes(device) as process:
        records = open_images(data, "val")
        model = own_model(model, others=True)
        thresholds = None
        if isinstance(model, ImageClassifier):
            check_has_classes(model)
            if model.origin is not None:
                model.origin.check_labels(records.multi_label, "evaluation")
                thresholds = model.origin.thresholds
            records = in_the_models_order(model, records, ignore_class_names=ignore_class_names)
        options: dict[str, Any] = {"batch_size": batch_size, "corrupt_limit": corrupt_limit, "watch": watch}
        options |= {"transform": transform or EvalTransform(preprocessing_of(model))}
        options |= {"precision": resolved_precision(precision, process)}
        options |= {"workers": workers_beside(process.device, workers)}
        if output is None:
            outcomes = collect_outcomes(model, records, process, **options)
        else:
            options |= {"resume": resume, "overwrite": overwrite}
            outcomes = _collect_in_parts(model, records, process, Path(output), **options)
        if on_outcomes is not None and process.is_main:
            on_outcomes(records, outcomes)
        return outcomes.evaluation(thresholds)


def collect_outcomes(
    model: nn.Module,
    records: ImageRecords,
    process: Process,
    *,
    precision: Precision,
    workers: int,
    batch_size: int,
    corrupt_limit: float,
    transform: EvalTransform | None = None,
    watch: Watch = plain_watch,
) -> Outcomes:
    """Score each image of a set; every process does its share, and all get the whole result.

    The arguments are those of `evaluate`; labels of `records` are the numbers of the model's logits.
    Raises: DataError: too many images cannot be read. ConfigError: no transform known.
    """
    transform = transform or EvalTransform(preprocessing_of(model))
    heads, damage = Heads(model.to(process.device)), DamageCount(records, corrupt_limit)
    batches = eval_batches(records, transform, process, batch_size=batch_size, workers=workers)
    with explained_worker_failure(workers):
        return score(heads, watch(batches, len(batches)), process, precision=precision, damage=damage)


def check_output(output: str | PathLike[str] | None, *, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError for another suffix than .npz, both flags, or one of them without an output."""
    if output is None and (resume or overwrite):
        raise ConfigError(f"{'resume' if resume else 'overwrite'} is for a file of outcomes; name it with output")
    if output is not None and (Path(output).suffix != ".npz" or (resume and overwrite)):
        raise ConfigError(f"output={output}, resume={resume}, overwrite={overwrite}; expected .npz, one flag at most")


def _collect_in_parts(
    model: nn.Module,
    records: ImageRecords,
    process: Process,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    transform: EvalTransform,
    precision: Precision,
    batch_size: int,
    workers: int,
    corrupt_limit: float,
    watch: Watch,
) -> Outcomes:
    """As `collect_outcomes`, through a file that is written in parts: what a kill has left is not scored again."""
    names = (f"{records.key(i)}\t{records.label(i) if records.knows_labels else None}" for i in range(len(records)))
    run: dict[str, Any] = {"model": digest_of_numbers(model), "preprocessing": str(transform), "precision": precision}
    run |= {"classes": list(records.classes), "images": len(records), "names": digest_of_names(names)}
    parts, alone = Parts(output), replace(process, rank=0, world=1)
    if not parts.settle(process, resume=resume, overwrite=overwrite):
        parts.begin(run, len(records), process)
        mine, heads = SubsetRecords(records, chain(*parts.mine)), Heads(model.to(process.device))
        batches = eval_batches(mine, transform, alone, batch_size=batch_size, workers=workers)
        damage = DamageCount(records, corrupt_limit)
        with explained_worker_failure(workers):
            for block, some_batches in in_blocks(watch(batches, len(batches)), parts.mine):
                found = score(heads, some_batches, alone, precision=precision, damage=damage)
                with parts.new(block, []) as path:
                    write_block(path, found, block, records)
        parts.finish(process, partial(join_blocks, run=run))
    outcomes = read_outcomes(output, run)
    unread = set(range(len(records))).difference(outcomes.index.tolist())
    DamageCount(records, corrupt_limit, failed=unread).meet(alone)
    return outcomes


def score(
    heads: nn.Module, batches: Iterable[Batch], process: Process, *, precision: Precision, damage: DamageCount
) -> Outcomes:
    """Score one model on batches; see `score_each`."""
    return score_each({"": heads}, batches, process, precision=precision, damage=damage)[""]


@torch.inference_mode()
def score_each(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    process: Process,
    *,
    precision: Precision,
    damage: DamageCount,
    rounds: int | None = None,
) -> dict[str, Outcomes]:
    """Score several models in one pass; every process brings its share, and all get the same result.

    The models give the logits of their heads, see `Heads`; the mode of each module is left as found. The batches are
    this process's share, in the order of `ShardSampler`. Where parameters are divided between processes, each must run
    as many forward passes, `rounds`. Results stay on the device; they are read once, at the end.

    Raises: DataError: more classes than logits, or too many images that cannot be read.
    """
    tallies, device, done = {name: Tally() for name in models}, process.device, 0
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(eval_mode(model))
        for images, labels, failures in batches:
            damage.add(failures)
            images = images.to(device, non_blocking=True)
            for name, model in models.items():
                logits = _forward(model, images, precision)
                found, needed = logits[0].shape[1], len(damage.records.classes)
                if found < needed or (labels.ndim == 2 and found > needed):
                    raise DataError(f"{damage.records.name} has {needed} classes, the model {found}")
                tallies[name].add(logits, labels)
            done += 1
        for _ in range(done, rounds or 0):  # the other processes still have images
            for model in models.values():
                _forward(model, images, precision)
    damage.meet(process)
    return {name: tally.outcomes(process) for name, tally in tallies.items()}


def _forward(heads: nn.Module, images: Tensor, precision: Precision) -> list[Tensor]:
    """The logits of each head that is there, (B, K), without those of patches."""
    with autocast(images.device, precision):
        return [logits for logits in heads(images)[:2] if logits is not None]


class Heads(nn.Module):
    """A model whose forward gives the logits of each head, in training and in eval mode alike.

    This module is compiled and distributed, because DDP and torch.compile go through `forward`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> HeadLogits | tuple[Any, ...]:
        """(B, 3, H, W) -> the heads' logits; a foreign network has one head."""
        return (
            self.model.forward_heads(x) if isinstance(self.model, ImageClassifier) else HeadLogits(self.model(x), None)
        )


def resolved_precision(precision: Precision, process: Process) -> Precision:
    """The precision; "auto" becomes bf16 if the devices of all processes compute in it, else float32."""
    if precision != "auto":
        return precision
    return "bf16" if all(process.gather(has_bf16(process.device))) else "float32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Mixed precision on a device, as resolved by `resolved_precision`; nothing for float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module gets its mode back: a part may have been frozen on purpose."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def class_labels(model: ImageClassifier, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """A name for each logit: those given, the checkpoint's, ImageNet's, or numbers."""
    names = class_names_of(model) if given is None else _checked(model, given)
    return names or tuple(f"class {number}" for number in range(model.num_classes))


def class_names_of(model: ImageClassifier) -> tuple[str, ...] | None:
    """A name for each logit, if the weights came with them or were trained on ImageNet-1k; None if not."""
    origin = model.origin
    if origin is not None and origin.class_names is not None:
        return _checked(model, origin.class_names)
    if origin is not None and origin.dataset == "ImageNet-1k" and model.num_classes == 1000:
        from torchvision.models import get_weight

        return tuple(get_weight("ResNet18_Weights.IMAGENET1K_V1").meta["categories"])
    return None


def _checked(model: ImageClassifier, names: Sequence[str]) -> tuple[str, ...]:
    if len(names) != model.num_classes:
        raise ConfigError(f"{len(names)} labels given, {model.num_classes} expected: one for each class of the model")
    return tuple(names)


class Match(NamedTuple):
    """Correspondence of a data set's classes with a model's.

    Attributes:
        order: for each label of the data the model's logit of the same class; None if the names do not match.
        difference: of the names; empty if they match or the model has none.
    """

    order: tuple[int, ...] | None
    difference: str = ""


def match_classes(model: ImageClassifier, records: ImageRecords) -> Match:
    """Compare class names; there must be as many as the model has classes.

    ImageNet's thousand classes are accepted by their WordNet ids, whose sorted order is that of every ImageNet model's
    logits, and as torchvision's data set, which is in that order.
    """
    names, classes = class_names_of(model), records.classes
    if names is not None and len(set(names)) == len(names) and set(names) == set(classes):
        return Match(tuple(map(names.index, classes)))
    sorted_ids = list(classes) == sorted(classes) and all(map(_WORDNET_ID.fullmatch, classes))
    if len(classes) == 1000 and (sorted_ids or records.name == "imagenet"):
        return Match(tuple(range(1000)))
    if names is None:
        return Match(None)
    ours, theirs = (
        some([name for name in one if name not in set(other)]) or "no other"
        for one, other in ((names, classes), (classes, names))
    )
    return Match(None, f"the model alone knows {ours}, the data alone has {theirs}")


def in_the_models_order(
    model: ImageClassifier, records: ImageRecords, *, ignore_class_names: bool = False
) -> ImageRecords:
    """The records with labels that are numbers of the model's logits.

    Classes are matched by name, WordNet id or number. They may be some of the model's; then their images are scored
    among all of the model's classes, and a line says so.

    Raises: DataError: classes that the model lacks, unless they are as many as the model's and `ignore_class_names`.
    """
    whole = len(records.classes) == model.num_classes
    order, difference = match_classes(model, records) if whole else Match(None)
    if order is None and not (whole and ignore_class_names):
        order = _order_by_spelling(model, records)
    if order is not None:
        if order == tuple(range(model.num_classes)):
            return records
        names = [f"(not in {records.name}: {logit})" for logit in range(model.num_classes)]
        for name, logit in zip(records.classes, order, strict=True):
            names[logit] = name
        return SubsetRecords(records, range(len(records)), classes=names)
    if not whole:
        raise DataError(
            f"{records.name} has {len(records.classes)} classes, the model has {model.num_classes}; evaluate a model "
            f"that was trained for these classes, or name their folders as the model names its classes"
        )
    if difference and not ignore_class_names:
        raise DataError(
            f"{records.name} has other classes than the model: {difference}; rename the folders, or pass "
            f"ignore_class_names=True (--ignore-class-names) if they are the same classes in the same order"
        )
    if not ignore_class_names:
        logger.warning("the model does not name its classes: taken to be in the order of %s", records.name)
    return records


def _order_by_spelling(model: ImageClassifier, records: ImageRecords) -> tuple[int, ...] | None:
    """The logit of each class, all different; None if they cannot be told. A line says what they are matched by."""
    names, classes = class_names_of(model) or (), records.classes
    exact, spoken = _unique((name,) for name in names), _unique(map(_synonyms, names))
    found: dict[str, list[int | None]] = {
        "name": [exact.get(name) for name in classes],
        "name in another spelling": [
            next((spoken[word] for word in _synonyms(name) if word in spoken), None) for name in classes
        ],
        "number": [int(name) if name.isdecimal() and int(name) < model.num_classes else None for name in classes],
    }
    if len(names) == 1000 and names[0].startswith("tench") and names[-1].startswith("toilet tissue"):
        ids = {name: logit for logit, name in enumerate(read_text(weights_dir() / _WORDNET_FILE).split())}
        found["WordNet id"] = [ids.get(name) for name in classes]
    for kind, logits in found.items():
        order = tuple(logit for logit in logits if logit is not None)
        if len({*order}) == len(classes):
            of_many = f"{len(classes)} of the model's {model.num_classes} classes" if len(names) else "classes"
            logger.warning("%s: %s, matched by %s; each image is scored among all", records.name, of_many, kind)
            return order
    return None


def _synonyms(name: str) -> list[str]:
    """A class name without case and punctuation, whole and by its parts between commas."""
    return [" ".join(re.split(r"[\W_]+", part.casefold())).strip() for part in (name, *name.split(","))]


def _unique(names: Iterable[Iterable[str]]) -> dict[str, int]:
    """The number of each name that belongs to one number alone."""
    found: dict[str, set[int]] = {}
    for number, synonyms in enumerate(names):
        for name in synonyms:
            found.setdefault(name, set()).add(number)
    return {name: min(numbers) for name, numbers in found.items() if len(numbers) == 1}
