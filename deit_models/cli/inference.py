"""`deit-models predict`, `evaluate`, `export` and `bench`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ImageError
from ..files import printable
from .arguments import (
    EXIT_FAILED,
    EXIT_OK,
    LOADING,
    add_columns,
    add_data,
    add_options,
    at_least,
    chosen_model,
    columns,
    command,
    device,
    loading,
    open_data,
    picked,
    process_number,
    progress_bar,
    watcher,
)
from .showing import check_heat_maps, draw_heat_maps

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.sources import ImageSources, Undecoded
    from ..distributed import Process
    from ..models.layers import ImageClassifier
    from ..predict import Classifier
    from ..scoring.outcomes import Evaluation
    from ..scoring.parts import Parts

_JUDGES, _CALIBRATION = 64, 128  # images that `optimize` compares logits on, and that int8 ranges are fitted to
_MANY = 300  # with fewer images, no network is worth an optimised form
_TUNING = ("precision", "min_agreement", "token_merging")


def add_predict(commands: Any) -> None:
    """Add the command `predict`."""
    example = "predict photos/ --model deit_small_patch16_224 --format csv --output labels.csv"
    parser = command(commands, "predict", "classify images", example, run_predict)
    _add_images(parser)
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to show for each image, default 5")
    text = "compute with the fastest backend that agrees with the model; found the first time, which takes a while. By "
    text += "default, in float32 alone, for many images where the speed of the first ones shows that it pays"
    parser.add_argument("--optimize", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "of --optimize: auto (default) takes bf16 where it is faster and agrees; int8 is fitted to the first images"
    parser.add_argument("--precision", choices=["auto", "float32", "bf16", "int8"], help=text)
    text = "of --optimize: share of the first images that must keep their class, default 0.99"
    parser.add_argument("--min-agreement", type=float, metavar="X", help=text)
    add_options(parser, "--token-merging")
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--format", choices=["text", "jsonl", "csv"], default="text", help="default text")
    written.add_argument("--json", dest="format", action="store_const", const="jsonl", help="short for --format jsonl")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the screen")
    text = "also draw each image into this folder, with the parts in colours that raise its likeliest class's score"
    parser.add_argument("--heat-maps", type=Path, metavar="FOLDER", help=text)
    _add_resume(parser)


def _add_images(parser: argparse.ArgumentParser) -> None:
    text = "image files, folders that are searched for them, tables and data sets of Hugging Face, see docs/data.md"
    parser.add_argument("images", nargs="+", type=Path, help=text)
    add_columns(parser)
    parser.add_argument("--model", help="a name, a folder or a Hub repository; default: what comes with the package")
    add_options(parser, *LOADING)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once, default 32")
    text = "decoding processes, 0: decode in this one; default: threads of this one, processes beside a GPU"
    parser.add_argument("--workers", type=int, metavar="N", help=text)
    add_options(parser, "--device")
    text = "decode and resize faster, to nearly the same pixels; brings most for photographs of many megapixels"
    parser.add_argument("--fast-pixels", action="store_true", help=text)


def _add_resume(parser: argparse.ArgumentParser) -> None:
    text = "continue an interrupted run: skip the images whose results are kept already"
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help=text)
    existing.add_argument("--overwrite", action="store_true", help="replace the --output file if there is one")


def run_predict(args: argparse.Namespace, *, optimize: Callable[..., ImageClassifier] | None = None) -> int:
    """Run `predict`; `optimize` prepares the model for `--optimize`, by default `deploy.optimize.optimize`."""
    from ..data.sources import image_sources
    from ..distributed import join_processes
    from ..scoring.parts import Parts

    for name in _TUNING:
        if getattr(args, name) is not None and not args.optimize:
            raise ConfigError(f"--{name.replace('_', '-')} is for --optimize; pass both")
    _check_output(args)
    check_heat_maps(args)
    every = image_sources(args.images, **columns(args))
    with join_processes(args.device) as process:
        if process.world > 1 or (args.output and Parts(args.output).folder.exists()):
            parts, classifier, paths, errors = _begin_parts(args, every, optimize, process)
        else:
            parts, (classifier, errors) = None, _predict_alone(args, every, optimize)
    if parts is not None:
        errors += _predict_in_parts(args, parts, classifier, paths, process)
    if args.heat_maps is not None:
        draw_heat_maps(args, classifier, every, process)
    return _unread(errors, len(every))


def _unread(errors: Sequence[str], total: int) -> int:
    """Print the images that could not be read; gives the exit status."""
    if errors:
        print(f"deit-models: {len(errors)} of {total} images could not be read:", file=sys.stderr)
        print("\n".join(f"  {printable(error)}" for error in errors), file=sys.stderr)
    return EXIT_FAILED if errors else EXIT_OK


def _predict_alone(args: argparse.Namespace, every: ImageSources, optimize: Any) -> tuple[Classifier, list[str]]:
    """Write the results of one process as they come; returns its classifier and all errors."""
    from .results import resume_results, write_results, written_name

    resumed = args.resume and args.output.exists()
    done, before = resume_results(args.output, format=args.format) if resumed else ((), [])
    paths = every.chosen(lambda name: written_name(name) not in done) if done else every
    classifier = make_classifier(args, paths, optimize)
    results = classifier.classify_files(paths, top_k=args.top_k, workers=args.workers)
    header = not resumed or args.output.stat().st_size == 0
    mode = "a" if resumed else "w"
    # newline="": lines end alike on every system
    file = nullcontext(sys.stdout) if args.output is None else args.output.open(mode, encoding="utf-8", newline="")
    with file as stream:
        shown = progress_bar(results, len(paths), unit="image", wanted=len(paths) > 1 and not stream.isatty())
        return classifier, before + write_results(shown, stream, format=args.format, header=header)


def _begin_parts(
    args: argparse.Namespace, every: ImageSources, optimize: Any, process: Process
) -> tuple[Parts, Classifier, ImageSources, list[str]]:
    """Share the images that have no results yet among the processes; returns the earlier errors, too."""
    from ..files import digest_of_names, digest_of_numbers
    from ..scoring.parts import Parts
    from .results import COLUMNS, resume_results, written_name

    if args.output is None or args.format == "text":
        raise ConfigError("several processes write to one file: pass --output FILE, and --format jsonl or csv")
    parts = Parts(args.output)
    kept = parts.settle(process, resume=args.resume, overwrite=args.overwrite)
    if kept and process.is_main and not parts.unfinished:
        resume_results(args.output, format=args.format)  # cuts off a torn image, once
    process.wait_for_all()
    done, errors = resume_results(args.output, format=args.format, whole=True) if kept else ((), [])
    paths = every.chosen(lambda name: written_name(name) not in done) if done else every
    classifier = make_classifier(args, paths, optimize, alone=False)
    names = digest_of_names(map(paths.name, range(len(paths))))
    run = picked(args, "format", "top_k", "fast_pixels", "precision", "token_merging")
    run |= {"columns": [*COLUMNS]} if args.format == "csv" else {}  # older versions had fewer
    # an optimised network may hold no numbers of its own, so that its model's name stands beside them
    run |= {"optimize": bool(args.optimize), "model": str(args.model), "weights": digest_of_numbers(classifier.model)}
    parts.begin(run | {"images": len(paths), "names": names}, len(paths), process)
    return parts, classifier, paths, errors if process.is_main else []


def _predict_in_parts(
    args: argparse.Namespace, parts: Parts, classifier: Classifier, paths: ImageSources, process: Process
) -> list[str]:
    """Write this process's blocks; the first process joins all of them, and gets all errors."""
    from .results import join_results, write_results

    mine, total = (paths[i] for block in parts.mine for i in block), sum(map(len, parts.mine))
    results = classifier.classify_files(mine, top_k=args.top_k, workers=args.workers)
    results = iter(progress_bar(results, total, unit="image", wanted=total > 1))
    for block in parts.mine:
        errors: list[str] = []
        with parts.new(block, errors) as file, file.open("w", encoding="utf-8", newline="") as stream:
            errors += write_results(islice(results, len(block)), stream, format=args.format, header=False)

    def join(path: Path, files: list[Path], _: list[str]) -> None:
        join_results(path, parts.output, files, format=args.format)

    return parts.finish(process, join)


def add_embed(commands: Any) -> None:
    """Add the command `embed`."""
    summary = "write the embeddings of images to a file, to compare and to search them"
    example = "embed photos/ --model deit_small_patch16_224 --output features.npz"
    parser = command(commands, "embed", summary, example, _run_embed)
    _add_images(parser)
    text = "the .npz or .parquet file to write"
    parser.add_argument("--output", type=Path, metavar="FILE", required=True, help=text)
    text = "keep labels of folders too, each of which holds a folder of images for each class"
    parser.add_argument("--labelled", action="store_true", help=text)
    parser.add_argument("--storage", choices=["float32", "float16"], default="float32", help="default float32")
    text = "measure retrieval and nearest neighbours, each image against all others; implies --labelled"
    parser.add_argument("--retrieval", action="store_true", help=text)
    _add_resume(parser)
    add_options(parser, "--json")


def _run_embed(args: argparse.Namespace) -> int:
    from ..data.sources import image_sources
    from ..predict import Classifier
    from ..scoring.embeddings import check_features_file, knn_accuracy, load_features, retrieval

    check_features_file(args.output, args.storage)
    _check_output(args)
    images = image_sources(args.images, labelled=args.labelled or args.retrieval, **columns(args))
    options = picked(args, "device", "batch_size", "fast_pixels")
    classifier = Classifier(chosen_model(args), **options, **loading(args))
    options = picked(args, "storage", "resume", "overwrite", "workers")
    done = classifier.embed_files(images, args.output, watch=watcher("embedding"), **options)
    if process_number() != 0:
        return EXIT_OK
    facts: dict[str, Any] = {"output": str(done.path), "images": done.images, "width": done.width}
    facts |= {"storage": args.storage, "unreadable": len(done.unreadable)}
    if args.retrieval:
        features = load_features(done.path)
        found = retrieval(features.embeddings, features.labels or ())
        facts |= {f"recall@{k}": round(percent, 2) for k, percent in found.recall.items()}
        facts |= {"mAP": round(found.mean_average_precision, 2), "queries": found.queries}
        facts["k-NN top-1"] = round(knn_accuracy(features.embeddings, features.labels or ()), 2)
    print(json.dumps(facts) if args.json else "\n".join(f"  {name:<12}{value}" for name, value in facts.items()))
    return _unread(done.unreadable, len(images))


def _check_output(args: argparse.Namespace) -> None:
    """Raise ConfigError unless the results may be written to `--output`, before anything is loaded."""
    file = args.output
    if file is None:
        if args.resume or args.overwrite:
            raise ConfigError(f"--{'resume' if args.resume else 'overwrite'} is for a file; name it with --output")
        return
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--output {file}: there is no folder {file.parent}; make it first")
    if file.is_dir():
        raise ConfigError(f"--output {file} is a folder; name a file in it")
    # a device or a pipe holds nothing that could be lost
    if file.is_file() and file.stat().st_size and not args.resume and not args.overwrite:
        raise ConfigError(f"--output {file} exists; --resume goes on with it, --overwrite replaces it")


def make_classifier(
    args: argparse.Namespace,
    paths: Sequence[Undecoded],
    optimize: Callable[..., ImageClassifier] | None = None,
    *,
    alone: bool = True,
) -> Classifier:
    """The classifier that the options of `predict` ask for; `optimize` judges by the first of `paths`.

    In a process that works `alone`, it optimises itself where that pays, unless heat maps are to be drawn.
    """
    from ..predict import Classifier

    options = picked(args, "batch_size", "fast_pixels")
    classifier = Classifier(chosen_model(args), device=args.device, **options, **loading(args))
    if args.optimize is None and alone and len(paths) > _MANY and args.heat_maps is None:
        from ..deploy.adaptive import AdaptiveClassifier

        classifier.model = AdaptiveClassifier(classifier.model, images=len(paths), cache_dir=args.cache_dir)
    if not args.optimize:
        return classifier
    from ..deploy.optimize import optimize as optimize_here

    judges = _readable(paths[: _CALIBRATION if args.precision == "int8" else _JUDGES], classifier.transform.levels)
    tuning = {name: given for name, given in picked(args, *_TUNING).items() if given is not None}
    tuning |= {"sample": args.batch_size, "calibration": judges, "cache_dir": args.cache_dir}
    fast = (optimize or optimize_here)(classifier.model, preprocessing=True, **tuning)
    return Classifier(fast, labels=classifier.labels, **options)


def _readable(images: Sequence[Undecoded], decode: Callable[[Any], Tensor]) -> Tensor | None:
    """Those of the images that can be decoded, as a batch; None if there are none."""
    import torch

    found = []
    for image in images:
        with suppress(ImageError):
            found.append(decode(image[1] if isinstance(image, tuple) else image))
    return torch.stack(found) if found else None


def add_evaluate(commands: Any) -> None:
    """Add the command `evaluate`."""
    summary = "measure a model's accuracy on labelled images"
    parser = command(commands, "evaluate", summary, "evaluate deit_tiny_patch16_224 imagenet/", _run_evaluate)
    parser.add_argument("source", metavar="model", help="a name, a folder, a weights file or a Hub repository")
    add_data(parser, "a folder with val/ or with a folder of images for each class, or a name such as cifar10")
    parser.add_argument("--split", choices=["val", "train"], default="val", help="default val")
    parser.add_argument("--batch-size", type=at_least(1), default=256, metavar="N", help="images at once, default 256")
    add_options(parser, "--workers", "--device")
    text = "default float32; auto: bf16 where the device computes in it"
    parser.add_argument("--precision", choices=["auto", "float32", "bf16", "fp16"], default="float32", help=text)
    styles = ["checkpoint", "timm", "transformers"]
    text = "preprocessing of the images; default checkpoint: the one that the weights were published with"
    parser.add_argument("--style", choices=styles, default="checkpoint", help=text)
    text = "match the classes of the data and of the model by number, although their names differ"
    parser.add_argument("--ignore-class-names", action="store_true", help=text)
    text = "score the features alone: each image is classified by the 20 nearest of these labelled images (DINO's k-NN "
    text += "accuracy); for models without a head, too; a folder with train/ or of class folders, or a name"
    parser.add_argument("--knn", metavar="TRAIN", help=text)
    text = "also write a report: figures, confusion of classes, worst mistakes, calibration, on one page"
    parser.add_argument("--report", type=Path, metavar="FILE.html", help=text)
    text = "also write a row for each image: name, label, predicted class, probability, loss"
    parser.add_argument("--output", type=Path, metavar="FILE.npz", help=text)
    _add_resume(parser)
    add_options(parser, "--model", *LOADING, "--json")


def _run_evaluate(args: argparse.Namespace) -> int:
    from ..distributed import join_processes
    from ..hub.load import from_pretrained
    from ..images.transforms import transform_for
    from ..scoring.evaluation import check_output, evaluate

    if args.knn is not None and (args.report is not None or args.output is not None or args.ignore_class_names):
        text = "leave out --report, --output and --ignore-class-names"
        raise ConfigError(f"--knn classifies without the model's head: {text}")
    _check_output(args)
    check_output(args.output, resume=args.resume, overwrite=args.overwrite)
    if args.report is not None and (args.report.is_dir() or not args.report.absolute().parent.is_dir()):
        raise ConfigError(f"--report {args.report}: expected a file in a folder that is there")
    model = from_pretrained(args.source, model=args.model, **loading(args))
    options = picked(args, "batch_size", "workers", "precision")
    options |= {"transform": transform_for(model, style=args.style), "watch": watcher("evaluating")}
    if args.report is not None:
        from ..show.pages import evaluation_page

        title = f"{args.source} on {args.data}, {args.split}"
        options["on_outcomes"] = evaluation_page(args.report, model, title=title, transform=options["transform"])
    with join_processes(args.device) as process:
        records = open_data(args, args.data, args.split, process, own_folder=True)
        if args.knn is not None:
            from ..scoring.embeddings import evaluate_knn

            known = open_data(args, args.knn, "train", process, own_folder=True)
            result = evaluate_knn(model, known, records, device=process.device, **options)
        else:
            options |= picked(args, "ignore_class_names", "output", "resume", "overwrite")
            result = evaluate(model, records, device=process.device, **options)
    if process_number() == 0:
        published = None if args.knn else _published(model, len(records.classes))
        print((_as_json if args.json else _as_text)(args, published, result))
        if result.skipped:
            total = result.images + result.skipped
            print(f"deit-models: {result.skipped} of {total} images could not be read", file=sys.stderr)
    return EXIT_FAILED if result.skipped else EXIT_OK


def _published(model: ImageClassifier, classes: int) -> dict[str, Any] | None:
    """The published accuracy of these weights, in percent, and its data; None if there is none, or of more classes."""
    origin = model.origin
    if origin is None or origin.top1 is None or classes < model.num_classes:
        return None
    return {"top1": origin.top1, "top5": origin.top5, "dataset": origin.dataset}


def _as_json(args: argparse.Namespace, published: Mapping[str, Any] | None, result: Evaluation) -> str:
    chosen = picked(args, "data", "split", "style", "precision", "knn")
    return json.dumps({"model": args.source, **chosen, **asdict(result), "published": published}, indent=2)


def _as_text(args: argparse.Namespace, published: Mapping[str, Any] | None, result: Evaluation) -> str:
    from ..scoring.metrics import FIGURES

    known = ((name, getattr(result, key)) for key, name in FIGURES.items())
    rows = {name: f"{value:.2f} %" for name, value in known if value is not None}
    if published is not None:
        for name, figure in (("top-1", published["top1"]), ("top-5", published["top5"])):
            rows[name] += "" if figure is None else f"  published: {figure} % ({printable(str(published['dataset']))})"
    rows |= {f"{name} head": f"{top1:.2f} % top-1" for name, top1 in result.heads.items()}
    rows |= {"loss": f"{result.loss:.4f}", "images": str(result.images), "skipped": str(result.skipped)}
    kind = "" if args.knn is None else f", by the nearest of {args.knn}"
    lines = [printable(f"{args.source} on {args.data}, {args.split}{kind}")]
    return "\n".join(lines + [f"  {name:<20}{value}" for name, value in rows.items()])


def add_export(commands: Any) -> None:
    """Add the command `export`."""
    summary = "write a model for another runtime: as one file, or as a folder for the browser"
    example = "export deit_small_patch16_224 deit_small.onnx --preprocessing"
    parser = command(commands, "export", summary, example, _run_export)
    parser.add_argument("source", help="a name, a folder, a weights file or a Hub repository")
    text = "what to write: .onnx, .xml (OpenVINO, with a .bin beside it), .pt2, or a folder for transformers.js"
    parser.add_argument("file", type=Path, help=text)
    formats = ["onnx", "openvino", "torch-export", "transformers.js"]
    parser.add_argument("--format", choices=formats, help="default: by the suffix of the file")
    text = "include the normalisation: the file takes pixels from 0 to 255, already resized and cropped; for "
    text += "transformers.js (there the default) resizing and cropping, too"
    parser.add_argument("--preprocessing", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "by how much a logit may differ from the model's, default 1e-4"
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help=text)
    text = "of transformers.js: images, and folders of them, to judge the quantised network by; default random ones"
    parser.add_argument("--images", nargs="+", type=Path, metavar="PATH", help=text)
    text = "of transformers.js: share of them on which the quantised network must decide alike, default 0.9"
    parser.add_argument("--min-agreement", type=float, metavar="X", help=text)
    add_options(parser, "--token-merging", "--model", *LOADING, "--json")


def _run_export(args: argparse.Namespace) -> int:
    from ..data.sources import image_sources
    from ..deploy.export import export
    from ..deploy.runtimes import format_of
    from ..hub.load import from_pretrained

    kind = args.format or format_of(args.file)  # a wrong name is refused before anything is loaded
    images = None if args.images is None else image_sources(args.images)
    model = from_pretrained(args.source, model=args.model, **loading(args))
    options = picked(args, "preprocessing", "tolerance", "min_agreement") | {"token_merging": args.token_merging or 0}
    done = export(model, args.file, format=kind, images=images, **options)
    if args.json:
        print(json.dumps(asdict(done), default=str))
        return EXIT_OK
    difference = f"logits differ by at most {done.max_abs_diff:.2g} from the model's ({done.tolerance:g} allowed)"
    print(f"wrote {done.path} ({done.format}, {done.size_bytes / 1e6:.1f} MB); run and compared: {difference}")
    if done.agreement is not None:
        size, judged = f"{done.quantised_bytes / 1e6:.1f} MB", "random images" if images is None else "images"
        print(f"model_quantized.onnx ({size}) decides as the model on {done.agreement:.1%} of {done.images} {judged}")
    return EXIT_OK


def add_bench(commands: Any) -> None:
    """Add the command `bench`."""
    summary = "measure how fast a model runs here, as a table for an issue"
    example = "bench deit_small_patch16_224 --batch-sizes 1 32"
    parser = command(commands, "bench", summary, example, _run_bench)
    text = "a name or an architecture file, default %(default)s; weights are random"
    parser.add_argument("model", nargs="?", default="deit_tiny_patch16_224", help=text)
    text = "images at once, default 1 8 32"
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=[1, 8, 32], metavar="N", help=text)
    text = "model (as it is), openvino, eager, onnxruntime, inductor; default: all that work here"
    parser.add_argument("--backends", nargs="+", default=[], metavar="NAME", help=text)
    text = "default: float32, and bf16 where the device computes in it by itself"
    parser.add_argument("--precision", choices=["float32", "bf16", "int8"], help=text)
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda, mps, ...; default cpu")
    text = "how long each is timed, default 3; two calls at least"
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help=text)
    add_options(parser, "--json")


def _run_bench(args: argparse.Namespace) -> int:
    from ..deploy.bench import bench, table

    rows = []
    for row in bench(args.model, **picked(args, "batch_sizes", "backends", "precision", "device", "seconds")):
        rows.append(row)
        if sys.stderr.isatty():
            told = row.error or f"{row.images_per_second:.1f} images/s"
            print(f"{row.backend} in {row.precision}, batch {row.batch_size}: {told}", file=sys.stderr)
    print(json.dumps([asdict(row) for row in rows], indent=2) if args.json else table(args.model, rows, args.device))
    return EXIT_OK
