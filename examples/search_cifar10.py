"""Architecture search on CIFAR-10: is the network that a search finds better than one without a search?

    python examples/search_cifar10.py path/to/cifar10 --out runs/search

The data folder holds `train/<class>/*.jpg` and `test/<class>/*.jpg`. A super-network of the space `small32` is trained;
evolution looks for the best network that costs no more multiply-accumulates than `vit_res_micro_patch4_32`, which was
not searched for. Then the winner, that network, a random one of the same cost, and six more of the space are trained
alone, from the same seed by the same recipe, and scored on the test images, which have no part in the search. The rank
correlation of both accuracies shows how well shared weights rank networks.

A second start continues the first one; `--only` trains some of the networks, so that they can run side by side. Once
all are done, `table.md` and (with the extra `[plot]`) `networks.png` are written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch

import deit_models
from deit_models import create_model, model_info
from deit_models.data.datasets import open_dataset
from deit_models.distributed import join_processes
from deit_models.models.vit_resnas import ViTResNAS
from deit_models.nas.costs import Macs
from deit_models.nas.search import SUPERNET_FOLDER, WINNER_NAME, CandidateScores, search, split_images, train_supernet
from deit_models.nas.settings import Evolution, Sampling
from deit_models.nas.space import Candidate, SearchSpace, candidate_from_key, read_space
from deit_models.nas.supernet import SuperNetwork
from deit_models.nas.tables import plot_candidates, read_candidates
from deit_models.recipes.recipe import recipe_named
from deit_models.training.run import Computing, train

UNSEARCHED = "vit_res_micro_patch4_32"
ALONE = "alone"
"""Folder of the networks that are trained alone."""


def parse_args() -> argparse.Namespace:
    """The command line; the defaults are those of the recorded experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ and test/ class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, and to resume from")
    parser.add_argument("--space", default="small32", help="a name or a TOML file, for 32-pixel images")
    parser.add_argument("--supernet-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=2, help="of each network alone")
    parser.add_argument("--population", type=int, default=200)
    parser.add_argument("--generations", type=int, default=11)
    parser.add_argument("--offspring", type=int, default=15, help="mutants, and as many crossovers, in a generation")
    parser.add_argument(
        "--only", nargs="*", help="train these networks and stop: winner, unsearched, random, spread1..."
    )
    text = "networks from all over the space, of any cost, beside the winner and the random one"
    parser.add_argument("--spread", type=int, default=6, help=text)
    parser.add_argument("--workers", type=int, default=0, help="loading processes; the result is the same")
    return parser.parse_args()


def networks_of(args: argparse.Namespace, space: SearchSpace) -> dict[str, Candidate]:
    """The networks of the space that are trained alone, by name."""
    rows = read_candidates(args.out)
    drawn = sorted((row for row in rows if row["generation"] == 0), key=lambda row: row["key"])
    chosen = {"winner": rows[0], "random": Random(0).choice(drawn)}
    networks = {name: candidate_from_key(space, row["key"]) for name, row in chosen.items()}
    with torch.device("meta"):
        whole = SuperNetwork(ViTResNAS(space.config_of(space.largest())), space, Sampling(warmup_epochs=0))
    torch.manual_seed(0)
    return networks | {f"spread{number}": drawn for number, drawn in enumerate(whole.draw(args.spread), start=1)}


def main() -> None:
    """Search, then train the networks alone, unless that is done."""
    args = parse_args()
    space, info = read_space(args.space), model_info(UNSEARCHED)
    images, held_out = split_images(args.data, args.out, fraction=0.05, seed=0)

    def say(row: dict[str, object]) -> None:
        print(json.dumps(row), flush=True)

    warmup = {"warmup_epochs": min(1, args.supernet_epochs - 1), "precision": "float32"}
    train_supernet(
        space,
        recipe=recipe_named("cifar_scratch", epochs=args.supernet_epochs, eval_every=2, **warmup),
        images=images,
        val=held_out,
        out=args.out / SUPERNET_FOLDER,
        sampling=Sampling(images=32, warmup_epochs=int(0.4 * args.supernet_epochs)),
        computing=Computing(workers=args.workers, on_epoch=say),
    )
    search(
        space,
        supernet=args.out / SUPERNET_FOLDER / "model",
        images=held_out,
        limit=info.macs,
        out=args.out,
        evolution=Evolution(
            population=args.population,
            generations=args.generations,
            parents=40,
            mutants=args.offspring,
            crossovers=args.offspring,
        ),
        precision="float32",
        computing=Computing(workers=args.workers),
        on_generation=lambda found: say({"candidates": len(found), "best": found[0].top1}),
    )
    train_alone(args, space)


def train_alone(args: argparse.Namespace, space: SearchSpace) -> None:
    """Train the chosen networks from scratch; once all are done, write the report."""
    records = open_dataset(args.data, "train")
    test = open_dataset(args.data, "val", classes=records.classes)
    recipe = recipe_named(
        "cifar_scratch", epochs=args.epochs, warmup_epochs=min(1, args.epochs - 1), precision="float32"
    )
    networks, top1 = networks_of(args, space), {}
    for name in args.only or ["unsearched", *networks]:
        source, changes = UNSEARCHED, {}
        if name != "unsearched":
            source, changes = str(args.out / WINNER_NAME), {"stages": space.config_of(networks[name]).stages}
        torch.manual_seed(0)
        model = create_model(source, num_classes=len(records.classes), **changes)
        result = train(model, recipe=recipe, train=records, val=test, out=args.out / ALONE / name, workers=args.workers)
        top1[name] = result.top1 or 0.0
        print(f"{name}: {result.top1:.2f} % of {len(test)} test images", flush=True)
    if not args.only:
        report(args, space, networks, top1)


def report(
    args: argparse.Namespace, space: SearchSpace, networks: dict[str, Candidate], top1: dict[str, float]
) -> None:
    """All networks in a table, the rank correlation, and both accuracies as a picture."""
    shared = shared_accuracy(args, space, networks)
    macs = {name: int(Macs(space, 10)(candidate)) for name, candidate in networks.items()}
    macs["unsearched"] = model_info(UNSEARCHED).macs
    lines = ["| network | MACs | top-1 alone | with shared weights |", "| --- | ---: | ---: | ---: |"]
    for name in sorted(top1, key=lambda name: -top1[name]):
        with_shared = f"{shared[name]:.2f}" if name in shared else ""
        lines.append(f"| {name} | {macs[name]:,} | {top1[name]:.2f} | {with_shared} |")
    rho = rank_correlation([top1[name] for name in networks], [shared[name] for name in networks])
    lines += ["", f"Rank correlation (Spearman) over {len(networks)} networks: {rho:.2f}"]
    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        marked = {f"{name}, alone": (macs[name], top1[name]) for name in ("winner", "unsearched", "random")}
        plot_candidates(read_candidates(args.out), args.out / "networks.png", unit="MACs", marked=marked)
    except deit_models.MissingExtraError as error:
        print(error)


def shared_accuracy(args: argparse.Namespace, space: SearchSpace, networks: dict[str, Candidate]) -> dict[str, float]:
    """Accuracy on the held-out images with the super-network's weights."""
    largest = deit_models.from_pretrained(args.out / SUPERNET_FOLDER / "model")
    _, held_out = split_images(args.data, args.out, fraction=0.05, seed=0)
    with join_processes() as process:
        scorer = CandidateScores(
            largest,
            space,
            held_out,
            args.out / ALONE,
            process,
            computing=Computing(workers=args.workers),
            precision="float32",
            batch_size=250,
        )
        return dict(zip(networks, scorer(list(networks.values())), strict=True))


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's rho: the correlation of the ranks, equal values sharing their mean rank."""
    ranks = []
    for values in (torch.tensor(one), torch.tensor(other)):
        below = (values[None] < values[:, None]).sum(1)
        ranks.append(below + ((values[None] == values[:, None]).sum(1) - 1) / 2)
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    main()
