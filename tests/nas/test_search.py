"""Whole searches at toy size: a super-network trained, searched, broken off anywhere and gone on with."""

import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from nas.toy import coloured, supernet, toy_space

from deit_models import (
    ConfigError,
    DataError,
    ImageError,
    TrainingError,
    create_model,
    evaluate,
    from_pretrained,
    recipe_named,
)
from deit_models.checkpoint import Origin
from deit_models.data.records import ImageRecords, SubsetRecords
from deit_models.nas.costs import Macs
from deit_models.nas.search import search, split_images, train_supernet
from deit_models.nas.settings import Evolution, Sampling
from deit_models.nas.supernet import extract
from deit_models.recipes.recipe import Recipe
from deit_models.training.run import Computing, run_training, train

SPACE = toy_space()
COST = Macs(SPACE, 3)
LIMIT = (COST(SPACE.smallest()) + COST(SPACE.largest())) / 2
EVOLUTION = Evolution(population=6, generations=3, parents=3, mutants=3, crossovers=3, floor=0.7)


def recipe(**changes: Any) -> Recipe:
    return recipe_named(
        "cifar_scratch",
        **{"epochs": 3, "warmup_epochs": 1, "batch_size": 16, "lr": 3e-3, "precision": "float32", **changes},
    )


def train_toy(out: Path, **options: Any) -> Any:
    images, held_out = split_images(coloured(96), out, fraction=0.25, seed=0)
    return train_supernet(
        SPACE,
        recipe=options.pop("recipe", recipe()),
        images=images,
        val=held_out,
        out=out / "supernet",
        sampling=Sampling(images=4, warmup_epochs=1),
        computing=Computing(device="cpu", workers=0, **options),
    )


def search_toy(out: Path, *, images: Any = None, **options: Any) -> Any:
    _, held_out = split_images(coloured(96), out, fraction=0.25, seed=0)
    settings = {"limit": LIMIT, "evolution": EVOLUTION, "precision": "float32", "batch_size": 16, **options}
    source = settings.pop("supernet", out / "supernet" / "model")
    computing = Computing(device="cpu", workers=0)
    return search(SPACE, supernet=source, images=images or held_out, out=out, computing=computing, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nothing broke off."""
    out = tmp_path_factory.mktemp("search")
    train_toy(out)
    search_toy(out)
    return out


def test_whole_search_learns_and_writes_what_it_found(finished: Path) -> None:
    log = [json.loads(line) for line in (finished / "supernet" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3
    assert log[-1]["loss"] < log[0]["loss"]
    rows = [json.loads(line) for line in (finished / "candidates.jsonl").read_text().splitlines()]
    # crossing a few parents that are alike does not always give three new networks
    assert 6 + 2 * 3 <= len(rows) <= 6 + 2 * 6
    assert {row["generation"] for row in rows} == {0, 1, 2}
    assert rows[0]["top1"] == max(row["top1"] for row in rows)
    assert all(0.7 * LIMIT <= row["cost"] <= LIMIT for row in rows)
    report = (finished / "report.md").read_text()
    assert f"| 1 | {rows[0]['top1']:.2f} |" in report
    assert f"# {len(rows)} networks within" in report
    if find_spec("matplotlib"):  # else a line says that the picture needs the extra [plot]
        assert (finished / "candidates.png").read_bytes().startswith(b"\x89PNG")


def test_winner_is_the_best_candidate_with_inherited_weights(finished: Path) -> None:
    best = json.loads((finished / "candidates.jsonl").read_text().splitlines()[0])
    winner = from_pretrained(finished / "winner")
    assert winner.origin is not None
    assert winner.origin.top1 == best["top1"]
    assert winner.origin.class_names == ("red", "green", "blue")
    _, held_out = split_images(coloured(96), finished, fraction=0.25, seed=0)
    assert evaluate(winner, held_out, workers=0).top1 == pytest.approx(best["top1"], abs=1e-3)


def test_architecture_of_the_winner_is_built_and_trained(finished: Path, tmp_path: Path) -> None:
    model = create_model(str(finished / "winner.toml"), num_classes=3)
    trained = from_pretrained(finished / "winner")
    assert model.config == trained.config
    assert model.origin is not None
    assert model.origin.preprocessing == trained.origin.preprocessing == SPACE.preprocessing
    assert not torch.equal(next(model.parameters()), next(trained.parameters()))
    train(model, recipe=recipe(epochs=1, warmup_epochs=0), train=coloured(32), out=tmp_path, workers=0, device="cpu")
    assert from_pretrained(tmp_path / "model").config == model.config


class Stop(Exception):  # noqa: N818
    """What breaks a search off in these tests."""


@pytest.mark.parametrize("after", [0, 1])
def test_training_broken_off_goes_on_to_the_same_weights(finished: Path, tmp_path: Path, after: int) -> None:
    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == after:
            raise Stop

    with pytest.raises(Stop):
        train_toy(tmp_path, on_epoch=stop)
    train_toy(tmp_path)
    whole, resumed = (from_pretrained(out / "supernet" / "model").state_dict() for out in (finished, tmp_path))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_super_network_is_prepared_for_each_epoch_also_when_training_goes_on(tmp_path: Path) -> None:
    whole, begun = supernet(SPACE, images=4, warmup_epochs=5), []

    def begin(epoch: int) -> None:
        begun.append(epoch)
        whole.begin_epoch(epoch)

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 0:
            raise Stop

    def go_on(on_epoch: Any) -> None:
        computing = Computing(device="cpu", workers=0, on_epoch=on_epoch)
        images = {"train": coloured(32), "val": None}
        run_training(whole, recipe=recipe(), out=tmp_path, computing=computing, before_epoch=begin, **images)

    whole.origin = Origin(name="toy", preprocessing=SPACE.preprocessing)
    with pytest.raises(Stop):
        go_on(stop)
    assert (begun, whole.epoch) == ([0], 0)
    go_on(None)
    assert (begun, whole.epoch) == ([0, 1, 2], 2)


@pytest.mark.parametrize("after", [0, 3, 7, 11])
def test_search_broken_off_at_any_score_goes_on_to_the_same_result(finished: Path, tmp_path: Path, after: int) -> None:
    scores = (finished / "scores.jsonl").read_text().splitlines(keepends=True)
    # a process that is killed leaves the scores so far, and perhaps a part of the next
    for name in ("search.toml", "space.toml", "split.json"):
        shutil.copy(finished / name, tmp_path)
    (tmp_path / "scores.jsonl").write_text("".join(scores[:after]) + scores[after][:9])
    search_toy(tmp_path, supernet=finished / "supernet" / "model")
    assert (tmp_path / "scores.jsonl").read_text().splitlines(keepends=True) == scores  # none was scored twice
    for name in ("candidates.jsonl", "winner.toml", "report.md"):
        assert (tmp_path / name).read_text() == (finished / name).read_text()


def test_finished_search_scores_nothing_again(finished: Path, tmp_path: Path) -> None:
    for name in ("search.toml", "space.toml", "split.json"):
        shutil.copy(finished / name, tmp_path)
    # no network has these accuracies
    rows = [json.loads(line) for line in (finished / "scores.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "top1": 99 + row["top1"] / 100}) + "\n" for row in rows]
    (tmp_path / "scores.jsonl").write_text("".join(lines))
    found = search_toy(tmp_path, supernet=finished / "supernet" / "model").scored
    assert len(found) >= 12
    assert all(one.top1 >= 99 for one in found)
    assert (tmp_path / "scores.jsonl").read_text() == "".join(lines)


class Damaged(ImageRecords):
    """The images of another set, some of which cannot be read."""

    def __init__(self, records: ImageRecords, damaged: set[int]) -> None:
        self.records, self.damaged = records, damaged
        self.name, self.classes = records.name, records.classes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index in self.damaged:
            raise ImageError(f"image {index} cannot be read")
        return self.records[index]


def test_unreadable_images_do_not_count(finished: Path, tmp_path: Path) -> None:
    source, one = finished / "supernet" / "model", Evolution(population=1, generations=1, floor=0.0)
    _, held_out = split_images(coloured(96), finished, fraction=0.25, seed=0)
    best = search_toy(tmp_path / "a", supernet=source, evolution=one, images=Damaged(held_out, {0, 5})).scored[0]
    network = extract(from_pretrained(source), SPACE, best.candidate)
    network.origin = Origin(name="toy", preprocessing=SPACE.preprocessing)
    fine = SubsetRecords(held_out, [i for i in range(len(held_out)) if i not in (0, 5)])
    assert best.top1 == pytest.approx(evaluate(network, fine, workers=0).top1, abs=1e-3)
    with pytest.raises(DataError, match=r"at least \d+ of the 24 images of .* cannot be read"):
        search_toy(tmp_path / "b", supernet=source, evolution=one, images=Damaged(held_out, set(range(24))))
    two = SubsetRecords(held_out, [0, 1])
    with pytest.raises(DataError, match=r"no image of .* is left to score candidates on"):
        search_toy(tmp_path / "c", supernet=source, evolution=one, images=Damaged(two, {0, 1}))


def test_other_settings_need_another_folder(finished: Path) -> None:
    before = (finished / "candidates.jsonl").read_text()
    with pytest.raises(TrainingError, match=r"search.toml says limit = .*; use those settings, or a new folder"):
        search_toy(finished, limit=LIMIT * 1.1)
    with pytest.raises(TrainingError, match="another seed or fraction"):
        split_images(coloured(96), finished, fraction=0.3, seed=0)
    assert (finished / "candidates.jsonl").read_text() == before


def test_super_network_of_another_space_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the super-network of this space"):
        search_toy(tmp_path, supernet=finished / "winner")
    assert not list(tmp_path.glob("scores*"))


def test_moving_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ema_decay=0.9.*needs 0"):
        train_toy(tmp_path, recipe=recipe(ema_decay=0.9))


def test_latency_limits_a_search_too(finished: Path, tmp_path: Path) -> None:
    few = Evolution(population=3, generations=1, floor=0.0)
    source = finished / "supernet" / "model"
    result = search_toy(tmp_path, supernet=source, cost="latency", limit=1e4, evolution=few)
    assert len(result.scored) == 3
    assert all(0 < one.cost < 1e4 for one in result.scored)


def test_extracted_candidates_differ_in_score(finished: Path) -> None:
    # the check that scores come from each candidate's own weights
    network = from_pretrained(finished / "supernet" / "model")
    outputs = [extract(network, SPACE, c)(torch.ones(1, 3, 16, 16)) for c in (SPACE.smallest(), SPACE.largest())]
    assert not torch.allclose(*outputs)


@pytest.mark.slow
def test_search_killed_at_any_moment_goes_on(finished: Path, tmp_path: Path) -> None:
    """Twelve kills at moments that fall into training, writing and scoring; then the same winner."""
    out = tmp_path / "search"
    script = (
        "import sys; from pathlib import Path; sys.path[:0] = ['tests']\n"
        "from nas.test_search import train_toy, search_toy\n"
        f"train_toy(Path({str(out)!r})); search_toy(Path({str(out)!r})); print('done')\n"
    )
    root = Path(__file__).parents[2]
    for number in range(40):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE)
        try:
            output, _ = process.communicate(timeout=4 + 0.35 * number if number < 12 else 120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            time.sleep(0.01)
            continue
        assert output.decode().strip().endswith("done")
        break
    for name in ("candidates.jsonl", "winner.toml"):
        assert (out / name).read_text() == (finished / name).read_text()
