"""`optimize`: a fast form of a model for this machine, from backends that are tried, compared and timed."""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from ..config import nearest
from ..errors import AgreementError, ConfigError, IntegrityError, first_line
from ..files import digest_of_tensors
from ..hub.fetch import Access
from ..models.layers import HeadLogits, ImageClassifier
from ..registry import own_model
from .hardware import Runner, backends_are_ranked, call_times, exact_float32, quiet
from .kept import decision_key, has_network, keep, keep_network, kept_network, recall
from .network import Prepared, TokenMerging, merging_plan, prepare, random_images
from .runtimes import BACKENDS, Backend, BackendName, InferencePrecision, Job, KeepableRunner, Way, ways_on

logger = logging.getLogger(__name__)

FLOAT32_TOLERANCE = 1e-4
"""Largest difference of a float32 network's logits to the model's; with merging, to the merged network's in torch."""
_JUDGES = 32
_CLOSE = 1.25
"""Candidates that take at most this much longer than the fastest are timed in a second round."""
_FOLDED = 1.5
"""Folding and pieces that fit the caches make torch itself at most this much faster than the model."""
_LONG = 0.1
"""Seconds of a batch from which on a backend's `reach` is known; what launching takes differs more."""
_PART = 8
"""Images that the reference computes at once."""
_FEW = 4
"""Images on which a kept network is compared again."""
_DEFAULT_BATCH = {"throughput": 32, "latency": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Speed of a backend in one precision: over all timed calls, and the median of a call with one batch.

    Zeros if it was the only candidate, and so was not timed.
    """

    backend: BackendName
    precision: InferencePrecision
    images_per_second: float = 0.0
    latency_ms: float = 0.0


class Agreement(NamedTuple):
    """Comparison of a network's logits with the model's in float32, over a number of images.

    `top1` is the share of the images with the same most likely class, `max_abs_diff` the largest difference of a logit.
    """

    top1: float
    max_abs_diff: float
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Backend and precision that `optimize` chose, and why.

    Attributes:
        agreement: with the model in float32; if tokens are merged, with the merged network in torch's float32.
        timings: all timings, fastest first.
        token_merging: tokens that each block merges; empty if none.
        merging_agreement: of the merged network in torch's float32 with the model; None if nothing is merged.
    """

    backend: BackendName
    precision: InferencePrecision
    agreement: Agreement
    timings: tuple[Timing, ...] = ()
    token_merging: tuple[int, ...] = ()
    merging_agreement: Agreement | None = None


class OptimizedClassifier(ImageClassifier):
    """An inference model that any backend may compute; it is called like the model it was made from.

    `choice` tells the backend, `device` where it computes, `takes_pixels` whether it takes uint8 pixels. `config`,
    `origin` and `num_classes` are the model's. `forward_heads` gives the final logits as `cls`. It cannot be trained or
    saved.
    """

    def __init__(
        self, model: ImageClassifier, run: Runner, choice: Choice, *, device: torch.device, pixels: bool
    ) -> None:
        super().__init__(model.config)
        self.origin, self.choice, self.takes_pixels = model.origin, choice, pixels
        self._run, self.device = run, device
        self.eval()

    def forward_heads(self, x: Tensor) -> HeadLogits:
        """The logits of x, (B, C, H, W) -> (B, num_classes) float32. Raises: ConfigError: wrong shape or dtype of x."""
        self.check_input(x)
        if self.takes_pixels != (x.dtype == torch.uint8):
            wanted = "uint8 pixels" if self.takes_pixels else "normalised floats"
            raise ConfigError(f"input of type {x.dtype}; this model was optimised for {wanted}")
        if not len(x):
            return HeadLogits(torch.empty(0, self.num_classes, device=self.device), None)
        with torch.no_grad():
            return HeadLogits(self._run(x.to(self.device, None if self.takes_pixels else torch.float32)), None)

    def train(self, mode: bool = True) -> OptimizedClassifier:
        """Stay in eval mode. Raises: ConfigError: training an optimised model."""
        if mode:
            raise ConfigError("an optimised model cannot be trained; train the model it was made from")
        super().train(False)
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Not possible. Raises: ConfigError: always."""
        raise ConfigError("an optimised model cannot be saved; save the model it was made from, or use export")

    push_to_hub = save_pretrained


def optimize(
    model: ImageClassifier,
    *,
    sample: Tensor | int | None = None,
    precision: Literal["auto", "float32", "bf16", "int8"] = "auto",
    goal: Literal["throughput", "latency"] = "throughput",
    backend: Literal["auto", "eager", "inductor", "openvino", "onnxruntime"] = "auto",
    calibration: Tensor | Sequence[Any] | None = None,
    min_agreement: float = 0.99,
    preprocessing: bool = False,
    token_merging: TokenMerging = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> OptimizedClassifier:
    """A model that gives the same logits faster, on the backend that a short measurement finds fastest here.

    A backend that is not installed, has no compiler or fails costs one log line; torch itself always remains. On a CPU,
    backends that cannot win by what is measured already are left out. Timings are kept in the cache, by configuration,
    batch size, processor and versions, and so is the compiled network of OpenVINO and ONNX Runtime, by weights.
    Agreement is checked in each call: on a few images for a kept network, on all for any other.

    Args:
        model: in any mode, on the CPU or a GPU; it stays as it is.
        sample: a typical batch, or its number of images; default 32 for throughput, 1 for latency.
        precision: "float32" gives the model's logits within 1e-4. "bf16" and "int8" must agree, see `min_agreement`.
            "auto" takes bf16 where it is faster and agrees, and float32 otherwise. "int8" needs OpenVINO, NNCF and
            calibration images; where a library is missing, float32 is used.
        goal: compare images per second, or the median time of a call.
        backend: "auto" times all that work; one by name is used if it works, and torch itself otherwise.
        calibration: images to check bf16 and int8 on, and to find the ranges of int8: a batch as the model takes it, or
            a list of files and other images. Without it the check uses the sample, or random images.
        min_agreement: share of those images that must have the same most likely class as in float32.
        preprocessing: take uint8 pixels and normalise inside.
        token_merging: patch tokens that every block merges into similar ones, or one number for each block, see
            `deploy.network`: faster, with other logits. The merged network in torch's float32 must agree with the model
            on `min_agreement` of the images; every backend and precision is then compared with it.
        cache_dir: folder for timings and compiled networks; by default the Hub's cache.

    Raises: ConfigError: options that do not exist or do not fit. AgreementError: bf16, int8 or merging was asked for,
        and does not agree.
    """
    _check(precision, goal, backend, min_agreement, calibration)
    search = _Search(
        model, sample, calibration, goal=goal, pixels=preprocessing, min_agreement=min_agreement, merging=token_merging
    )
    named = {name: made for name, made in BACKENDS.items() if backend in ("auto", name)}
    candidates = ways_on(search.device, backends=named, precision=None if precision == "auto" else precision)
    return search.best(candidates, Access(cache_dir=cache_dir))


def is_kept(
    model: ImageClassifier,
    *,
    sample: int,
    precision: InferencePrecision,
    backend: BackendName,
    cache_dir: str | os.PathLike[str] | None = None,
) -> bool:
    """Whether the compiled network that `optimize` makes with these options is in the cache."""
    search = _Search(model, sample, None, goal="throughput", pixels=False, min_agreement=0.99, merging=0)
    way = Way(backend, precision)
    return has_network(search.network_key(way, search.question([way])), Access(cache_dir=cache_dir))


def _check(precision: str, goal: str, backend: str, min_agreement: float, calibration: object) -> None:
    for name, value, known in (
        ("precision", precision, ("auto", "float32", "bf16", "int8")),
        ("goal", goal, tuple(_DEFAULT_BATCH)),
        ("backend", backend, ("auto", *BACKENDS)),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value!r}; expected one of {', '.join(known)}{nearest(value, known)}")
    if not 0 <= min_agreement <= 1:
        raise ConfigError(f"min_agreement={min_agreement}; expected a share from 0 to 1")
    if precision == "int8" and calibration is None:
        needed = "needs calibration images: pass calibration=, a few hundred of those to come"
        raise ConfigError(f"precision='int8' {needed}")


class _Trial(NamedTuple):
    """A way to compute that works and agrees."""

    way: Way
    run: Runner
    agreement: Agreement


class _Search:
    """A search for the fastest way to compute one model: each candidate is tried once, then timed."""

    def __init__(
        self,
        model: ImageClassifier,
        sample: Tensor | int | None,
        calibration: Tensor | Sequence[Any] | None,
        *,
        goal: str,
        pixels: bool,
        min_agreement: float,
        merging: TokenMerging,
        backends: Mapping[BackendName, Backend] = BACKENDS,
        timer: Callable[..., list[float]] = call_times,
        exact: Callable[[torch.device], AbstractContextManager[None]] = exact_float32,
        ranked: Callable[[], bool] = backends_are_ranked,
    ) -> None:
        """Plan the merging and make the batches, from the arguments of `optimize`. Raises: ConfigError: see there."""
        if isinstance(model, OptimizedClassifier):
            raise ConfigError("this model is optimised already; optimise the model it was made from")
        self.model = model = model if isinstance(model, ImageClassifier) else own_model(model)
        self.goal, self.pixels, self.min_agreement = goal, pixels, min_agreement
        self.backends, self.timer, self.exact, self.ranked = backends, timer, exact, ranked
        self.plan, self.device = merging_plan(model, merging), next(model.parameters()).device
        given = sample if isinstance(sample, Tensor) else None
        count = len(given) if given is not None else _DEFAULT_BATCH[goal] if sample is None else int(sample)
        if count < 1:
            raise ConfigError(f"sample={sample!r}; expected a batch of images, or how many are to come at once")
        self.calibration = None if calibration is None else _as_batch(model, calibration, pixels=pixels)
        example = random_images(model, count, pixels=pixels) if given is None else given
        judges = given if self.calibration is None else self.calibration
        judges = random_images(model, max(_JUDGES, count), pixels=pixels) if judges is None else judges
        shape = (model.config.in_chans, *model.config.image_hw)
        for name, batch in (("sample", example), ("calibration", judges)):
            if batch.ndim != 4 or tuple(batch.shape[1:]) != shape or not len(batch):
                raise ConfigError(f"{name} of shape {tuple(batch.shape)}; expected (B, {', '.join(map(str, shape))})")
        self.example, self.judges = example.to(self.device), judges.to(self.device)
        self.tried: dict[Way, _Trial | None] = {}
        self.prepared: dict[torch.dtype, tuple[Prepared, dict[int, Any]]] = {}
        self.disagreements: list[str] = []
        self.disagreeing: dict[Way, Runner] = {}

    def best(self, candidates: list[Way], access: Access) -> OptimizedClassifier:
        """The fastest candidate that works and agrees; torch in float32 if none does.

        Raises: AgreementError: the merged network differs too much from the model, or so does each bf16 or int8 network
            that was asked for, or torch itself fails.
        """
        merging = self._merging_agreement()
        question = self.question(candidates)
        key, several = decision_key(question, self.device), len(candidates) > 1
        timings = recall(key, Timing, access) if several else []
        first = Way(timings[0].backend, timings[0].precision) if timings else candidates[0]
        found = self._restored(first, question, access) if timings or not several else None
        restored = found is not None
        if several and found is None and not (timings and (self._try(first) or not self.disagreements)):
            # also where the winner of other weights disagrees with these: what it surpassed was left out, not timed
            known, timings = timings, self._measure(candidates)
            if not known:
                keep(key, timings, access)
        order = [Way(timing.backend, timing.precision) for timing in timings] or candidates
        found = found or next(filter(None, map(self._try, order)), None)
        asked_for_less = all(way.precision != "float32" for way in candidates)
        if found is None and not (asked_for_less and self.disagreements):
            found = self._try(Way("eager", "float32"))
        if found is None:
            nothing = "no backend could compute this model, not even torch itself"
            raise AgreementError("; ".join(self.disagreements) or nothing)
        if not restored and self.backends[found.way.backend].keeps:
            network = cast(KeepableRunner, found.run).to_bytes()
            keep_network(self.network_key(found.way, question), network, found.agreement, access)
        timings = timings or [Timing(backend=found.way.backend, precision=found.way.precision)]
        choice = Choice(
            backend=found.way.backend, precision=found.way.precision, agreement=found.agreement,
            timings=tuple(timings), token_merging=self.plan, merging_agreement=merging,
        )  # fmt: skip
        return OptimizedClassifier(self.model, found.run, choice, device=self.device, pixels=self.pixels)

    def question(self, candidates: list[Way]) -> dict[str, Any]:
        """Facts that the timings of the candidates depend on, besides the machine."""
        return {
            "model": type(self.model).__name__, "config": repr(self.model.config), "batch": tuple(self.example.shape),
            "goal": self.goal, "candidates": candidates, "pixels": self.pixels, "token_merging": self.plan,
        }  # fmt: skip

    def _merging_agreement(self) -> Agreement | None:
        """Compare the merged network with the model; None without merging. Raises: AgreementError: it disagrees."""
        if not self.plan:
            return None
        with self.exact(self.device):
            agreement = self._compare(prepare(self.model, pixels=self.pixels, fold=False))
        if agreement.top1 < self.min_agreement:
            raise AgreementError(
                f"token_merging={','.join(map(str, self.plan))}: {agreement.top1:.1%} agree with the unmerged model on "
                f"{agreement.images} images, min_agreement={self.min_agreement:g} is asked for; merge fewer tokens"
            )
        return agreement

    def _measure(self, candidates: list[Way]) -> list[Timing]:
        """Timings of the candidates that work and may win, fastest first.

        Each runs by itself: the thread pools of two runtimes would disturb each other. Those that are close to the
        fastest are timed in a second round.
        """
        times: dict[Way, list[float]] = {}
        of_torch: dict[Way, list[float]] = {}  # where torch itself disagrees: others are compared with its speed
        for way in candidates:
            best = min(map(self._batch_seconds, times.values()), default=math.inf)
            if reason := self._cannot_win(way, times | of_torch, best):
                logger.info("%s is left out: %s", way, reason)
            elif (trial := self._try(way)) is not None:
                times[way] = self.timer(trial.run, self.example, warm_up=0, give_up=_CLOSE * best)
            elif way in self.disagreeing and way.backend == "eager":
                of_torch[way] = self.timer(self.disagreeing[way], self.example, warm_up=0, give_up=best)
        best = min(map(self._batch_seconds, times.values()), default=math.inf)
        close = [way for way, taken in times.items() if min(taken) <= _CLOSE * best]  # one call may have been disturbed
        for way in close if len(close) > 1 else ():
            if (trial := self.tried[way]) is not None:
                times[way] += self.timer(trial.run, self.example)
        return [
            Timing(
                backend=way.backend,
                precision=way.precision,
                images_per_second=len(self.example) * len(taken) / sum(taken),
                latency_ms=1000 * statistics.median(taken),
            )
            for way, taken in sorted(times.items(), key=lambda item: self._batch_seconds(item[1]))
        ]

    def _batch_seconds(self, taken: list[float]) -> float:
        """Seconds of a batch, by the goal: the median of the calls, or their mean."""
        return statistics.median(taken) if self.goal == "latency" else statistics.mean(taken)

    def _cannot_win(self, way: Way, times: Mapping[Way, list[float]], best: float) -> str:
        """Why a way need not be tried on a CPU; empty if it must be."""
        backend, itself = self.backends[way.backend], Way("eager", way.precision)
        if self.device.type != "cpu" or not times:
            return ""
        for ahead in backend.behind.get(way.precision, ()) if self.ranked() else ():
            if ahead in times:
                return f"{ahead} was faster wherever both were measured"
        if way.precision == "bf16" and sum(other.precision == "bf16" for other in self.disagreeing) > 1:
            return "the bf16 of two others disagrees, and all round alike"
        if best <= _LONG:
            return ""
        if itself in times:
            least = self._batch_seconds(times[itself])
        else:
            least = self._expected[1] / _FOLDED if way.precision == "float32" else 0.0
        return "it cannot be faster than what is measured already" if least / backend.reach > best else ""

    def _job(self, way: Way) -> Job:
        """Inputs of a backend; ways of one dtype have the prepared network in common."""
        dtype = self.backends[way.backend].dtype(way.precision)
        if dtype not in self.prepared:
            self.prepared[dtype] = prepare(self.model, pixels=self.pixels, dtype=dtype, plan=self.plan), {}
        prepared, shared = self.prepared[dtype]
        return Job(prepared, self.example, way.precision, self.calibration, shared=shared)

    def _try(self, way: Way) -> _Trial | None:
        """Build a way and compare it, once; None after one log line if it fails or disagrees."""
        if way in self.tried:
            return self.tried[way]
        self.tried[way] = None
        try:
            with quiet(), torch.no_grad():
                run = self.backends[way.backend].build(self._job(way))
                if len(self.judges) < len(self.example):  # else comparing warms up
                    run(self.example)
                agreement = self._compare(run)
        except Exception as error:  # noqa: BLE001  # compilers and runtimes raise many types: another backend is used
            logger.warning("%s is not used: %s", way, first_line(error))
            return None
        if self._agrees(way, agreement):
            self.tried[way] = _Trial(way, run, agreement)
            return self.tried[way]
        self.disagreeing[way] = run
        exact = way.precision == "float32"
        found = f"logits differ by {agreement.max_abs_diff:.2g}" if exact else f"{agreement.top1:.1%} agree"
        wanted = f"{FLOAT32_TOLERANCE:g} is allowed" if exact else f"min_agreement={self.min_agreement:g} is asked for"
        self.disagreements.append(f"{way}: {found} on {agreement.images} images, {wanted}")
        logger.warning("not used: %s", self.disagreements[-1])
        return None

    def _agrees(self, way: Way, agreement: Agreement) -> bool:
        """Whether a way agrees well enough for its precision."""
        if way.precision == "float32":
            return agreement.max_abs_diff <= FLOAT32_TOLERANCE
        return agreement.top1 >= self.min_agreement

    @cached_property
    def _expected(self) -> tuple[Tensor, float]:
        """Reference logits, and the least seconds of a batch: the model without folds, in exact float32, tokens merged.

        The seconds are those of the fastest part of the images: the first call is slow, and others may be disturbed.
        """
        size, parts, fastest = min(len(self.example), _PART), [], math.inf
        with self.exact(self.device), torch.no_grad():
            network = prepare(self.model, pixels=self.pixels, fold=False, plan=self.plan)
            for images in torch.split(self.judges, size):
                began = time.perf_counter()
                parts.append(network(images).cpu())
                fastest = min(fastest, (time.perf_counter() - began) / len(images))
        return torch.cat(parts).to(self.device), fastest * len(self.example)

    def _logits(self, run: Runner, images: Tensor) -> Tensor:
        return torch.cat([run(batch) for batch in torch.split(images, len(self.example))])

    def _compare(self, run: Runner) -> Agreement:
        expected, _ = self._expected
        return _agreement(self._logits(run, self.judges), expected)

    def network_key(self, way: Way, question: dict[str, Any]) -> str:
        """Key of a compiled network: it depends on the weights and the calibration images, too."""
        return decision_key({**question, "way": way, "tensors": self._digest}, self.device)

    @cached_property
    def _digest(self) -> str:
        """Digest of the weights and of the images that they are compared and calibrated on."""
        images = {"judges": self.judges} | ({} if self.calibration is None else {"calibration": self.calibration})
        return digest_of_tensors([*self.model.state_dict().items(), *images.items()])

    def _restored(self, way: Way, question: dict[str, Any], access: Access) -> _Trial | None:
        """The kept network of a way; None if there is none, or after one log line if it does not fit."""
        backend, few = self.backends[way.backend], self.judges[:_FEW]
        try:
            kept = kept_network(self.network_key(way, question), access) if backend.keeps else None
            if kept is None:
                return None
            agreement = Agreement(*kept.agreement)
            with quiet(), torch.no_grad():
                run = backend.build(self._job(way)._replace(kept=kept.network))
                now = _agreement(run(few), prepare(self.model, pixels=self.pixels, fold=False, plan=self.plan)(few))
            # some of the same images, so the difference cannot be larger than before, except by rounding
            if now.max_abs_diff > 1.5 * agreement.max_abs_diff + FLOAT32_TOLERANCE / 2:
                raise IntegrityError("its logits have changed")
        except Exception as error:  # noqa: BLE001  # runtimes raise many types: the network is compiled anew
            logger.warning("the kept network of %s is compiled anew: %s", way, first_line(error))
            return None
        return _Trial(way, run, agreement) if self._agrees(way, agreement) else None


def _agreement(found: Tensor, expected: Tensor) -> Agreement:
    if found.shape != expected.shape or not found.isfinite().all():
        return Agreement(0.0, float("inf"), len(expected))
    same = (found.argmax(1) == expected.argmax(1)).double().mean()
    return Agreement(float(same), float((found - expected).abs().max()), len(expected))


def _as_batch(model: ImageClassifier, images: Tensor | Sequence[Any], *, pixels: bool) -> Tensor:
    if isinstance(images, Tensor):
        return images.cpu()
    if model.origin is None:
        raise ConfigError("this model does not know its transform; pass calibration as a batch of tensors")
    from ..images.transforms import EvalTransform  # with torchvision, whose import takes more than a second

    transform = EvalTransform(model.origin.preprocessing, normalise=not pixels)
    return torch.stack([transform(image) for image in images])
