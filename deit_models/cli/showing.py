"""`deit-models explain` and `demo`, and the heat maps of `deit-models predict`."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import nearest
from ..errors import ConfigError, ImageError, shown
from ..files import atomic_write, printable
from .arguments import (
    EXIT_OK,
    LOADING,
    add_options,
    at_least,
    chosen_model,
    command,
    loading,
    picked,
    progress_bar,
    say,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..data.sources import ImageSources
    from ..distributed import Process
    from ..models.layers import ImageClassifier
    from ..predict import Classifier
    from ..show.pictures import MapRow

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_METHODS = {
    "rollout": "rollout: the attention of all blocks, multiplied",
    "last": "last: the attention of the last block alone",
    "gradient": "gradient: the attention that raises the score of one class",
}


def add_explain(commands: Any) -> None:
    """Add the command `explain`."""
    summary = "draw the parts of a photograph that a model attends to, beside its answer"
    example = "explain photo.jpg --model deit_small_patch16_224 --output heat.png"
    parser = command(commands, "explain", summary, example, _run_explain)
    parser.add_argument("photo", type=Path, help="an image file")
    parser.add_argument("--model", help="a name, a folder or a Hub repository; default: what comes with the package")
    text = f"the picture to write: {', '.join(_FORMATS)}"
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace the --output file if there is one")
    text = "one row each, default all: attention of all blocks multiplied, of the last block, or weighted for a class"
    parser.add_argument("--method", nargs="+", choices=list(_METHODS), default=list(_METHODS), help=text)
    text = "of --method gradient: the class to explain, by its name or number; default: the likeliest"
    parser.add_argument("--target", metavar="CLASS", help=text)
    text = "one more row: the patches that become one token where every block merges so many, as optimize can"
    parser.add_argument("--token-merging", type=at_least(1), metavar="N", help=text)
    add_options(parser, *LOADING, "--device")


def _run_explain(args: argparse.Namespace) -> int:
    from ..predict import Classifier
    from ..registry import DEFAULT_MODEL
    from ..show.heat_maps import heat_maps
    from ..show.pictures import MapRow, explanation, overlay, view

    _check_picture(args.output, overwrite=args.overwrite)
    if args.target is not None and "gradient" not in args.method:
        raise ConfigError("--target is for the method gradient; the others are the same for every class")
    classifier = Classifier(chosen_model(args), device=args.device, **loading(args))
    target = None if args.target is None else class_number(args.target, classifier.labels)
    every = classifier(args.photo, top_k=max(5, len(classifier.labels))).predictions
    target = every[0].index if target is None else target
    found = [one for rank, one in enumerate(every) if rank < 5 or one.index == target]
    x, seen, rows = classifier.transform(args.photo)[None], view(classifier.transform, args.photo), []
    for method in dict.fromkeys(args.method):
        wanted = target if method == "gradient" else None
        heat = heat_maps(classifier.model, x, method=method, target=wanted)[0]
        caption = _METHODS[method] + ("" if wanted is None else f", {classifier.labels[wanted]}")
        caption += "" if heat.max() else " (the same everywhere)"
        rows.append(MapRow(caption, overlay(seen, heat), wanted))
    if args.token_merging:
        rows.append(_merging_row(classifier.model, x, seen, args.token_merging))
    _save(explanation(seen, rows, found, title=f"{args.photo.name}, {args.model or DEFAULT_MODEL}"), args.output)
    print(printable(f"wrote {args.output}: {', '.join(dict.fromkeys(args.method))}; {found[0].label} is the likeliest"))
    return EXIT_OK


def _merging_row(model: ImageClassifier, x: Tensor, seen: Image, count: int) -> MapRow:
    """The row of the patches that token merging joins."""
    from ..deploy.network import merged_patches
    from ..show.pictures import MapRow, with_groups

    weight = next(model.parameters())
    groups = merged_patches(model, x.to(weight.device), count)[0]
    left = int(groups.max()) + 1
    caption = f"token merging, {count} a block: patches of one colour are one token, {groups.numel()} become {left}"
    return MapRow(caption, with_groups(seen, groups))


def class_number(text: str, labels: Sequence[str]) -> int:
    """The class with that name, one of its names ("tabby" of "tabby, tabby cat") or that number.

    Raises: ConfigError: no such class, or a name of several.
    """
    wanted = text.strip().casefold()
    names = [[label.casefold(), *(part.strip() for part in label.casefold().split(","))] for label in labels]
    found = [number for number, known in enumerate(names) if known[0] == wanted]
    found = found or [number for number, known in enumerate(names) if wanted in known]
    if not found and wanted.isdecimal() and int(wanted) < len(labels):
        found = [int(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"--target {shown(text)} is a name of the classes {found[:5]}; pass one of these numbers")
    hint = nearest(text, labels)
    raise ConfigError(f"--target {shown(text)}: no such class; pass a name or a number to {len(labels) - 1}{hint}")


def _check_picture(file: Path, *, overwrite: bool) -> None:
    """Raise ConfigError unless a picture may be written there, before anything is loaded."""
    if file.suffix.lower() not in _FORMATS:
        raise ConfigError(f"--output {file}: expected a name that ends in {', '.join(_FORMATS)}")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--output {file}: there is no folder {file.parent}; make it first")
    if file.is_dir() or (file.exists() and not overwrite):
        raise ConfigError(f"--output {file} exists; choose another name, or replace a file with --overwrite")


def _save(picture: Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        picture.save(temporary, format=_FORMATS[path.suffix.lower()], quality=90)  # PNG has none, and ignores it


def add_demo(commands: Any) -> None:
    """Add the command `demo`."""
    summary = "open a page in the browser that classifies photographs, draws heat maps and compares two models"
    example = "demo --model deit_tiny_patch16_224 deit_small_patch16_224"
    parser = command(commands, "demo", summary, example, run_demo)
    text = "names, folders or Hub repositories to choose from; default: what comes with the package"
    parser.add_argument("--model", nargs="+", metavar="MODEL", help=text)
    text = "address to serve on, default %(default)s: this computer alone; 0.0.0.0: everyone in the network"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--port", type=at_least(1), default=7860, metavar="N", help="default %(default)s")
    add_options(parser, "--device")


def run_demo(args: argparse.Namespace, *, launch: Callable[..., None] | None = None) -> int:
    """Run `demo`; `launch` serves the page, by default `show.demo.launch`."""
    from ..show.demo import launch as launch_here

    models = args.model or [chosen_model(args)]
    (launch or launch_here)(models, announce=say, **picked(args, "host", "port", "device"))
    return EXIT_OK


# Heat maps of `predict`


def check_heat_maps(args: argparse.Namespace) -> None:
    """Raise ConfigError unless heat maps may be written to `--heat-maps`, before anything is loaded."""
    folder = args.heat_maps
    if folder is None:
        return
    if args.optimize:
        raise ConfigError("--heat-maps needs the attention of the model itself; leave out --optimize")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--heat-maps {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not args.resume and not args.overwrite:
        raise ConfigError(f"--heat-maps {folder} holds files already; name another folder, or pass --resume")


def draw_heat_maps(args: argparse.Namespace, classifier: Classifier, images: ImageSources, process: Process) -> None:
    """Write a picture of each image that can be read, with the method "gradient" for its likeliest class.

    Processes share the images. With `--resume` pictures that exist are kept.
    """
    from ..show.heat_maps import heat_maps
    from ..show.pictures import overlay, view

    mine = range(process.rank, len(images), process.world)
    for number in progress_bar(mine, len(mine), unit="map", wanted=len(mine) > 1):
        path = args.heat_maps / picture_name(images.name(number))
        if args.resume and path.exists():
            continue
        with suppress(ImageError):  # `predict` has told it
            source = images[number]
            image = source[1] if isinstance(source, tuple) else source
            x = classifier.transform(image)[None]
            heat = heat_maps(classifier.model, x, method="gradient")[0]
            _save(overlay(view(classifier.transform, image), heat), path)


def picture_name(source: str) -> str:
    """The file for the heat map of an image: its name, and a digest of its whole path, so that no two are the same."""
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(source).stem)[:80]}-{digest}.jpg"
