"""`deit-models search`: train a super-network, search among the networks in it, show what was found."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .arguments import EXIT_OK, add_data, add_options, at_least, command, open_data, say, watcher
from .long_runs import TrainingDisplay, add_folder, add_recipe, check_fresh, chosen_recipe, images_at_once, run_to_end

if TYPE_CHECKING:
    from ..data.records import ImageRecords
    from ..nas.evolution import ScoredCandidate
    from ..nas.settings import Evolution
    from ..nas.space import SearchSpace
    from ..recipes.recipe import Recipe
    from ..training.run import Computing


_RECIPES = {"tiny": "supernet_tiny_120e", "small": "supernet_small_120e"}
_RECIPE = "cifar_scratch"
_DATA = "a folder with train/, or with a folder of images for each class; or a name: cifar10, ..."


def add_search(commands: Any) -> None:
    """The command `search` with its steps."""
    summary = "search for the best network within a limit (ViT-ResNAS)"
    example = "search all cifar10 --space small32 --limit 10e6 --out runs/search"
    steps = command(commands, "search", summary, example, None).add_subparsers(required=True, metavar="STEP")
    options = "--space small32 --out runs/search"
    for name, text, example in (
        ("all", "train a super-network, then search it", f"search all cifar10 {options} --limit 10e6"),
        ("supernet", "train a super-network", f"search supernet cifar10 {options}"),
        ("evolve", "search a super-network that is trained", f"search evolve cifar10 {options} --limit 10e6"),
    ):
        trains, searches = name != "evolve", name != "supernet"
        parser = command(steps, name, text, example, _run, own_help=trains)
        parser.set_defaults(trains=trains, searches=searches)
        if trains:
            add_recipe(parser, _RECIPE, by_data=True)
            _add_sampling(parser)
            add_options(parser, "--cache")
        _add_common(parser)
        if searches:
            _add_evolution(parser, trains=trains)
    parser = command(steps, "show", "show what a search found", "search show runs/search", _show)
    parser.add_argument("folder", type=Path, help="the --out of a search")
    parser.add_argument("--top", type=at_least(1), default=10, metavar="N", help="networks to show, default 10")
    add_options(parser, "--json")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_data(parser, _DATA)
    add_folder(parser, "super-network, scores, report and winner")
    text = "what may be chosen: tiny or small (the paper's, 224 pixels), small32 (32 pixels), or a TOML file"
    parser.add_argument("--space", required=True, metavar="NAME|FILE.toml", help=text)
    text = "share of the training images that candidates are scored on, default 0.02 (the paper: 25 of each class)"
    parser.add_argument("--val-fraction", type=float, default=0.02, metavar="X", help=text)
    parser.add_argument("--split-seed", type=int, default=0, metavar="N", help="seed of that choice, default 0")
    add_options(parser, "--workers", "--device")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    text = "images of a batch that each drawn network trains on, default 64"
    parser.add_argument("--images-per-network", type=at_least(1), default=64, metavar="N", help=text)
    text = "epochs in which ever smaller choices join, default a quarter of all"
    parser.add_argument("--choice-warmup", type=at_least(0), metavar="N", help=text)


def _add_evolution(parser: argparse.ArgumentParser, *, trains: bool) -> None:
    from ..nas.settings import Evolution

    text = "the most a network may cost: multiply-accumulates, or milliseconds a batch"
    parser.add_argument("--limit", type=float, required=True, metavar="X", help=text)
    text = "what the limit is of; latency is measured on the device; default macs"
    parser.add_argument("--cost", choices=["macs", "latency"], default="macs", help=text)
    parser.add_argument("--score-batch", type=at_least(1), default=250, metavar="N", help="images at once, default 250")
    if not trains:
        parser.add_argument("--supernet", metavar="SOURCE", help="default: the one in --out")
        text = "of scoring, default float32"
        parser.add_argument("--precision", choices=["auto", "float32", "bf16", "fp16"], default="float32", help=text)
    for item in fields(Evolution):
        option, text = f"--{item.name}".replace("--seed", "--search-seed"), item.metadata["help"]
        value: dict[str, Any] = {"type": type(item.default), "default": item.default, "metavar": "N"}
        parser.add_argument(option, dest=f"evolution_{item.name}", **value, help=f"{text}, default {item.default}")


def _run(args: argparse.Namespace) -> int:
    from ..distributed import join_processes
    from ..nas.search import split_images
    from ..nas.settings import Evolution
    from ..nas.space import read_space
    from ..training.run import Computing

    space = read_space(args.space)
    evolution = None
    if args.searches:
        evolution = Evolution(**{item.name: getattr(args, f"evolution_{item.name}") for item in fields(Evolution)})
    recipe = _recipe(args) if args.trains else None
    if recipe is not None:
        args.precision = recipe.precision
    check_fresh(args)
    display = TrainingDisplay(recipe.total_epochs if recipe else 0, finished=None, images=images_at_once(recipe))
    kept = f"{args.out} keeps every finished epoch and every score, and the same command goes on from there"
    with join_processes(args.device) as process:
        computing = Computing(device=process.device, workers=args.workers, watch=watcher("images"))

        def work() -> None:
            records = open_data(args, args.data, "train", process)
            if recipe is not None and evolution is not None:
                _check_limit(args, space, evolution, len(records.classes))
            images, held_out = split_images(records, args.out, fraction=args.val_fraction, seed=args.split_seed)
            if recipe is not None:
                say(f"super-network of {args.space}: {len(images)} images to learn from, {len(held_out)} to score on")
                training = replace(computing, cache=args.cache, watch=display.watch, on_epoch=display.show_epoch)
                _train(args, space, recipe, images, held_out, training)
            if evolution is not None:
                _search(args, space, evolution, held_out, computing)

        return run_to_end(args, recipe or _recipe(args), display, work, kept=kept)


def _recipe(args: argparse.Namespace) -> Recipe:
    args.recipe = getattr(args, "recipe", None) or _RECIPES.get(args.space, _RECIPE)
    recipe = chosen_recipe(args)
    if recipe.ema_decay:
        raise ConfigError(f"ema_decay={recipe.ema_decay}: a super-network has no moving average; pass --ema-decay 0")
    return recipe


def _check_limit(args: argparse.Namespace, space: SearchSpace, evolution: Evolution, num_classes: int) -> None:
    """Refuse a limit that no network meets before hours of training; latencies are known only once measured."""
    from ..nas.costs import Macs
    from ..nas.evolution import check_limit

    if args.cost == "macs":
        check_limit(space, evolution, cost=Macs(space, num_classes), limit=args.limit)


def _train(
    args: argparse.Namespace,
    space: SearchSpace,
    recipe: Recipe,
    images: ImageRecords,
    val: ImageRecords,
    computing: Computing,
) -> None:
    from ..nas.search import SUPERNET_FOLDER, train_supernet
    from ..nas.settings import Sampling

    warmup = recipe.epochs // 4 if args.choice_warmup is None else args.choice_warmup
    sampling, out = Sampling(images=args.images_per_network, warmup_epochs=warmup), args.out / SUPERNET_FOLDER
    result = train_supernet(
        space, recipe=recipe, images=images, val=val, out=out, sampling=sampling, computing=computing
    )
    say(f"the largest network: top-1 {result.top1:.2f} %; wrote {result.out / 'model'}")


def _search(
    args: argparse.Namespace, space: SearchSpace, evolution: Evolution, images: ImageRecords, computing: Computing
) -> None:
    from ..nas.search import SUPERNET_FOLDER, WINNER_NAME, search

    result = search(
        space,
        supernet=getattr(args, "supernet", None) or args.out / SUPERNET_FOLDER / "model",
        images=images,
        limit=args.limit,
        out=args.out,
        cost=args.cost,
        evolution=evolution,
        batch_size=args.score_batch,
        precision=args.precision,
        computing=computing,
        on_generation=_show_generation,
    )
    best = result.scored[0]
    say(f"best of {len(result.scored)}: top-1 {best.top1:.2f} % with shared weights, {best.candidate.key()}")
    say(f"wrote {args.out / WINNER_NAME}; train it: deit-models train {args.data} --model {args.out / WINNER_NAME} ...")


def _show_generation(found: list[ScoredCandidate]) -> None:
    generation = max(one.generation for one in found)
    fresh = sum(one.generation == generation for one in found)
    say(f"generation {generation}: {fresh} networks, best top-1 {found[0].top1:.2f} %")


def _show(args: argparse.Namespace) -> int:
    from ..nas.tables import candidates_table, read_candidates, read_limit

    rows, limit = read_candidates(args.folder), read_limit(args.folder)
    if args.json:
        import json

        print(json.dumps(rows[: args.top], indent=2))
    else:
        print(candidates_table(rows, unit=limit.unit, limit=limit.limit, most=args.top), end="")
    return EXIT_OK
