"""Teachers for distillation: any frozen network, given the student's batch in its own normalisation.

Source: DeiT, section 3: the teacher labels the same batch as the student gets, augmented and mixed.
"""

from __future__ import annotations

import copy
import logging
import pkgutil
import re
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models as torchvision_models

from ..checkpoint import DEFAULT_TEACHER, IMAGENET_MEAN, IMAGENET_STD, Preprocessing, Source, TeacherInfo, load_teachers
from ..config import nearest
from ..errors import CheckpointError, ConfigError, FetchError, TrainingError, UnknownModelError, first_line
from ..formats.family import FamilyLayouts, Mapped, Naming
from ..hub.fetch import Access, first_sound
from ..hub.load import from_pretrained, source_file
from ..hub.payload import Expected
from ..hub.weights import read_tensors, read_uncached, verified_state
from ..models.layers import HeadLogits, ImageClassifier, check_has_classes
from ..recipes.recipe import Precision
from ..registry import list_models

logger = logging.getLogger(__name__)

Network = Callable[[Tensor], Any]
_Found = tuple[Network, Sequence[float] | None, Sequence[float] | None]
"""A network, and the mean and std it was trained with where they are known."""
PathOrName = str | PathLike[str]
TeacherSpec = PathOrName | Network
"""A name, a folder or repository, "module:factory", "file.py:factory", a module or another callable."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(nn.Module):
    """A network that is called without gradient; a module is frozen and stays in eval mode, in place.

    Args:
        network: takes (B, 3, H, W); gives (B, K) logits, or our heads (their mean is taken), or a record with `logits`.
        student: normalisation of the student's input.
        mean: the network's own, per channel; default: the student's.
        std: likewise.
        img_size: (height, width) to resize batches to; by default the size of a network that takes one size only.
        precision: bf16 and fp16 store the weights of convolutions and linear layers in that type and use autocast for
            the rest; autocast alone would cast frozen weights again at every call.
        channels_last: memory format of convolutions.

    Raises: ConfigError: mean and std that are not one number a channel, std above 0; an unknown precision.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: Network,
        *,
        student: Preprocessing,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        img_size: tuple[int, int] | None = None,
        precision: Precision = "float32",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if precision not in ("float32", *_DTYPES):
            raise ConfigError(f"precision={precision!r} of the teacher; expected float32, bf16 or fp16")
        mean, std = tuple(mean or student.mean), tuple(std or student.std)
        if len(mean) != len(student.mean) or len(std) != len(student.std) or min(std) <= 0:
            raise ConfigError(f"teacher's mean {mean} and std {std}; expected {len(student.mean)} numbers, std above 0")
        self.renormalises = (mean, std) != (tuple(student.mean), tuple(student.std))
        # ((x * student_std + student_mean) - mean) / std as one product and one sum
        scale = [ours / theirs for ours, theirs in zip(student.std, std, strict=True)]
        shift = [(ours - theirs) / by for ours, theirs, by in zip(student.mean, mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, -1, 1, 1), persistent=False)
        self.network = network
        self.img_size = img_size or _only_size(network)
        self.dtype = _DTYPES.get(precision)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if isinstance(network, nn.Module):
            network.float().to(memory_format=self.memory_format)
            # norms and their running statistics stay in float32
            for module in network.modules():
                if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    module.to(dtype=self.dtype)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002
        """Eval mode in any case: dropout stays off, running statistics stay as they are."""
        return super().train(False)

    @torch.no_grad()
    def run(self, x: Tensor, network: Network | None = None) -> Any:
        """The output of the network, or of another one, for a batch in the student's normalisation (B, 3, H, W)."""
        x = x.float()
        if self.renormalises:
            x = torch.addcmul(self.shift, x, self.scale)
        if self.img_size is not None and self.img_size != tuple(x.shape[-2:]):
            x = F.interpolate(x, size=self.img_size, mode="bicubic", align_corners=False, antialias=True)
        # in place of the caller's autocast
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return (network or self.network)(x.contiguous(memory_format=self.memory_format))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch in the student's normalisation: (B, 3, H, W) -> (B, K) float32, without gradient.

        Raises: TrainingError: the output of the network is not (B, K) logits.
        """
        logits = _logits_of(self.run(x))
        if logits.ndim != 2 or logits.shape[0] != x.shape[0]:
            raise TrainingError(
                f"the teacher gives {tuple(logits.shape)} for {len(x)} images; expected (images, classes)"
            )
        # a network that works in inference mode gives tensors that autograd refuses to save
        return logits.float().clone() if logits.is_inference() else logits.float()


def _only_size(network: Network) -> tuple[int, int] | None:
    """(height, width) for our models and torchvision's ViTs that take one size only; else None."""
    if isinstance(network, ImageClassifier) and not getattr(network.config, "dynamic_img_size", False):
        return tuple(network.config.image_hw)
    if isinstance(network, torchvision_models.VisionTransformer):
        return network.image_size, network.image_size
    return None


def _logits_of(output: Any) -> Tensor:
    if isinstance(output, HeadLogits):
        return output.mean
    logits = getattr(output, "logits", output)  # of torchvision's Inception and of transformers
    if not isinstance(logits, Tensor):
        raise TrainingError(f"the teacher gives {type(output).__name__}; wrap it in a function that gives logits")
    return logits


def load_teacher(
    spec: TeacherSpec | Teacher,
    *,
    num_classes: int,
    student: Preprocessing,
    weights: PathOrName | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    img_size: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    channels_last: bool = True,
) -> Teacher:
    """A teacher from a name, a place or a network; tried out on a blank batch.

    Args:
        spec: looked up in this order: a registered name of this package (`list_models()`); "regnety_160", the papers'
            teacher, with its published weights or those of a file; a classification model of torchvision,
            "regnet_y_16gf" or "torchvision:regnet_y_16gf"; "package.module:factory" or "path/to/file.py:factory", a
            function without arguments that returns a module or callable (this runs that code with all your rights: name
            only what you trust); a folder, file or Hub repository for `from_pretrained`. Or a module, which is copied
            and not changed; any other callable; a `Teacher`, used as it is.
        num_classes: number of logits the teacher must give.
        student: normalisation of the student's input, and its size (`crop`).
        weights: a file, for registered names, torchvision models and factories; no code in a .pth is run. For
            torchvision also the name of published weights; by default the best. Of a RegNet also with timm's names.
        mean: see `Teacher`; by default that of our or torchvision's published weights, ImageNet's for torchvision
            models from a file, the student's for everything else.
        std: likewise.
        img_size: see `Teacher`.
        device: of the teacher.
        precision: see `Teacher`.
        channels_last: see `Teacher`.

    Raises: TrainingError: other classes, or it does not run. UnknownModelError: no such teacher. CheckpointError:
        damaged or foreign weights. FetchError: no such file, or no download. ConfigError: options that do not fit.
    """
    if not isinstance(spec, Teacher):
        # building it must not change which random numbers the student draws
        with torch.random.fork_rng(devices=[]):
            network, own_mean, own_std = _find(spec, weights, num_classes)
        mean, std = mean or own_mean, std or own_std
        options: dict[str, Any] = {"img_size": img_size, "precision": precision, "channels_last": channels_last}
        spec = Teacher(network, student=student, mean=mean, std=std, **options)
    _try_out(spec.to(device), num_classes=num_classes, student=student)
    return spec


def default_teacher(num_classes: int) -> str:
    """The papers' teacher, with a log line. Raises: TrainingError: it has other classes than the data."""
    if (known := load_teachers()[DEFAULT_TEACHER].num_classes) != num_classes:
        raise TrainingError(
            f"the recipe needs a teacher; the papers', {DEFAULT_TEACHER}, has {known} classes, the data {num_classes}: "
            f"pass teacher=... (deit-models distill --teacher NAME), or distillation='none' (--distillation none)"
        )
    logger.warning("the recipe distils and no teacher is given: taking the papers', %s", DEFAULT_TEACHER)
    return DEFAULT_TEACHER


def _try_out(teacher: Teacher, *, num_classes: int, student: Preprocessing) -> None:
    # two images, because some networks drop a batch dimension of one
    blank = torch.zeros(2, len(student.mean), *student.crop, device=teacher.scale.device)
    try:
        logits = teacher(blank)
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError) as error:
        size = f"{tuple(blank.shape)} (for another size pass img_size)"
        raise TrainingError(f"the teacher fails on images of shape {size}: {first_line(error)}") from error
    if logits.shape[1] != num_classes:
        raise _other_classes(logits.shape[1], num_classes)
    if not logits.isfinite().all():
        raise TrainingError("the teacher gives NaN or infinity for a blank image; try precision='float32' or 'bf16'")


def _other_classes(given: int, expected: int) -> TrainingError:
    advice = "both need the same, in the same order: fine-tune the teacher on this data, then pass its weights"
    return TrainingError(f"the teacher has {given} classes, the student's data {expected}; {advice}")


def _find(spec: TeacherSpec, weights: PathOrName | None, num_classes: int) -> _Found:
    if not isinstance(spec, (str, PathLike)):
        if weights is not None:
            raise ConfigError("weights belong to a teacher that is named; load them into the network yourself")
        return _described(copy.deepcopy(spec) if isinstance(spec, nn.Module) else spec)
    name, known = fspath(spec), [*load_teachers(), *torchvision_models.list_models(module=torchvision_models)]
    bare = name.removeprefix("torchvision:")
    if name in list_models():
        if weights is None and name not in list_models(pretrained=True):
            raise TrainingError(f"no weights of {name} are published; pass weights=FILE of a trained one")
        return _described(from_pretrained(name) if weights is None else from_pretrained(weights, model=name))
    if bare in known:
        return _from_torchvision(bare, weights, num_classes)
    if bare == name and (factory := re.fullmatch(r"(.+):([A-Za-z_]\w*)", name)):
        network = _resolve(*factory.groups())()
        return _described(network if weights is None else _from_file(network, Path(weights), num_classes))
    if bare == name and ("/" in name or Path(name).exists()):
        if name.endswith(".py"):
            raise ConfigError(f"{name} names no factory; pass {name}:NAME, a function that returns the teacher")
        if weights is not None:
            raise ConfigError(f"weights={fspath(weights)!r} with the teacher {name!r}, which brings its own; pass one")
        return _described(from_pretrained(spec))
    raise UnknownModelError(f"unknown teacher {name!r}{nearest(bare, [*list_models(), *known])}")


def _described(network: Any) -> _Found:
    if not callable(network):
        raise ConfigError(f"{type(network).__name__} is no teacher; expected a name, a module or a callable")
    if isinstance(network, ImageClassifier):
        check_has_classes(network)
    origin = network.origin if isinstance(network, ImageClassifier) else None
    if origin is not None:
        origin.check_labels(False, "a teacher")
    return (network, None, None) if origin is None else (network, origin.preprocessing.mean, origin.preprocessing.std)


def _from_torchvision(name: str, weights: PathOrName | None, num_classes: int) -> _Found:
    if (info := load_teachers().get(name)) is not None:
        if weights is None:
            return _published(info, num_classes)
        name = info.network
    published = torchvision_models.get_model_weights(name)
    wanted = "DEFAULT" if weights is None else fspath(weights).removeprefix(f"{published.__name__}.")
    if wanted in published.__members__:
        chosen = published[wanted]
        if (known := len(chosen.meta["categories"])) != num_classes:  # told before hundreds of megabytes are fetched
            raise _other_classes(known, num_classes)
        try:
            network = torchvision_models.get_model(name, weights=chosen, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise FetchError(f"{chosen.url} could not be fetched: {first_line(error)}") from error
        return network, chosen.transforms().mean, chosen.transforms().std
    if not (path := Path(wanted)).suffix and not path.exists():
        raise ConfigError(f"unknown weights {wanted!r} of {name}{nearest(wanted, published.__members__)}")
    network = torchvision_models.get_model(name, weights=None, num_classes=num_classes)
    return _from_file(network, path, num_classes), IMAGENET_MEAN, IMAGENET_STD


def _published(info: TeacherInfo, num_classes: int) -> _Found:
    """A teacher of the manifest, from the first source that is there and sound."""
    if info.num_classes != num_classes:  # told before hundreds of megabytes are fetched
        raise _other_classes(info.num_classes, num_classes)
    network = torchvision_models.get_model(info.network, weights=None, num_classes=num_classes)

    def fill(source: Source, access: Access) -> nn.Module:
        file, digest = source_file(source, access)
        expected = _expected(network)
        options: dict[str, Any] = {"digest": digest, "payload": source.payload, "expected": expected}
        tensors, _ = read_tensors(file, access, source=str(source), **options)
        return _filled(network, tensors, str(source), num_classes)

    return first_sound(info.name, info.sources, Access(), fill), IMAGENET_MEAN, IMAGENET_STD


class _RegNetLayouts(FamilyLayouts):
    """timm's names of tensors for torchvision's RegNets, which the authors' teacher has, too."""

    signs: ClassVar[Mapping[Naming, str]] = {"timm": r"s1\.b1\.conv1\."}
    _PLACES: ClassVar[dict[str, str]] = {
        r"^stem\.0\.": "stem.conv.",
        r"^stem\.1\.": "stem.bn.",
        r"^fc\.": "head.fc.",
        r"\.proj\.0\.": ".downsample.conv.",
        r"\.proj\.1\.": ".downsample.bn.",
        r"\.f\.se\.": ".se.",
    }

    def other_names(self, name: str, naming: Naming, config: Any) -> tuple[str, ...]:  # noqa: ARG002
        """See the base class."""
        stage, block = re.match(r"trunk_output\.block(\d+)\.block\d+-(\d+)", name), 0
        if stage:
            name, block = name[stage.end() :], int(stage[2]) + 1
        for place, theirs in self._PLACES.items():
            name = re.sub(place, theirs, name)
        part = re.match(r"\.f\.([abc])\.([01])\.", name)
        if part:
            name = f".conv{'abc'.index(part[1]) + 1}.{('conv', 'bn')[int(part[2])]}.{name[part.end() :]}"
        return (f"s{stage[1]}.b{block}{name}" if stage else name,)


def _expected(network: nn.Module) -> Expected:
    return Expected(network, _RegNetLayouts("regnet") if isinstance(network, torchvision_models.RegNet) else None)


def _resolve(place: str, name: str) -> Callable[[], Any]:
    try:
        found = runpy.run_path(place)[name] if place.endswith(".py") else pkgutil.resolve_name(f"{place}:{name}")
    except (ImportError, AttributeError, ValueError, KeyError, OSError) as error:
        raise UnknownModelError(f"no teacher {place}:{name} ({type(error).__name__}: {first_line(error)})") from error
    if not callable(found):
        raise ConfigError(f"{place}:{name} is {type(found).__name__}; expected a function that returns the teacher")
    return found


def _from_file(network: Any, path: Path, num_classes: int) -> nn.Module:
    """The network with the weights of a file. Raises: CheckpointError: they are damaged, or another network's."""
    if not isinstance(network, nn.Module):
        raise ConfigError(f"weights cannot be loaded into {type(network).__name__}; expected a module")
    if not path.is_file():
        raise FetchError(f"{path}: no such weights file")
    return _filled(network, read_uncached(path, _expected(network)), str(path), num_classes)


def _filled(network: nn.Module, tensors: Mapping[str, Tensor], source: str, num_classes: int) -> nn.Module:
    """The network with these tensors, which it takes over. Raises: CheckpointError: they are another network's."""
    layouts, names = _expected(network).layouts, network.state_dict()
    mapped = layouts.to_native(tensors, names, config=None) if layouts else Mapped(dict(tensors), [], [], [])
    # whole numbers are counters of batches, and tables that a network computes itself
    own, given = ({k: t for k, t in s.items() if t.is_floating_point()} for s in (names, mapped.tensors))
    missing = mapped.missing or sorted(own.keys() - given)
    unexpected = mapped.unexpected or sorted(given.keys() - own)
    uneven = [k for k in own.keys() & given if given[k].shape != own[k].shape]
    heads = {given[k].shape[:1].numel() if given[k].shape[1:] == own[k].shape[1:] else 0 for k in uneven}
    if len(heads) == 1 and 0 not in heads and not missing and not unexpected:
        raise _other_classes(heads.pop(), num_classes)
    try:
        state = verified_state(Mapped({k: given[k] for k in own if k in given}, missing, unexpected, []), network)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    # not load_state_dict: some torchvision models refuse tensors without a version there
    for name, tensor in state.items():
        own[name].copy_(tensor)
    return network
