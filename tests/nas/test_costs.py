"""What candidates cost: exact multiply-accumulates, and latencies that are measured once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nas.toy import RESNAS, RESNAS_OPTIONS, STAGES, measured, toy_space

from deit_models import ConfigError, list_models, model_info
from deit_models.distributed import Process
from deit_models.models.vit_resnas import ViTResNAS, ViTResNASConfig
from deit_models.nas.costs import Latency, Ledger, Macs, closed_form_macs, make_cost
from deit_models.nas.settings import Sampling
from deit_models.nas.space import SPACES, Candidate
from deit_models.nas.supernet import SuperNetwork
from deit_models.registry import model_spec

ALONE = Process(0, 1, torch.device("cpu"))


def some(name: str, count: int) -> list[Candidate]:
    space = SPACES[name]
    with torch.device("meta"):
        network = ViTResNAS(space.config_of(space.largest()))
    torch.manual_seed(0)
    return [space.smallest(), *SuperNetwork(network, space, Sampling(warmup_epochs=0)).draw(count)]


@pytest.mark.parametrize("name", ["tiny", "small32"])
def test_macs_are_those_of_torchs_counter(name: str) -> None:
    space = SPACES[name]
    for candidate in some(name, 4):
        assert Macs(space, 7)(candidate) == measured(ViTResNAS, space.config_of(candidate, num_classes=7))


@pytest.mark.parametrize("options", RESNAS_OPTIONS, ids=str)
def test_closed_form_counts_every_option_as_torch_does(options: dict[str, Any]) -> None:
    config = replace(RESNAS, **options)
    assert closed_form_macs(config) == measured(ViTResNAS, config)


@pytest.mark.parametrize("name", list_models("vit_res*"))
def test_closed_form_gives_the_manifests_figures(name: str) -> None:
    assert closed_form_macs(model_spec(name).config) == model_info(name).macs


def test_closed_form_builds_no_network() -> None:
    def deep(blocks: int) -> ViTResNASConfig:
        stage = {**STAGES[0], "num_heads": (3,) * blocks, "mlp_hidden": (60_000,) * blocks}
        return replace(RESNAS, stages=(stage,))

    # the last one takes tens of gigabytes
    one, two, many = (closed_form_macs(deep(blocks)) for blocks in (1, 2, 256))
    assert many == one + 255 * (two - one)


def test_latency_is_measured_once_and_found_again(tmp_path: Path) -> None:
    space = toy_space()
    cost = Latency(space, 3, tmp_path, process=ALONE, batch=2)
    small, large = cost(space.smallest()), cost(space.largest())
    assert 0 < small < large
    again = Latency(space, 3, tmp_path, process=ALONE, batch=2)
    assert (again(space.smallest()), again(space.largest())) == (small, large)
    lines = (tmp_path / "latency.jsonl").read_text().splitlines()
    # parts that take the same time in both were measured once for both
    assert len([line for line in lines if "block" in line]) == 2 + 2
    # no measurement gives these times
    rows = [{**json.loads(line), "ms": 1e6} for line in lines]
    (tmp_path / "latency.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = Latency(space, 3, tmp_path, process=ALONE, batch=2)
    assert (known(space.smallest()), known(space.largest())) == (5e6, 8e6)


def test_unknown_cost_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cost='joules'; expected 'macs' or 'latency'"):
        make_cost("joules", toy_space(), 3, tmp_path, process=ALONE, batch=1)  # type: ignore[arg-type]


def test_ledger_keeps_entries_and_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    ledger = Ledger(path, "top1")
    ledger.add("a", 1.5)
    ledger.add("b", 2.5)
    with path.open("a") as file:
        file.write('{"key": "c", "to')
    again = Ledger(path, "top1")
    assert len(again) == 2
    assert "c" not in again
    again.add("c", 3.5)
    assert [Ledger(path, "top1")[key] for key in "abc"] == [1.5, 2.5, 3.5]


def test_ledger_of_another_process_is_not_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", "top1", writes=False)
    ledger.add("a", 1.0)
    assert ledger["a"] == 1.0
    assert not (tmp_path / "ledger.jsonl").exists()
