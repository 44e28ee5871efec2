"""Images in, labelled probabilities out: one image, a list of them, or a folder of a million."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, overload

import PIL.Image
import torch
from torch import Tensor

from .batches.loading import FileBatch, Watch, check_workers, file_batches, plain_watch
from .data.sources import find_images as find_images
from .data.sources import image_sources
from .distributed import own_device
from .errors import ConfigError, DeitModelsError, ImageError
from .files import digest_of_numbers
from .images.decoding import ImageSource
from .images.transforms import to_device, transform_for
from .models.layers import ImageClassifier, check_has_classes
from .registry import DEFAULT_MODEL, own_model
from .scoring.embeddings import EmbeddedFiles, check_features_file, write_features
from .scoring.evaluation import class_labels, eval_mode
from .scoring.metrics import UNSURE

logger = logging.getLogger(__name__)

Computed = TypeVar("Computed")


class Classifier:
    """A model with its own transform and class names; attributes `model`, `transform`, `labels` and `thresholds`."""

    def __init__(
        self,
        model: str | PathLike[str] | ImageClassifier = DEFAULT_MODEL,
        /,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
        fast_pixels: bool = False,
        labels: Sequence[str] | None = None,
        **load_options: Any,
    ) -> None:
        """Load a model, or take one.

        Args:
            model: a name, path or Hub repository for `from_pretrained`, or a model, which is put in eval mode.
            device: where to run. By default a named model goes to the GPU if there is one; a given model stays.
            dtype: floating-point type of the parameters; probabilities are float32 in any case.
            batch_size: images that go through the model at once; halved, with a log line, where memory is short.
            fast_pixels: decode and resize faster to nearly the same pixels, see `EvalTransform`.
            labels: a name for each class; default: the checkpoint's.
            **load_options: further keywords of `from_pretrained`, e.g. revision="...", or model="..." for a bare file.

        Raises: ConfigError: labels that do not fit the classes, a bad batch size, load options for a loaded model;
            and the errors of `from_pretrained`.
        """
        if not 1 <= batch_size < 1 << 31:
            raise ConfigError(f"batch_size={batch_size}; expected 1 or more, as many as memory holds")
        if isinstance(model, (str, PathLike)):
            from .hub.load import from_pretrained

            device = own_device(_best_device() if device is None else device)
            loaded = from_pretrained(model, device=device, dtype=dtype, **load_options)
        elif load_options:
            raise ConfigError(f"{', '.join(load_options)}: only for a model given by name or path, this one is loaded")
        else:
            loaded = model if hasattr(model, "origin") else own_model(model)
            loaded = loaded if device is None and dtype is None else loaded.to(device=device, dtype=dtype)
        self.model = loaded.eval()
        self.batch_size = batch_size
        self.transform = transform_for(loaded)
        self.transform.normalise = not getattr(loaded, "takes_pixels", False)  # `optimize` may put that inside
        self.transform.fast_pixels = fast_pixels
        headless = getattr(loaded, "num_classes", None) == 0 and labels is None
        self.labels = () if headless else class_labels(loaded, labels)
        self._scores = scores_of(loaded)
        self.thresholds = thresholds_of(loaded)

    @overload
    def __call__(self, images: str | PathLike[str] | bytes | PIL.Image.Image, *, top_k: int = 5) -> ImageResult: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], *, top_k: int = 5) -> list[ImageResult]: ...
    @overload
    def __call__(self, images: Any, *, top_k: int = 5) -> Any: ...

    def __call__(self, images: Any, *, top_k: int = 5) -> Any:
        """Classify one image, giving an `ImageResult`, or a sequence, giving a list of them in the same order.

        Args:
            images: an image, see `decoding.ImageSource`; or a sequence of them, also as a 4-D tensor (B, C, H, W) or
                array (B, H, W, C).
            top_k: how many classes to give for each image; all, if there are fewer.

        Raises: ImageError: an image cannot be decoded; the message says which. ConfigError: top_k below 1, or a model
            with num_classes=0.
        """
        top_k = self._checked(top_k)
        if not _is_sequence(images):
            return next(self._classify([self._prepared([("image", images)])], top_k))
        return list(self._classify(self._batches(images), top_k))

    def embed(self, images: Any) -> Tensor:
        """The model's embedding of each image, before its head: (N, D) float32 on the CPU.

        `images` is an image, which gives (1, D), or a sequence of them, as in a call.
        Raises: ImageError: an image cannot be decoded. ConfigError: a model without embeddings, as of `optimize`.
        """
        parts = [torch.empty(0, self._width())]
        for batch in self._batches(images if _is_sequence(images) else [images]):
            parts += self._in_parts(batch.images, self._embedding)
        return torch.cat(parts)

    def _batches(self, images: Any) -> Iterator[FileBatch]:
        named = [(f"image {i}", image) for i, image in enumerate(images)]
        size = self.batch_size  # which falls where memory is short
        return map(self._prepared, (named[i : i + size] for i in range(0, len(named), size)))

    def classify_files(
        self, paths: Iterable[str | PathLike[str] | tuple[str, bytes]], *, top_k: int = 5, workers: int | None = None
    ) -> Iterator[ImageResult]:
        """Classify any number of files; yields results in the order of the paths, as they come.

        A file that cannot be decoded yields a result with `error`, and the others go on. Paths are drawn as needed, so
        a generator will do, and memory holds a few batches however many there are.

        Args:
            paths: image files, pairs of a name and encoded bytes, or what `image_sources` gives.
            top_k: how many classes to give for each image; all, if there are fewer.
            workers: processes that decode; 0 decodes in this one. By default threads of this one, which take turns with
                the model, and processes beside a GPU.

        Raises: ConfigError: top_k below 1, or workers below 0 or above 1024. DeitModelsError: a loading process
            died, or a single image is too much for the device's memory.
        """
        top_k = self._checked(top_k)
        return self._classify(self._file_batches(paths, workers), top_k)

    def embed_files(
        self,
        images: Any,
        output: str | PathLike[str],
        *,
        labelled: bool = False,
        storage: Literal["float32", "float16"] = "float32",
        resume: bool = False,
        overwrite: bool = False,
        workers: int | None = None,
        watch: Watch = plain_watch,
    ) -> EmbeddedFiles:
        """Write the embeddings of any number of images to one file, which `embeddings.load_features` reads.

        Memory holds a few thousand embeddings, however many there are. Under torchrun the processes share the images,
        and each returns when the file is complete. An image that cannot be decoded gets no row, and is listed.

        Args:
            images: a folder, image files, a table, a data set: see `image_sources`.
            output: the file to write, .npz or .parquet.
            labelled: require labels: a folder is then one of class folders. Labels that are known are kept in any case.
            storage: type of the numbers in the file, "float32" or "float16".
            resume: go on with an interrupted run; a complete file is left as it is.
            overwrite: replace the file, and what an interrupted run has left.
            workers: processes that decode, as in `classify_files`.
            watch: wraps the batches of this process, for a progress bar.

        Raises: ConfigError: a wrong option; a file that exists, without `resume` or `overwrite`; a run to resume with
            other images, weights or settings; a model without embeddings. MissingExtraError: Parquet without pyarrow.
        """
        check_features_file(Path(output), storage)
        check_workers(workers)
        images = image_sources(images, labelled=labelled)

        def embed(sources: Iterable[Any], count: int) -> Iterator[tuple[str, Tensor | None, str | None]]:
            for batch in watch(self._file_batches(sources, workers), -(-count // self.batch_size)):
                found = (row for part in self._in_parts(batch.images, self._embedding) for row in part)
                for source, error in zip(batch.sources, batch.errors, strict=True):
                    yield source, next(found) if error is None else None, error

        preprocessing = f"{self.transform}{', fast pixels' * self.transform.fast_pixels}"
        run: dict[str, Any] = {"model": digest_of_numbers(self.model), "preprocessing": preprocessing}
        run |= {"width": self._width(), "storage": storage}
        device = _device(self.model)
        return write_features(Path(output), images, embed, run, device=device, resume=resume, overwrite=overwrite)

    def _file_batches(self, paths: Iterable[Any], workers: int | None) -> Iterator[FileBatch]:
        check_workers(workers)
        device, decode = _device(self.model), self.transform.levels
        return file_batches(paths, decode, batch_size=self.batch_size, workers=workers, device=device)

    def _classify(self, batches: Iterable[FileBatch], top_k: int, *, ahead: int | None = None) -> Iterator[ImageResult]:
        """The results of each batch; `ahead` batches are launched before results are read: on a GPU one."""
        if ahead is None:
            ahead = batches_ahead(_device(self.model))
        launched: deque[tuple[FileBatch, list[TopClasses]]] = deque()
        for batch in batches:
            wanted = top_k if self.thresholds is None else len(self.labels)  # any number may lie above thresholds
            launched.append((batch, self._launch(batch.images, wanted)))
            if len(launched) > ahead:
                yield from self._results(*launched.popleft(), top_k)
        for waiting in launched:
            yield from self._results(*waiting, top_k)

    def _results(self, batch: FileBatch, tops: list[TopClasses], top_k: int) -> Iterator[ImageResult]:
        found = iter(self._predictions(tops))
        for source, error in zip(batch.sources, batch.errors, strict=True):
            every = next(found) if error is None else ()
            limits = self.thresholds
            labels = None if limits is None else tuple(p.label for p in every if p.probability >= limits[p.index])
            yield ImageResult(source, every[:top_k], error, labels)

    def _checked(self, top_k: int) -> int:
        if not self.labels:
            check_has_classes(self.model)
        if top_k < 1:
            raise ConfigError(f"top_k={top_k}; expected 1 to {len(self.labels)}")
        return min(top_k, len(self.labels))

    def _prepared(self, named: list[tuple[str, ImageSource]]) -> FileBatch:
        found = [self._prepare(name, image) for name, image in named]
        return FileBatch([name for name, _ in found], [None] * len(found), torch.stack([levels for _, levels in found]))

    def _prepare(self, name: str, image: ImageSource) -> tuple[str, Tensor]:
        if isinstance(image, (str, PathLike)):  # an error names the path by itself
            return fspath(image), self.transform.levels(image)
        try:
            return name, self.transform.levels(image)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from error

    def _launch(self, levels: Tensor, top_k: int) -> list[TopClasses]:
        """The likeliest classes of a batch, in as many parts as memory asks for; a GPU may still compute them."""
        return self._in_parts(levels, lambda images: top_classes(self.model(images), top_k, self._scores))

    def _embedding(self, images: Tensor) -> Tensor:
        rows: Tensor = self.model.embed(images)
        return rows.float().cpu()

    def _width(self) -> int:
        """Numbers of an embedding. Raises: ConfigError: the model gives none."""
        try:
            return self.model.num_features
        except NotImplementedError as error:
            name = type(self.model).__name__
            raise ConfigError(f"{name} has no embed(x); give a model as it was before `optimize`") from error

    def _in_parts(self, levels: Tensor, compute: Callable[[Tensor], Computed]) -> list[Computed]:
        """The results of a batch, in as many parts as memory asks for."""
        done: list[Computed] = []
        start = 0
        while start < len(levels):
            part = levels[start : start + self.batch_size]
            try:
                with torch.inference_mode():
                    images = self.transform.to_input(to_device(part, _device(self.model)))
                    done.append(compute(images.to(_dtype(self.model)) if self.transform.normalise else images))
                start += len(part)
                continue
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise DeitModelsError(
                        f"not even one image fits into the memory of this device beside the model; free some, "
                        f"or use a smaller model or the CPU ({str(error).partition('. ')[0]})"
                    ) from error
            # here the error is gone, and with it the tensors that its traceback held
            self.batch_size = len(part) // 2
            logger.warning("%d images at once do not fit into memory; going on with %d", len(part), self.batch_size)
            torch.cuda.empty_cache()  # does nothing where no GPU is in use
        return done

    def _predictions(self, tops: list[TopClasses]) -> list[tuple[Prediction, ...]]:
        return [tuple(Prediction(self.labels[i], p, i) for p, i in row) for top in tops for row in top.read()]


def _best_device(*, cuda: bool | None = None, mps: bool | None = None) -> str:
    cuda = torch.cuda.is_available() if cuda is None else cuda
    mps = torch.backends.mps.is_available() if mps is None else mps
    return "cuda" if cuda else "mps" if mps else "cpu"


def batches_ahead(device: torch.device) -> int:
    """Batches to launch before the results of the last are read: a GPU computes one while the CPU waits for another."""
    return 0 if device.type == "cpu" else 1


def _device(model: ImageClassifier) -> torch.device:
    first = next(model.parameters(), None)
    # a model from `optimize` may have none, and a device of its own
    return torch.device(getattr(model, "device", "cpu")) if first is None else first.device


def _dtype(model: ImageClassifier) -> torch.dtype:
    types = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(types, torch.float32)


def _is_sequence(images: Any) -> bool:
    if isinstance(images, (str, bytes)):
        return False
    return isinstance(images, Sequence) or getattr(images, "ndim", 0) == 4


def attention_maps(model: ImageClassifier, x: Tensor) -> Tensor | list[Tensor]:
    """Attention probabilities of every block, in eval mode; the model's mode is left as it was.

    Gradients flow back to the input and the weights, unless `torch.no_grad()` is on.

    Shape: (B, C, H, W) -> the family's own, each row summing to 1; for DeiT (depth, B, heads, P + N, P + N), for LeViT,
        whose maps shrink, a list of (B, heads, queries, keys).
    Raises: ConfigError: a family that has no attention maps to give.
    """
    compute = getattr(model, "attention_maps", None)
    if compute is None:
        raise ConfigError(f"{type(model).__name__} has no attention maps to give; use a family that has, such as DeiT")
    with eval_mode(model):
        maps: Tensor | list[Tensor] = compute(x)
    return maps


class TopClasses(NamedTuple):
    """The likeliest classes of some images, perhaps still on their way from a GPU.

    Attributes:
        packed: probabilities and class numbers, (2, B, top_k) float32: one copy, and numbers up to 2**24 are exact.
        copied: the event after which `packed` is complete; None where reading waits by itself.
    """

    packed: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> list[list[tuple[float, int]]]:
        """Probability and number of each class, likeliest first, a row an image."""
        if self.copied is not None:
            self.copied.synchronize()
        probabilities, numbers = self.packed.tolist()
        pairs = zip(probabilities, numbers, strict=True)
        return [[(p, int(number)) for p, number in zip(*row, strict=True)] for row in pairs]


def scores_of(model: ImageClassifier) -> Callable[[Tensor], Tensor]:
    """Logits (B, num_classes) to scores, by the model's `problem_type`: as the pipeline of transformers does.

    Probabilities that sum to 1; of several labels at once, or of a single logit, each for itself; values as they are.
    """
    problem = None if model.origin is None else model.origin.problem_type
    if problem == "regression":
        return Tensor.float
    if problem == "multi_label_classification" or model.num_classes == 1:
        return lambda logits: logits.float().sigmoid()
    return lambda logits: logits.float().softmax(dim=-1)


def thresholds_of(model: ImageClassifier) -> tuple[float, ...] | None:
    """The probability of each label from which an image has it; None of a model for one class an image."""
    if model.origin is None or not model.origin.multi_label:
        return None
    return model.origin.thresholds or (UNSURE,) * model.num_classes


def top_classes(logits: Tensor, top_k: int, scores: Callable[[Tensor], Tensor]) -> TopClasses:
    """The likeliest classes by logits (B, num_classes); on a GPU without waiting for it."""
    probabilities, numbers = scores(logits).topk(top_k)
    packed = torch.stack([probabilities, numbers.float()])
    if packed.device.type != "cuda":
        return TopClasses(packed, None)
    packed = packed.to("cpu", non_blocking=True)  # into pinned memory, which torch takes for such a copy by itself
    return TopClasses(packed, _event_after_all_work(logits.device))


def _event_after_all_work(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class Prediction(NamedTuple):
    """One class an image may belong to; `index` is its place among the logits.

    Of a regression model, `probability` is the value itself.
    """

    label: str
    probability: float
    index: int  # type: ignore[assignment]  # hides tuple.index


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The result for one image.

    Attributes:
        source: the path, or a description such as "image 3", counted from 0 in the list that was given.
        predictions: the likeliest classes, likeliest first; empty if the image could not be decoded.
        error: why it could not be decoded, in one line.
        labels: of a model for several labels an image those above their thresholds, likeliest first; else None.
    """

    source: str
    predictions: tuple[Prediction, ...]
    error: str | None = None
    labels: tuple[str, ...] | None = None
