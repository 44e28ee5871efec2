"""The demo: a web page on this computer that classifies photographs, draws heat maps and compares two models."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch

from ..errors import ConfigError, DeitModelsError, ImageError, MissingExtraError, one_line
from ..images.decoding import explained, load_image, reads_heif
from ..models.layers import ImageClassifier
from ..predict import Classifier
from ..registry import DEFAULT_MODEL
from .heat_maps import Method, heat_maps
from .pictures import overlay, view

logger = logging.getLogger(__name__)

ModelSource = str | os.PathLike[str] | ImageClassifier

MAX_UPLOAD_BYTES = 25 << 20
MAX_PIXELS = 50_000_000
"""Largest upload: bytes of a file, and pixels of a picture before it is decoded. Phones stay below both."""
_CLEAN_EVERY_S, _KEEP_S = 300, 1800
_METHODS: dict[str, Method | None] = {"Gradient": "gradient", "Rollout": "rollout", "Last block": "last", "None": None}
_NO_SECOND = "(no comparison)"
_HINT = "Drop a photograph on the field, click it to choose one, or paste one."
_INFO = "Yellow where the attention leads most, dark where it leads least."
_HEADING = """<h1>Classify photographs</h1><p>The models run on the computer that serves this page. Photographs go
nowhere else, and are removed after half an hour.</p>"""
_CSS = """
.deit-model h2 {font-size: 1.05rem; margin: 0}
.deit-model {overflow-wrap: anywhere}
.deit-model p {margin: .1rem 0 0 !important}
.deit-view img {max-height: 26rem; object-fit: contain}
.deit-error {padding: .75rem 1rem; border-radius: .5rem; border: 1px solid #b91c1c; background: #fef2f2; color: #7f1d1d}
.dark .deit-error {background: #450a0a; border-color: #f87171; color: #fee2e2}
"""


class Answer(NamedTuple):
    """Result of one model for one picture.

    Attributes:
        probabilities: of the five likeliest classes, by name.
        picture: the crop that the model gets, under its heat map where there is one.
        classify_ms: time to resize and classify in milliseconds, without decoding.
        heat_map_ms: time for the heat map in milliseconds; None without one.
        about: the model's classes and input.
        note: why a heat map is missing, else empty.
    """

    probabilities: dict[str, float]
    picture: PIL.Image.Image
    classify_ms: float
    heat_map_ms: float | None
    about: str
    note: str


def launch(
    models: ModelSource | Sequence[ModelSource] = DEFAULT_MODEL,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: torch.device | str | None = None,
    announce: Callable[[str], object] = logger.info,
) -> None:
    """Serve the demo until Ctrl-C.

    Args:
        models: see `build_app`.
        host: address to listen on. "0.0.0.0" opens the page to the whole network; it has no password.
        port: a free port.
        device: see `build_app`.
        announce: called with one line that names the address, once the page can be opened.

    Raises: MissingExtraError: gradio is not installed. ConfigError: the port is taken; and the errors of `build_app`.
    """
    find_gradio()
    _check_address(host, port)  # before the models load, not after
    serve(build_app(models, device=device), host=host, port=port, announce=announce)


def serve(
    app: Any, *, host: str = "127.0.0.1", port: int = 7860, announce: Callable[[str], object] = logger.info
) -> None:
    """Serve what `build_app` gives until Ctrl-C; its temporary files are then removed. Raises: see `launch`."""
    url = start(app, host=host, port=port)
    try:
        announce(f"the demo is at {url} (Ctrl-C ends it)")
        threading.Event().wait()
    except KeyboardInterrupt:
        logger.info("the demo ends")
    finally:
        app.close(verbose=False)


def start(app: Any, *, host: str = "127.0.0.1", port: int = 7860) -> str:
    """Serve what `build_app` gives in a thread, until `app.close()`; gives its address. Raises: see `launch`."""
    gradio = find_gradio()
    _check_address(host, port)
    # its own fonts would be files to load, and its grey for hints has too little contrast
    theme = gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
    _, url, _ = app.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        inline=False,
        prevent_thread_lock=True,
        max_file_size=MAX_UPLOAD_BYTES,
        enable_monitoring=False,
        run_history=False,  # it would keep photographs in the browser
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=theme.set(block_info_text_color="*neutral_600"),
        css=_CSS,
    )
    return str(url)


def find_gradio() -> Any:
    """The module gradio. Raises: MissingExtraError: it is not installed."""
    try:
        import gradio
    except ImportError as error:
        raise MissingExtraError("the demo needs gradio; pip install 'deit-models[demo]'") from error
    return gradio


def _check_address(host: str, port: int) -> None:
    """Raise ConfigError if nothing can listen there."""
    if not 0 < port < 1 << 16:
        raise ConfigError(f"port={port}; expected a number from 1 to 65535")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise ConfigError(f"cannot listen on {host}, port {port} ({reason}); choose another one") from error


def load_classifiers(
    models: ModelSource | Sequence[ModelSource], *, device: torch.device | str | None = None
) -> dict[str, Classifier]:
    """The models by the names that the page shows, each loaded and run once.

    Raises: ConfigError: no model, one that gives no probabilities, the same name twice; and errors of `Classifier`.
    """
    found: dict[str, Classifier] = {}
    for source in [models] if isinstance(models, (str, os.PathLike, ImageClassifier)) else models:
        classifier = Classifier(source, device=device)
        name, origin = str(source), classifier.model.origin
        if isinstance(source, ImageClassifier):
            name = origin.name if origin and origin.name else type(source).__name__
        if name in found:
            raise ConfigError(f"two models are called {name!r}; give each once, or folders of other names")
        if origin and origin.problem_type == "regression":
            raise ConfigError(f"{name} gives values, not classes; the demo shows probabilities of classes")
        classifier(PIL.Image.new("RGB", (64, 64)))  # the first pass is slower, and a model may take no photographs
        found[name] = classifier
    if not found:
        raise ConfigError("no model given; expected at least one name, folder or model")
    return found


def read_upload(upload: Mapping[str, Any], max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """The upright RGB picture of an upload of gradio, a mapping with its path and, perhaps, its name before.

    Raises: ImageError: no picture, a damaged one, one with more pixels than allowed; the message has the name, no path.
    """
    path = upload.get("path")
    if not path:
        raise ImageError("the upload holds no file; choose a picture")
    name = upload.get("orig_name") or Path(path).name
    try:
        reads_heif()  # which registers it with Pillow
        with explained(path), PIL.Image.open(path) as image:
            width, height = image.size
        if width * height > max_pixels:
            limit = f"more than {max_pixels / 1e6:g} million"
            raise ImageError(f"{path}: {width}x{height} pixels, {limit}; make it smaller")
        return load_image(path)
    except ImageError as error:
        raise ImageError(one_line(error.args[0].replace(path, name))) from error


def answer(classifier: Classifier, picture: PIL.Image.Image, method: Method | None = "gradient") -> Answer:
    """Classify an RGB picture and draw where the model looks; `method` None draws no heat map.

    Raises: DeitModelsError: the picture cannot be classified, see `Classifier`.
    """
    began = time.perf_counter()
    result = classifier(picture, top_k=5)
    classified = time.perf_counter()
    shown, note, heat_map_ms = view(classifier.transform, picture), "", None
    if method is not None:
        images = classifier.transform(picture)[None]
        drawn = time.perf_counter()
        try:
            heat = heat_maps(classifier.model, images, method=method)[0]
            heat_map_ms = 1e3 * (time.perf_counter() - drawn)
            shown = overlay(shown, heat)
        except ConfigError as error:
            note = str(error)
    probabilities: dict[str, float] = {}
    for label, probability, index in result.predictions:  # two classes of ImageNet are both called "crane"
        probabilities[f"{label} ({index})" if label in probabilities else label] = probability
    origin, (height, width) = classifier.model.origin, classifier.transform.preprocessing.crop
    data = f" of {origin.dataset}" if origin and origin.dataset else ""
    about = f"{len(classifier.labels)} classes{data}, {width} x {height} pixels"
    return Answer(probabilities, shown, 1e3 * (classified - began), heat_map_ms, about, note)


def build_app(
    models: ModelSource | Sequence[ModelSource] = DEFAULT_MODEL,
    *,
    device: torch.device | str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Any:
    """The page as `gradio.Blocks`, with its models loaded; `serve` or `start` opens it.

    Args:
        models: names, folders, Hub repositories or models; of two or more, two can be compared.
        device: where they run, see `Classifier`.
        max_pixels: larger pictures are refused before they are decoded.

    Raises: MissingExtraError: gradio is not installed. ConfigError: see `load_classifiers`.
    """
    gradio = find_gradio()
    classifiers = load_classifiers(models, device=device)
    names, several = list(classifiers), len(classifiers) > 1
    # telemetry of gradio is off
    with gradio.Blocks(title="deit-models", analytics_enabled=False, delete_cache=(_CLEAN_EVERY_S, _KEEP_S)) as app:
        gradio.HTML(_HEADING)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                photo = gradio.Image(
                    label="Photograph", sources=["upload", "clipboard"], height=300, alt_text="The photograph"
                )
                first = gradio.Dropdown(names, value=names[0], label="Model", visible=several)
                second = gradio.Dropdown([_NO_SECOND, *names], label="Compare with", visible=several)
                method = gradio.Radio(list(_METHODS), value="Gradient", label="Heat map", info=_INFO)
            with gradio.Column(scale=4, min_width=280):
                message = gradio.HTML(_HINT)
                with gradio.Row():
                    panels = [_panel(gradio) for _ in range(2)]

        def show(upload: Mapping[str, Any] | None, first: str, second: str, method: str) -> list[Any]:
            """Classify a photograph with one model or two."""
            text, answers = _HINT, list[tuple[str, Answer]]()
            try:
                if upload is not None:
                    picture, text = read_upload(upload, max_pixels), ""
                    chosen = [name for name in (first, second) if name != _NO_SECOND]
                    answers = [(name, answer(classifiers[name], picture, _METHODS[method])) for name in chosen]
            except DeitModelsError as error:
                text = f'<p class="deit-error" role="alert">{escape(str(error))}</p>'
            shown = [part for name, found in answers for part in _update(gradio, name, found)]
            hidden = [gradio.Column(visible=False), "", None, None] * (2 - len(answers))
            return [gradio.HTML(text, visible=bool(text)), *shown, *hidden]

        gradio.on(
            [photo.change, first.input, second.input, method.input],
            show,
            [photo, first, second, method],
            [message, *(part for panel in panels for part in panel)],
            api_name="classify",
            preprocess=False,  # gradio would decode the picture by itself
            trigger_mode="always_last",
        )
    return app


def _panel(gradio: Any) -> tuple[Any, ...]:
    """Place for the answer of a model: column, heading, bars, picture."""
    with gradio.Column(visible=False, min_width=260) as column:
        heading = gradio.HTML(elem_classes="deit-model")
        label = gradio.Label(num_top_classes=5, label="Likeliest classes")
        picture = gradio.Image(
            label="The model's view",
            show_label=False,
            alt_text="The part of the photograph that the model gets, under its heat map if there is one",
            interactive=False,
            elem_classes="deit-view",
            buttons=["download", "fullscreen"],
        )
    return column, heading, label, picture


def _update(gradio: Any, name: str, found: Answer) -> list[Any]:
    """Values of a panel for an answer."""
    times = f"{found.classify_ms:.0f} ms to classify"
    if found.heat_map_ms is not None:
        times += f", {found.heat_map_ms:.0f} ms for the heat map"
    lines = [found.about, times, *([found.note] if found.note else [])]
    heading = f"<h2>{escape(name)}</h2>" + "".join(f"<p>{escape(line)}</p>" for line in lines)
    return [gradio.Column(visible=True), heading, found.probabilities, found.picture]
