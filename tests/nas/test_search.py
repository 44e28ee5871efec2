"""Whole searches at toy size: a super-network trained, searched, broken off anywhere and gone on with."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from nas.toy import coloured, supernet, toy_space

from deit_models import ConfigError, TrainingError, create_model, from_pretrained, recipe_named
from deit_models.checkpoint import Origin
from deit_models.nas.costs import Macs
from deit_models.nas.run import search, split_images, train_supernet
from deit_models.nas.scoring import Scorer
from deit_models.nas.space import Evolution, Sampling
from deit_models.nas.supernet import extract
from deit_models.training.recipe import Recipe
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
        workers=0,
        device="cpu",
        **options,
    )


def search_toy(out: Path, **options: Any) -> Any:
    _, held_out = split_images(coloured(96), out, fraction=0.25, seed=0)
    settings = {"limit": LIMIT, "evolution": EVOLUTION, "precision": "float32", "batch_size": 16, **options}
    source = settings.pop("supernet", out / "supernet" / "model")
    return search(SPACE, supernet=source, images=held_out, out=out, workers=0, device="cpu", **settings)


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
    from deit_models import evaluate

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
def test_search_broken_off_at_any_score_goes_on_to_the_same_result(
    finished: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = Scorer._top1, [0]

    def counted(self: Scorer, candidate: Any) -> float:
        count[0] += 1
        if count[0] == after + 1:
            raise Stop
        return original(self, candidate)

    source = finished / "supernet" / "model"
    total = len((finished / "candidates.jsonl").read_text().splitlines())
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "_top1", counted)
        with pytest.raises(Stop):
            search_toy(tmp_path, supernet=source)
        assert not (tmp_path / "winner.toml").exists()
        count[0] = -1000
        search_toy(tmp_path, supernet=source)
        assert count[0] == -1000 + total - after  # none was scored twice
    for name in ("candidates.jsonl", "winner.toml", "report.md"):
        assert (tmp_path / name).read_text() == (finished / name).read_text()


def test_finished_search_scores_nothing_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scorer, "_top1", lambda *_: pytest.fail("scored again"))
    assert len(search_toy(finished).scored) >= 12


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
