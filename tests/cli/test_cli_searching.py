"""`deit-models search`: all steps in one and one by one, in under a minute on a CPU; what it refuses."""

import json
from pathlib import Path

import pytest
from command_line import CLASSES, failure, run, save_class_folders, usage_error

from deit_models import create_model, from_pretrained
from deit_models.cli import main
from deit_models.nas.space import SearchSpace, StageChoices

SPACE = SearchSpace(
    stages=(
        StageChoices(embed_dim=(12, 8), head_dim=4, num_heads=(2, 1), mlp_hidden=(16, 8), depth=2, removable=(1,)),
        StageChoices(embed_dim=(16, 12), head_dim=4, num_heads=(2, 1), mlp_hidden=(16, 8), depth=1),
    ),
    settings={"img_size": 16, "patch_size": 4, "stem_dim": 4},
)
RECIPE = ("--epochs", 2, "--warmup-epochs", 0, "--batch-size", 8, "--precision", "float32", "--lr", 0.003)
SAMPLING = ("--images-per-network", 4, "--choice-warmup", 1)
EVOLUTION = ("--limit", 60000, "--floor", 0.5, "--population", 4, "--generations", 2, "--parents", 2, "--mutants", 2)
SHARED = ("--val-fraction", 0.25, "--workers", 0, "--device", "cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_class_folders(tmp_path / "data" / "train", CLASSES, 12).parent


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.toml"
    path.write_text(SPACE.to_toml(), encoding="utf-8")
    return path


def search(step: str, data: Path, out: Path, space: Path, *options: object) -> int:
    arguments = ("search", step, data, "--out", out, "--space", space, *SHARED, *options)
    return main([str(argument) for argument in arguments])


def test_all_steps_in_one_leave_a_winner_that_trains(data, space, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert search("all", data, out, space, *RECIPE, *SAMPLING, *EVOLUTION) == 0
    printed, _ = capsys.readouterr()
    assert "27 images to learn from, 9 to score on" in printed
    assert "epoch 2/2" in printed
    assert "generation 1:" in printed
    assert "best of " in printed
    winner = from_pretrained(out / "winner")
    assert winner.origin.class_names == CLASSES
    assert create_model(str(out / "winner.toml")).config == winner.config
    train = ("train", data, "--model", out / "winner.toml", "--out", tmp_path / "own", "--val-data", "none")
    assert main([str(argument) for argument in (*train, "--recipe", "cifar_scratch", *RECIPE, "--workers", 0)]) == 0
    assert from_pretrained(tmp_path / "own" / "model").config.stages == winner.config.stages


def test_steps_one_by_one_give_the_same_and_go_on(data, space, tmp_path, capsys) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert search("all", data, whole, space, *RECIPE, *SAMPLING, *EVOLUTION) == 0
    assert search("supernet", data, out, space, *RECIPE, *SAMPLING) == 0
    assert search("evolve", data, out, space, *EVOLUTION) == 0
    assert (out / "candidates.jsonl").read_text() == (whole / "candidates.jsonl").read_text()
    capsys.readouterr()
    assert search("all", data, whole, space, *RECIPE, *SAMPLING, *EVOLUTION) == 0
    assert "epoch" not in capsys.readouterr().out  # nothing left to train


def test_show_prints_the_table_or_json(data, space, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert search("all", data, out, space, *RECIPE, *SAMPLING, *EVOLUTION) == 0
    capsys.readouterr()
    assert main(["search", "show", str(out), "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# ")
    assert "within 60,000 MACs" in shown
    assert "| 2 |" in shown
    assert "| 3 |" not in shown.rpartition("rank")[2]
    assert main(["search", "show", str(out), "--top", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2
    assert rows[0]["top1"] >= rows[1]["top1"]


def test_super_network_trained_elsewhere_is_searched(data, space, tmp_path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert search("supernet", data, first, space, *RECIPE, *SAMPLING) == 0
    model = first / "supernet" / "model"
    assert search("evolve", data, second, space, *EVOLUTION, "--supernet", model) == 0
    assert (second / "winner.toml").exists()
    assert not (second / "supernet").exists()


def test_wrong_searches_are_explained_in_one_line(data, space, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    common = ("--out", out, *SHARED)
    assert "no search space 'smal32'; nearest: small32" in failure(
        capsys, "search", "supernet", data, "--space", "smal32", *common
    )
    assert "a super-network has no moving average" in failure(
        capsys, "search", "supernet", data, "--space", space, *common, "--ema-decay", 0.9
    )
    assert "floor=1.5 is not a probability" in failure(
        capsys, "search", "evolve", data, "--space", space, *common, "--limit", 1, "--floor", 1.5
    )
    assert "holds no finished search" in failure(capsys, "search", "show", tmp_path)
    assert "--limit" in usage_error(capsys, "search", "evolve", data, "--space", space, "--out", out)
    assert not (out / "supernet").exists()


def test_limit_out_of_reach_is_said_before_anything_is_scored(data, space, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert search("supernet", data, out, space, *RECIPE, *SAMPLING) == 0
    capsys.readouterr()
    arguments = ("search", "evolve", data, "--out", out, "--space", space, *SHARED, "--limit", 5)
    assert main([str(argument) for argument in arguments]) == 1
    assert "no network of the space is within the limit" in capsys.readouterr().err
    assert not (out / "scores.jsonl").exists()


def test_limit_out_of_reach_is_said_before_anything_is_trained(data, space, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = ("--space", space, "--out", out, *SHARED, *RECIPE, *SAMPLING, "--limit", 5)
    error = failure(capsys, "search", "all", data, *arguments)
    assert "no network of the space is within the limit of 4.875 to 5 MACs: its networks take" in error
    assert not list(out.rglob("*.*"))


# latencies are shared besides scores, so that they show what multiply-accumulates show
@pytest.mark.parametrize("cost", ["latency", pytest.param("macs", marks=pytest.mark.slow)])
def test_two_processes_share_the_search(cost, data, space, tmp_path) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    few = (*EVOLUTION[2:], "--limit", 60000 if cost == "macs" else 1000, "--cost", cost, "--floor", 0.0)
    options = (data, "--space", space, *SHARED, *few)
    status, out, err = run("search", "all", *options, "--out", both, *RECIPE, *SAMPLING, options=torchrun)
    assert status == 0, err
    assert out.count("best of ") == 1  # the first process speaks
    supernet = both / "supernet" / "model"
    if cost == "latency":
        (alone).mkdir()
        (alone / "latency.jsonl").write_text((both / "latency.jsonl").read_text())
    arguments = ("search", "evolve", *options, "--out", alone, "--supernet", supernet)
    assert main([str(argument) for argument in arguments]) == 0
    for name in ("candidates.jsonl", "winner.toml"):
        assert (both / name).read_text() == (alone / name).read_text()
