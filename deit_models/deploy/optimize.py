"""One call that makes a model fast where it runs: try what is installed, check the answers, time it, keep the best."""
# MERGED """What was found fastest on this machine, kept in the package's cache so that it is measured once."""
# MERGED """What `optimize` gives: a model for inference that is called like any other, whatever computes it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..config import nearest
from ..data.transforms import EvalTransform
from ..errors import AgreementError, ConfigError, SaveError, first_line
from ..files import atomic_write
from ..hub.fetch import Access, assets_dir
from ..models.layers import HeadLogits, ImageClassifier
from .gpu import exact_float32
from .network import TokenMerging, as_input, merging_plan, prepare
from .runtimes import BACKENDS, BackendName, Job, Precision, network_dtype, precisions_here
from .timing import Runner, call_times, machine, quiet

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How fast one way to compute was.

    Attributes:
        backend: what computed.
        precision: in what.
        images_per_second: over all timed calls.
        latency_ms: the median of a call with one batch.
    """

    backend: BackendName
    precision: Precision
    images_per_second: float
    latency_ms: float


def decision_key(question: dict[str, Any], device: torch.device) -> str:
    """A name for a question on this machine: it changes with the processor, the threads and the versions."""
    text = json.dumps({**question, **machine(device)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def recall(key: str, access: Access) -> list[Timing]:
    """The kept timings, fastest first; empty if there are none that can be read."""
    try:
        rows = json.loads((assets_dir("deploy", access) / f"{key}.json").read_text(encoding="utf-8"))
        return [Timing(**row) for row in rows]
    except (OSError, ValueError, TypeError):
        return []


def keep(key: str, timings: list[Timing], access: Access) -> None:
    """Write timings down; a cache that cannot be written costs a log line and the next measurement."""
    try:
        with atomic_write(assets_dir("deploy", access) / f"{key}.json") as temporary:
            temporary.write_text(json.dumps([asdict(timing) for timing in timings], indent=2), encoding="utf-8")
    except SaveError as error:
        logger.warning("the choice is not kept: %s", error)


class Agreement(NamedTuple):
    """How well a network's answers are those of the model in float32.

    Attributes:
        top1: share of the images with the same likeliest class.
        max_abs_diff: the largest difference of a logit.
        images: how many were compared.
    """

    top1: float
    max_abs_diff: float
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What `optimize` chose.

    Attributes:
        backend: what computes.
        precision: in what.
        agreement: with the model in float32; if tokens are merged, with the merged network in torch's float32.
        timings: all that was timed, fastest first.
        token_merging: the tokens that each block merges; empty if none does.
        merging_agreement: of the merged network, in torch's float32, with the model; None if nothing is merged.
    """

    backend: BackendName
    precision: Precision
    agreement: Agreement
    timings: tuple[Timing, ...] = ()
    token_merging: tuple[int, ...] = ()
    merging_agreement: Agreement | None = None


class OptimizedClassifier(ImageClassifier):
    """A model for inference that another backend may compute; called as the model it was made from.

    `choice` says what computes, `device` where, `takes_pixels` whether uint8 pixels are taken. `config`, `origin` and
    `num_classes` are the model's. `forward_heads` gives the final logits as `cls`. It cannot be trained or saved.
    """

    def __init__(
        self, model: ImageClassifier, run: Runner, choice: Choice, *, device: torch.device, pixels: bool
    ) -> None:
        super().__init__(model.config)
        self.origin, self.choice, self.takes_pixels = model.origin, choice, pixels
        self._run, self.device = run, device
        self.eval()

    def forward_heads(self, x: Tensor) -> HeadLogits:
        """The logits of x, (B, C, H, W) -> (B, num_classes) float32. Raises: ConfigError: x is no such batch."""
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


FLOAT32_TOLERANCE = 1e-4
"""By how much a logit of a float32 network may differ from the model's, or from the merged network's in torch."""
_ROUNDS, _ROUND_S, _JUDGES = 2, 0.5, 32
_DEFAULT_BATCH = {"throughput": 32, "latency": 1}


@dataclass(slots=True)
class _Trial:
    """Everything the candidates are tried with, and what has come of each so far."""

    model: ImageClassifier
    example: Tensor
    judges: Tensor
    calibration: Tensor | None
    pixels: bool
    min_agreement: float
    plan: tuple[int, ...] = ()
    tried: dict[tuple[BackendName, Precision], tuple[Runner, Agreement] | None] = field(default_factory=dict)
    worst: list[str] = field(default_factory=list)
    expected: Tensor | None = None

    def get(self, backend: BackendName, precision: Precision) -> tuple[Runner, Agreement] | None:
        """A runner that works and agrees; None after one log line that says why not."""
        if (backend, precision) not in self.tried:
            self.tried[backend, precision] = self._try(backend, precision)
        return self.tried[backend, precision]

    def _try(self, backend: BackendName, precision: Precision) -> tuple[Runner, Agreement] | None:
        try:
            with quiet(), torch.no_grad():
                run = BACKENDS[backend].build(self._job(backend, precision))
                run(self.example)
                agreement = self._judge(run)
        except Exception as error:  # noqa: BLE001  # whatever a compiler or a runtime raises: another backend takes over
            logger.warning("%s in %s is not used: %s", backend, precision, first_line(error))
            return None
        exact = precision == "float32"
        if agreement.max_abs_diff <= FLOAT32_TOLERANCE if exact else agreement.top1 >= self.min_agreement:
            return run, agreement
        found = f"logits differ by {agreement.max_abs_diff:.2g}" if exact else f"{agreement.top1:.1%} agree"
        wanted = f"{FLOAT32_TOLERANCE:g} is allowed" if exact else f"min_agreement={self.min_agreement:g} is asked for"
        self.worst.append(f"{backend} in {precision}: {found} on {agreement.images} images, {wanted}")
        logger.warning("not used: %s", self.worst[-1])
        return None

    def _job(self, backend: BackendName, precision: Precision) -> Job:
        dtype = network_dtype(backend, precision)
        prepared = prepare(self.model, pixels=self.pixels, dtype=dtype, token_merging=self.plan)
        return Job(prepared, self.example, precision, self.calibration)

    def merging_agreement(self) -> Agreement | None:
        """How the merged network agrees with the model, None if nothing is. Raises: AgreementError: too little."""
        if not self.plan:
            return None
        with exact_float32(self.judges.device):
            agreement = self._judge(prepare(self.model, pixels=self.pixels, fold=False))
        if agreement.top1 < self.min_agreement:
            raise AgreementError(
                f"token_merging={','.join(map(str, self.plan))}: {agreement.top1:.1%} agree with the unmerged model on "
                f"{agreement.images} images, min_agreement={self.min_agreement:g} is asked for; merge fewer tokens"
            )
        return agreement

    def _judge(self, run: Runner) -> Agreement:
        if self.expected is None:
            plain = prepare(self.model, pixels=self.pixels, fold=False, token_merging=self.plan)
            with exact_float32(self.judges.device):
                self.expected = torch.cat([plain(batch) for batch in torch.split(self.judges, len(self.example))])
        found = torch.cat([run(batch) for batch in torch.split(self.judges, len(self.example))])
        if found.shape != self.expected.shape or not found.isfinite().all():
            return Agreement(0.0, float("inf"), len(self.judges))
        same = (found.argmax(1) == self.expected.argmax(1)).double().mean()
        return Agreement(float(same), float((found - self.expected).abs().max()), len(self.judges))


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
    """A model that gives the same logits faster, by the backend that a short measurement finds best here.

    A backend that is not installed, has no compiler or fails costs one log line; torch itself is always left. What was
    measured is kept in the cache by configuration, batch size, processor and versions; agreement is checked each time.

    Args:
        model: in any mode, on the CPU or a GPU; left as it is.
        sample: a batch like those to come, or its number of images; default 32 for throughput, 1 for latency.
        precision: "float32" gives the model's logits within 1e-4. "bf16" and "int8" must agree, see `min_agreement`.
            "auto" takes bf16 where it is faster and agrees, and float32 otherwise. "int8" needs OpenVINO, NNCF and
            calibration images; where a library is missing, float32 is used.
        goal: compare images a second, or the median time of a call.
        backend: "auto" times all there are; one by name is used if it works, and torch itself otherwise.
        calibration: images to judge half precision and int8 by, and to find int8's ranges: a batch as the model takes
            it, or a list of files and other images. Without it the sample, or else random images, judge.
        min_agreement: share of those images whose likeliest class must be that of float32.
        preprocessing: take uint8 pixels and normalise inside.
        token_merging: patch tokens that every block merges into others like them, or those of each block in turn, see
            `deploy.merging`: faster, and other logits. The merged network in torch's float32 must agree with the model
            on `min_agreement` of the images, and is then what every backend and precision is compared with.
        cache_dir: where to keep what was measured; by default the Hub's cache.

    Raises: ConfigError: options that do not exist or do not fit. AgreementError: bf16, int8 or merging was asked for,
        and does not agree.
    """
    _check(precision, goal, backend, min_agreement)
    trial = _trial(model, sample, goal, calibration, preprocessing, min_agreement, token_merging)
    if precision == "int8" and trial.calibration is None:
        raise ConfigError(
            "precision='int8' needs calibration images: pass calibration=, a few hundred of those to come"
        )
    merging = trial.merging_agreement()
    candidates = _candidates(precision, backend, trial.example.device)
    access = Access(cache_dir=cache_dir)
    question = {
        "model": type(model).__name__, "config": repr(model.config), "batch": tuple(trial.example.shape), "goal": goal,
        "candidates": candidates, "pixels": preprocessing, "token_merging": trial.plan,
    }  # fmt: skip
    key = decision_key(question, trial.example.device)
    timings = recall(key, access) if len(candidates) > 1 else []
    if not timings:
        timings = _measure(trial, candidates, goal)
        if len(timings) > 1:
            keep(key, timings, access)
    return _best(trial, timings, precision, merging)


def _check(precision: str, goal: str, backend: str, min_agreement: float) -> None:
    for name, value, known in (
        ("precision", precision, ("auto", "float32", "bf16", "int8")),
        ("goal", goal, tuple(_DEFAULT_BATCH)),
        ("backend", backend, ("auto", *BACKENDS)),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value!r}; expected one of {', '.join(known)}{nearest(value, known)}")
    if not 0 <= min_agreement <= 1:
        raise ConfigError(f"min_agreement={min_agreement}; expected a share from 0 to 1")


def _trial(
    model: ImageClassifier,
    sample: Any,
    goal: str,
    calibration: Any,
    pixels: bool,
    min_agreement: float,
    token_merging: TokenMerging,
) -> _Trial:
    if isinstance(model, OptimizedClassifier):
        raise ConfigError("this model is optimised already; optimise the model it was made from")
    plan, device = merging_plan(model, token_merging), next(model.parameters()).device
    given = sample if isinstance(sample, Tensor) else None
    count = len(given) if given is not None else _DEFAULT_BATCH[goal] if sample is None else int(sample)
    if count < 1:
        raise ConfigError(f"sample={sample!r}; expected a batch of images, or how many are to come at once")
    example = _random_images(model, count, pixels=pixels) if given is None else given
    images = None if calibration is None else _as_batch(model, calibration, pixels=pixels)
    judges = images if images is not None else given
    judges = _random_images(model, max(_JUDGES, count), pixels=pixels) if judges is None else judges
    shape = (model.config.in_chans, *model.config.image_hw)
    for name, batch in (("sample", example), ("calibration", judges)):
        if batch.ndim != 4 or tuple(batch.shape[1:]) != shape or not len(batch):
            raise ConfigError(f"{name} of shape {tuple(batch.shape)}; expected (B, {', '.join(map(str, shape))})")
    return _Trial(model, example.to(device), judges.to(device), images, pixels, min_agreement, plan)


def _as_batch(model: ImageClassifier, images: Any, *, pixels: bool) -> Tensor:
    if isinstance(images, Tensor):
        return images.cpu()
    if model.origin is None:
        raise ConfigError("this model does not know its transform; pass calibration as a batch of tensors")
    transform = EvalTransform(model.origin.preprocessing, normalise=not pixels)
    return torch.stack([transform(image) for image in images])


def _random_images(model: ImageClassifier, count: int, *, pixels: bool) -> Tensor:
    """Smooth random images, since noise from pixel to pixel looks the same to a network whatever the seed."""
    generator = torch.Generator().manual_seed(0)
    chans, (height, width) = model.config.in_chans, model.config.image_hw
    coarse = torch.rand(count, chans, 5, 5, generator=generator)
    levels = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True) * 255
    return as_input(model, levels.to(torch.uint8), pixels=pixels)


def _candidates(precision: str, backend: str, device: torch.device) -> list[tuple[BackendName, Precision]]:
    wanted = precisions_here(device) if precision == "auto" else (precision,)
    return [
        (name, kind)
        for name, known in BACKENDS.items()
        if backend in ("auto", name) and device.type in known.devices
        for kind in known.precisions
        if kind in wanted
    ]


def _measure(trial: _Trial, candidates: list[tuple[BackendName, Precision]], goal: str) -> list[Timing]:
    """Time every candidate that works, fastest first.

    Each runs by itself for half a second, twice, in turns: the thread pools of two runtimes would disturb each other.
    """
    working = [candidate for candidate in candidates if trial.get(*candidate) is not None]
    if len(working) == 1:
        return [Timing(backend=working[0][0], precision=working[0][1], images_per_second=0.0, latency_ms=0.0)]
    times: dict[tuple[BackendName, Precision], list[float]] = {candidate: [] for candidate in working}
    for _ in range(_ROUNDS):
        for candidate in working:
            kept = trial.get(*candidate)
            if kept is not None:
                times[candidate] += call_times(kept[0], trial.example, seconds=_ROUND_S)
    count = len(trial.example)
    timings = [
        Timing(
            backend=backend,
            precision=precision,
            images_per_second=count * len(taken) / sum(taken),
            latency_ms=1000 * statistics.median(taken),
        )
        for (backend, precision), taken in times.items()
    ]
    return sorted(timings, key=lambda t: t.latency_ms if goal == "latency" else -t.images_per_second)


def _best(trial: _Trial, timings: list[Timing], precision: str, merging: Agreement | None) -> OptimizedClassifier:
    """The fastest that works and agrees; torch itself if nothing else does."""
    ways: list[tuple[BackendName, Precision]] = [(timing.backend, timing.precision) for timing in timings]
    if precision in ("bf16", "int8") and trial.worst and not any(trial.get(*way) for way in ways):
        raise AgreementError("; ".join(trial.worst))
    for way in [*ways, ("eager", "float32")]:
        kept = trial.get(*way)
        if kept is not None:
            choice = Choice(
                backend=way[0], precision=way[1], agreement=kept[1], timings=tuple(timings),
                token_merging=trial.plan, merging_agreement=merging,
            )  # fmt: skip
            device = trial.example.device
            return OptimizedClassifier(trial.model, kept[0], choice, device=device, pixels=trial.pixels)
    raise AgreementError("; ".join(trial.worst) or "no backend could compute this model, not even torch itself")
