"""Facts about models and weights: preprocessing, origin, and `weights/manifest.toml`. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

from .config import is_finite
from .errors import ConfigError, ManifestError, shown
from .files import parse_toml, tuples

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""Meaning of the logits, by transformers' names: one class an image, several labels at once, or plain values."""
Layout = Literal["native", "timm", "timm-conv", "transformers"]
"""Whose tensor names and config.json; "timm-conv" is timm's second form of LeViT, with 1x1 convolutions."""

SCHEMA = 1
DEFAULT_TEACHER = "regnety_160"
"""The teacher of DeiT (section 5.2) and of LeViT, among those of the manifest."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Crop ratios that published checkpoints were evaluated with.
_USUAL_RATIOS = (0.875, 0.9, 0.95, 1.0)
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
"""Pillow's filters."""
_NO_RESIZE = "none"
_LONGEST_SIDE, _LARGEST_MEAN, _STD_RANGE = 4_096, 1e6, (1e-6, 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Evaluation transform of a checkpoint, as numbers; `images.transforms.EvalTransform` carries it out.

    Attributes:
        resize: shorter side in pixels, aspect kept; or (height, width); or None: not resized.
        fit: of a (height, width): "squash" gives up the aspect; "cover", as in timm, keeps it, one side may be longer.
        crop: (height, width) of the centre crop in pixels; a smaller image gets a black border.
        interpolation: one of `INTERPOLATIONS`.
        rounding: of a half pixel beside the crop, "even" as torchvision does it, or "down" as transformers.
        mean, std: per channel, on values from 0 to 1. Mean 0 and std 1 leave them as they are, std 1/255 gives pixels.

    Raises: ConfigError: a value of another type, or out of range.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int]
    fit: Literal["squash", "cover"] = "squash"
    interpolation: str = "bicubic"
    rounding: Literal["even", "down"] = "even"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("resize", "crop", "mean", "std"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if not (self.resize is None or _is_side(self.resize) or _are_sides(self.resize)):
            raise ConfigError(f"resize={self.resize!r}; expected pixels, one number or two, 1 to {_LONGEST_SIDE}")
        if not _are_sides(self.crop):
            raise ConfigError(f"crop={self.crop!r}; expected height and width in pixels, 1 to {_LONGEST_SIDE}")
        if self.fit not in ("squash", "cover"):
            raise ConfigError(f"fit={self.fit!r}; expected 'squash' or 'cover'")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"interpolation={self.interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}")
        if self.rounding not in ("even", "down"):
            raise ConfigError(f"rounding={self.rounding!r}; expected 'even' or 'down'")
        mean, std = self.mean, self.std
        numbers = isinstance(mean, tuple) and isinstance(std, tuple) and all(map(is_finite, (*mean, *std)))
        low, high = _STD_RANGE
        if not numbers or len(mean) != len(std) or not all(low <= abs(value) <= high for value in std):
            raise ConfigError(f"mean={mean!r}, std={std!r}; expected one each a channel, no 0 and nothing infinite")
        if not mean or max(map(abs, mean)) > _LARGEST_MEAN:
            raise ConfigError(f"mean={mean!r}; expected one each a channel, at most {_LARGEST_MEAN:g}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`; a list becomes a tuple. Raises: ConfigError: an unknown, missing or bad field."""
        known = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or not {"resize", "crop"} <= set(data) <= known:
            found = sorted(data) if isinstance(data, Mapping) else repr(data)
            raise ConfigError(f"preprocessing has fields {found}; expected some of {sorted(known)}")
        given = tuples(data)
        return cls(**{**given, "resize": None if given["resize"] == _NO_RESIZE else given["resize"]})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and TOML."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        plain = {
            key: value for key, value in plain.items() if (key, value) not in (("rounding", "even"), ("fit", "squash"))
        }
        return plain | ({"resize": _NO_RESIZE} if self.resize is None else {})

    def __str__(self) -> str:
        resize = f"resize shorter side to {self.resize}"
        if isinstance(self.resize, tuple):
            resize = f"{'resize to' if self.fit == 'squash' else 'resize to cover'} {self.resize[0]}x{self.resize[1]}"
        resize = "no resize" if self.resize is None else f"{resize} ({self.interpolation})"
        return f"{resize}, centre crop {self.crop[0]}x{self.crop[1]}"

    def at_size(self, crop: tuple[int, int]) -> Preprocessing:
        """The same preprocessing for another input size, keeping the ratio of crop to resize.

        The shorter side is rounded down, as the authors do: 224 -> 256, 384 -> 438 at a ratio of 0.875.
        """
        if crop == self.crop:
            return self
        if self.resize is None:
            return replace(self, crop=crop)
        if isinstance(self.resize, int):
            return replace(self, crop=crop, resize=int(max(crop) / usual_ratio(max(self.crop), self.resize)))
        height, width = (new * old // was for new, old, was in zip(crop, self.resize, self.crop, strict=True))
        return replace(self, crop=crop, resize=(height, width))

    def for_channels(self, channels: int) -> Preprocessing:
        """The same preprocessing for images of so many channels; a number a channel is averaged where it has to be."""
        if channels == len(self.mean) == len(self.std):
            return self
        mean, std = sum(self.mean) / len(self.mean), sum(self.std) / len(self.std)
        return replace(self, mean=(mean,) * channels, std=(std,) * channels)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LONGEST_SIDE


def _are_sides(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_side, value))


def usual_ratio(crop: int, resize: int) -> float:
    """Crop to shorter side, which was rounded down: one of the usual ratios, if one fits."""
    return next((ratio for ratio in _USUAL_RATIOS if int(crop / ratio) == resize), crop / resize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Facts about the weights of one model; `None` where unknown.

    Attributes:
        name: the registered model it is a variant of.
        preprocessing: the evaluation transform of these weights.
        class_names: a name for each logit, where the checkpoint brings them.
        problem_type: meaning of the logits, where the checkpoint brings it; None: one class an image.
        thresholds: probability of each class from which an image has that label, for several labels an image; None:
            0.5.
        dataset: what the weights were trained on; None for random weights.
        top1: accuracy of these very weights on that data's test images, in percent.
        top5: likewise.
        licence: SPDX identifier of the weights.
        source: where the weights came from; None for random weights.
        revision: commit of the Hub repository they came from.
        sha256: digest of the weights file, where it was computed.
        notes: how these weights were made, in Markdown, for the model card.
        base: Hub repository whose weights these were fine-tuned from.
    """

    name: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    problem_type: Problem | None = None
    thresholds: tuple[float, ...] | None = None
    dataset: str | None = None
    top1: float | None = None
    top5: float | None = None
    licence: str | None = None
    source: str | None = None
    revision: str | None = None
    sha256: str | None = None
    notes: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        if self.problem_type not in (None, *get_args(Problem)):
            raise ConfigError(f"problem_type={self.problem_type!r}; expected one of {', '.join(get_args(Problem))}")
        for name in ("name", "dataset", "licence", "source", "revision", "sha256", "notes", "base"):
            if not isinstance(value := getattr(self, name), str) and (value is not None or name == "name"):
                raise ConfigError(f"{name}={shown(value)}; expected a text")
        chosen = self.thresholds
        if chosen is not None and not (isinstance(chosen, tuple) and all(is_finite(x) and 0 <= x <= 1 for x in chosen)):
            raise ConfigError(f"thresholds={shown(chosen)}; expected a probability for each class")
        for name in ("top1", "top5"):
            if (value := getattr(self, name)) is not None and not (is_finite(value) and 0 <= value <= 100):
                raise ConfigError(f"{name}={shown(value)}; expected percent, from 0 to 100")

    @property
    def non_commercial(self) -> bool:
        """Whether the licence forbids commercial use, by its SPDX identifier."""
        return self.licence is not None and "-NC" in self.licence

    def loaded(self, source: str, *, revision: str | None, sha256: str | None) -> Origin:
        """The same weights, read from a file."""
        return replace(self, source=source, revision=revision, sha256=sha256)

    def adapted(
        self, image_hw: tuple[int, int], *, class_names: tuple[str, ...] | None, dataset: str | None, new_heads: bool
    ) -> Origin:
        """Weights fitted to another input size or other classes: no accuracy, digest or notes of the old ones."""
        fitted = replace(self, preprocessing=self.preprocessing.at_size(image_hw), top1=None, top5=None)
        problem = None if new_heads else self.problem_type
        kept = self.thresholds if not new_heads and class_names == self.class_names else None
        fitted = replace(fitted, class_names=class_names, problem_type=problem, thresholds=kept)
        return replace(fitted, dataset=dataset, sha256=None, notes=None)

    @property
    def multi_label(self) -> bool:
        """Whether the logits stand for several labels at once."""
        return self.problem_type == "multi_label_classification"

    def check_labels(self, several: bool, work: str, *, begins: bool = False) -> None:
        """Raise ConfigError where the logits stand for other labels than an image's one class, or its `several`.

        `begins`: the weights are a start, and those for one class may learn several.
        """
        if self.problem_type == "regression" or (self.multi_label != several and not (begins and several)):
            kind = self.problem_type or "one class for each image"
            raise ConfigError(
                f"the model is for {kind}, {work} needs {'several labels' if several else 'one class'} for each image; "
                f"adapt_head(model, num_classes=N) makes new heads"
            )

    def unknown(self) -> Origin:
        """Other weights of the same model, of which nothing is known.

        A licence that forbids commercial use is kept all the same: some authors publish bare files only.
        """
        licence = self.licence if self.non_commercial else None
        return Origin(name=self.name, preprocessing=self.preprocessing, licence=licence)

    def trained(
        self,
        dataset: str,
        *,
        class_names: tuple[str, ...] | None,
        top1: float | None = None,
        top5: float | None = None,
        notes: str | None = None,
        multi_label: bool = False,
        thresholds: tuple[float, ...] | None = None,
    ) -> Origin:
        """Weights trained here on a dataset; name, preprocessing and licence stay, and their start becomes `base`."""
        return Origin(
            name=self.name,
            preprocessing=self.preprocessing,
            licence=self.licence,
            dataset=dataset,
            class_names=class_names,
            problem_type="multi_label_classification" if multi_label else None,
            thresholds=thresholds,
            top1=top1,
            top5=top5,
            notes=notes,
            base=self.base if self.revision is None else self.source,
        )


class ModelLike(Protocol):
    """An image classifier, as far as the rows above `models/` need it; `models.layers.ImageClassifier` fits."""

    family: ClassVar[str]
    config: Any
    origin: Origin | None

    def __init__(self, config: Any) -> None: ...

    @property
    def num_classes(self) -> int:
        """Number of logits."""

    def __call__(self, x: Any) -> Any:
        """Logits of images."""

    def eval(self) -> Any:
        """Switch to eval mode, in place."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""

    def parameters(self) -> Iterator[Any]:
        """Trained tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One place a checkpoint is published: exactly one of `file`, `repo`, `url` is set.

    Attributes:
        file: a file shipped in `weights/`.
        repo: a Hub repository, with `revision` the commit to use (a branch until a commit is recorded).
        url: a plain download.
        layout: tensor names, "native" (the authors'), "timm" or "transformers".
        payload: key of the state dict inside a `.pth`.
        sha256: full digest of the weights file, once recorded.
        sha256_prefix: leading digits known from the authors' file name.
    """

    layout: Literal["native", "timm", "transformers"]
    file: str | None = None
    repo: str | None = None
    url: str | None = None
    revision: str = "main"
    payload: str | None = None
    sha256: str | None = None
    sha256_prefix: str | None = None

    def __str__(self) -> str:
        if self.repo is not None:
            return self.repo
        return self.url if self.url is not None else f"weights/{self.file}"

    @property
    def digest(self) -> str | None:
        """The known digits of the file's SHA-256: all, the first ones, or none."""
        return self.sha256 or self.sha256_prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts about a registered model and, where `sources` is not empty, its published weights.

    Attributes:
        name: registered model name.
        family: file under `models/` that defines it.
        params: number of parameters, heads included.
        macs: multiply-accumulates of one image through matrix products and convolutions, all heads.
        input_size: side of the input in pixels.
        num_classes: logits; 0: a backbone without a head, whose result are features.
        dataset: what the weights were trained on, and the accuracies (percent) measured on.
        knn_top1, linear_top1: of the features: `scoring.embeddings.knn_accuracy`; by a linear layer, not in the file.
        preprocessing: the authors' evaluation transform.
        timm_crop_pct: the crop ratio timm evaluates the same weights with.
        licence: SPDX identifier of the weights.
        paper: where the model was published.
        class_names: where they are not those of ImageNet-1k.
        reference_logits: first logits for `hub.weights.reference_input`, once recorded.
        sources: where the weights are, in the order they are tried.
    """

    name: str
    family: str
    params: int
    macs: int
    input_size: int
    num_classes: int
    preprocessing: Preprocessing
    distilled: bool = False
    dataset: str | None = None
    top1: float | None = None
    top5: float | None = None
    knn_top1: float | None = None
    linear_top1: float | None = None
    timm_crop_pct: float | None = None
    licence: str | None = None
    paper: str | None = None
    note: str | None = None
    class_names: tuple[str, ...] | None = None
    reference_logits: tuple[float, ...] | None = None
    sources: tuple[Source, ...] = ()

    @property
    def accuracies(self) -> dict[str, float]:
        """The published accuracies in percent, by what they measure."""
        kinds = {"top-1": "top1", "top-5": "top5", "k-NN top-1": "knn_top1", "linear-probe top-1": "linear_top1"}
        return {kind: value for kind, name in kinds.items() if (value := getattr(self, name)) is not None}

    @property
    def origin(self) -> Origin:
        """Origin of the published weights, before they are loaded."""
        return Origin(
            name=self.name,
            preprocessing=self.preprocessing,
            class_names=self.class_names,
            dataset=self.dataset,
            top1=self.top1,
            top5=self.top5,
            licence=self.licence,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInfo:
    """Published weights for a network of torchvision, to distil from.

    Attributes:
        name: by which a teacher is asked for.
        network: name of torchvision's network.
        num_classes: logits.
        licence: SPDX identifier of the weights.
        sources: where the weights are, in the order they are tried.
    """

    name: str
    network: str
    num_classes: int
    licence: str | None = None
    sources: tuple[Source, ...] = ()


@cache
def weights_dir() -> Path:
    """The folder of the manifest and the shipped weights.

    In a wheel it lies inside the package, in a checkout (also one used by torch.hub) beside it.
    Raises: ManifestError: neither place has a manifest.
    """
    return _weights_of(Path(__file__).resolve().parent)


def _weights_of(package: Path) -> Path:
    for folder in (package / "weights", package.parent / "weights"):
        if (folder / "manifest.toml").is_file():
            return folder
    raise ManifestError(
        f"no weights/manifest.toml in or beside {package}; the installation is incomplete, reinstall it"
    )


@cache
def load_manifest() -> Mapping[str, ModelInfo]:
    """Tables of the manifest by model name. Raises: ManifestError: see `parse_manifest`."""
    return parse_manifest((weights_dir() / "manifest.toml").read_text(encoding="utf-8"))


@cache
def load_teachers() -> Mapping[str, TeacherInfo]:
    """Teachers of the manifest by name. Raises: ManifestError: see `parse_manifest`."""
    return parse_teachers((weights_dir() / "manifest.toml").read_text(encoding="utf-8"))


def parse_teachers(text: str) -> dict[str, TeacherInfo]:
    """Read and check a manifest's teachers. Raises: ManifestError: see `parse_manifest`."""
    tables = _manifest_of(text).get("teacher", {})
    return {name: _read_table(f"teacher.{name}", table, TeacherInfo) for name, table in tables.items()}


def parse_manifest(text: str) -> dict[str, ModelInfo]:
    """Read and check a manifest. Raises: ManifestError: not TOML, another schema, an unknown or missing field."""
    tables = _manifest_of(text).get("model", {})
    return {name: _read_table(f"model.{name}", table, ModelInfo) for name, table in tables.items()}


def _manifest_of(text: str) -> dict[str, Any]:
    try:
        data = parse_toml(text)
    except ConfigError as error:
        raise ManifestError(f"manifest.toml is not valid TOML: {error.__cause__}") from error
    if data.get("schema") != SCHEMA:
        raise ManifestError(f"manifest.toml has schema {data.get('schema')!r}; this version reads {SCHEMA}")
    return data


_Info = TypeVar("_Info", ModelInfo, TeacherInfo)


def _read_table(place: str, table: Any, kind: type[_Info]) -> _Info:
    if not isinstance(table, dict):
        raise ManifestError(f"manifest.toml, {place}: expected a table")
    table = tuples(table)
    try:
        sources: tuple[Source, ...] = tuple(Source(**source) for source in table.pop("source", ()))
        if kind is ModelInfo:
            table["preprocessing"] = Preprocessing.from_dict(table.pop("eval"))
        info: _Info = kind(name=place.partition(".")[2], sources=sources, **table)
        _check_types(info)
        for source in sources:
            _check_types(source)
    except (TypeError, KeyError, ConfigError) as error:
        raise ManifestError(f"manifest.toml, table {place}: {error}") from error
    for source in sources:
        if source.layout not in ("native", "timm", "transformers"):
            raise ManifestError(f"manifest.toml, table {place}: unknown layout {source.layout!r}")
        if sum(at is not None for at in (source.file, source.repo, source.url)) != 1:
            raise ManifestError(f"manifest.toml, table {place}: a source needs exactly one of file, repo, url")
    return info


_TYPES = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}


def _check_types(entry: ModelInfo | TeacherInfo | Source) -> None:
    """Raise ConfigError for a plain field, or a list of such, that is of another type than its annotation."""
    for field in fields(entry):
        value, said = getattr(entry, field.name), str(field.type)
        plain = said.removesuffix(" | None")
        one = _TYPES.get(plain.removeprefix("tuple[").removesuffix(", ...]"))
        if one is None or (value is None and plain != said):
            continue
        values = value if plain.startswith("tuple[") else (value,)
        if not isinstance(values, tuple) or any(type(item) not in one for item in values):
            raise ConfigError(f"{field.name}={shown(value)}; expected {said}")


def find_repo(repo_id: str) -> tuple[ModelInfo, Source] | None:
    """The model whose published weights a Hub repository holds, if the manifest lists it."""
    for info in load_manifest().values():
        for source in info.sources:
            if source.repo == repo_id:
                return info, source
    return None
