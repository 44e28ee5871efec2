"""Numbers of a search: the paper's defaults, the order in which choices join, and refusals."""

import subprocess
import sys
from dataclasses import fields

import pytest

from deit_models import ConfigError
from deit_models.nas.settings import Evolution, Sampling


def test_defaults_are_the_papers_3350_candidates() -> None:
    paper = Evolution()
    assert paper.population + (paper.generations - 1) * (paper.mutants + paper.crossovers) == 3350
    assert all(field.metadata["help"] for field in fields(Evolution))


def test_choices_join_one_by_one() -> None:
    sampling = Sampling(warmup_epochs=30)
    assert [sampling.enabled(4, epoch) for epoch in (0, 9, 10, 19, 20, 29, 30, 99)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [Sampling(warmup_epochs=0).enabled(4, epoch) for epoch in (0, 5)] == [4, 4]
    assert sampling.enabled(1, 0) == 1


@pytest.mark.parametrize("change", [{"population": 0}, {"mutation": 1.5}, {"floor": 1}, {"parents": 2.5}])
def test_impossible_numbers_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Evolution(**change)  # type: ignore[arg-type]


def test_impossible_sampling_is_refused() -> None:
    with pytest.raises(ConfigError, match="images=0"):
        Sampling(images=0)
    with pytest.raises(ConfigError, match="warmup_epochs=-1; expected 0 or more"):
        Sampling(warmup_epochs=-1)


def test_command_can_show_them_without_torch() -> None:
    code = "import sys, deit_models.nas.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
