"""The fuzzers find nothing: some seconds each, and minutes under `slow`."""

import checkpoints
import images
import pytest
from fuzzing import Case, run_cases

CASES = {"checkpoints": checkpoints.case, "images": images.case}
FEWEST = 60
"""Cases in the shorter run, on a machine that is busy with other work."""


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def search(case: Case, *, seed: int, count: int, seconds: float) -> None:
    tally = run_cases(case, seed=seed, numbers=range(count), seconds=seconds)
    assert [str(finding) for finding in tally.findings] == []
    assert sum(counter.total() for counter in tally.outcomes.values()) >= FEWEST
    assert tally.total("refused") > 20
    assert tally.total("same") > 5


def test_damaged_files_are_right_or_refused(case: Case) -> None:
    search(case, seed=0, count=2000, seconds=25)


@pytest.mark.slow
def test_many_damaged_files_are_right_or_refused(case: Case) -> None:
    search(case, seed=1, count=10_000, seconds=900)
