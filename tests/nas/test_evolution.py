"""Evolution, on scores that are known: what it draws, that it climbs, that it ends."""

from collections.abc import Sequence

import pytest
from nas.toy import toy_space

from deit_models import ConfigError
from deit_models.nas.costs import Macs
from deit_models.nas.evolution import ScoredCandidate, _Hunt, check_limit, evolve
from deit_models.nas.settings import Evolution
from deit_models.nas.space import SPACES, BlockChoice, Candidate, SearchSpace, StageChoices, candidates_of

SPACE = toy_space()
COST = Macs(SPACE, 3)
LIMIT = (COST(SPACE.smallest()) + COST(SPACE.largest())) / 2
SHORT = Evolution(population=12, generations=4, parents=6, mutants=5, crossovers=5, floor=0.8)


def units(candidates: Sequence[Candidate]) -> list[float]:
    """A score with a slope: hidden units in all."""
    return [float(sum(b.mlp_hidden for s in c.stages for b in s.blocks if b.kept)) for c in candidates]


def search(
    settings: Evolution = SHORT, *, space: SearchSpace = SPACE, limit: float = LIMIT, **changes: object
) -> list[ScoredCandidate]:
    return evolve(space, settings, cost=Macs(space, 3), limit=limit, **{"score": units, **changes})  # type: ignore[arg-type]


def test_every_candidate_is_within_the_limit_and_met_once() -> None:
    found = search()
    assert len(found) == 12 + 3 * 10
    assert len({one.candidate.key() for one in found}) == len(found)
    for one in found:
        assert one.cost == COST(one.candidate)
        assert 0.8 * LIMIT <= one.cost <= LIMIT
    assert [one.top1 for one in found] == sorted((one.top1 for one in found), reverse=True)


def test_generations_climb() -> None:
    settings = Evolution(population=30, generations=10, parents=10, mutants=15, crossovers=15, floor=0.5)
    found = search(settings)
    best = [max(one.top1 for one in found if one.generation <= g) for g in range(10)]
    assert best[-1] > best[0]
    first = [one.top1 for one in found if one.generation == 0]
    last = [one.top1 for one in found if one.generation == 9]
    assert sum(last) / len(last) > sum(first) / len(first)


def test_same_seed_same_search_and_another_seed_another() -> None:
    assert search() == search()
    other = search(Evolution(population=12, generations=4, parents=6, mutants=5, crossovers=5, floor=0.8, seed=1))
    assert {one.candidate.key() for one in other} != {one.candidate.key() for one in search()}


def test_paper_space_under_the_papers_limit() -> None:
    space, limit = SPACES["tiny"], 1794378240
    settings = Evolution(population=6, generations=2, parents=3, mutants=3, crossovers=3)
    found = evolve(space, settings, cost=Macs(space, 1000), limit=limit, score=units)
    assert len(found) == 12
    assert all(0.975 * limit <= one.cost <= limit for one in found)


def test_limit_that_nothing_meets_says_so_at_once() -> None:
    asked: list[Candidate] = []
    for limit in (0.9 * COST(SPACE.smallest()), 2 * COST(SPACE.largest())):
        with pytest.raises(
            ConfigError, match=r"no network of the space is within the limit of .* MACs: its networks take"
        ):
            search(limit=limit, score=lambda fresh: asked.extend(fresh) or units(fresh))
        with pytest.raises(ConfigError, match="no network of the space is within the limit"):
            check_limit(SPACE, SHORT, cost=COST, limit=limit)
    assert not asked


class Counting(Macs):
    """Counts how often it is asked."""

    calls = 0

    def __call__(self, candidate: Candidate) -> float:
        self.calls += 1
        return super().__call__(candidate)


def test_check_of_a_limit_that_is_met_costs_a_few_draws() -> None:
    space = SPACES["small32"]
    few, many = Counting(space, 10), Counting(space, 10)
    limit = (few(space.smallest()) + few(space.largest())) / 2
    check_limit(space, Evolution(), cost=few, limit=limit)
    evolve(space, Evolution(generations=1), cost=many, limit=limit, score=units)
    assert 0 < 50 * few.calls < many.calls


def test_limit_in_a_gap_of_a_small_space_is_found_out() -> None:
    space = SearchSpace(
        stages=(StageChoices(embed_dim=(32, 8), head_dim=4, num_heads=(2,), mlp_hidden=(32,), depth=1),),
        settings={"img_size": 16, "patch_size": 4},
    )
    cost = Macs(space, 3)
    between = (cost(space.smallest()) + cost(space.largest())) / 2
    with pytest.raises(ConfigError, match="no network of the space is within the limit"):
        evolve(space, Evolution(floor=0.99), cost=cost, limit=between, score=units)
    with pytest.raises(ConfigError, match="no network of the space is within the limit"):
        check_limit(space, Evolution(floor=0.99), cost=cost, limit=between)


def test_space_with_a_single_legal_candidate_ends() -> None:
    space = SearchSpace(
        stages=(StageChoices(embed_dim=(16, 8), head_dim=4, num_heads=(2, 1), mlp_hidden=(32, 16), depth=3),),
        settings={"img_size": 16, "patch_size": 4},
    )
    found = search(Evolution(floor=0.9999), space=space, limit=Macs(space, 3)(space.smallest()))
    assert [one.candidate.key() for one in found] == [space.smallest().key()]


def test_small_space_is_looked_through_completely() -> None:
    space = SearchSpace(
        stages=(StageChoices(embed_dim=(16, 8), head_dim=4, num_heads=(2, 1), mlp_hidden=(32, 16), depth=2),),
        settings={"img_size": 16, "patch_size": 4},
    )
    cost = Macs(space, 3)
    found = evolve(space, Evolution(floor=0.0), cost=cost, limit=cost(space.largest()), score=units)
    assert {one.candidate.key() for one in found} == {candidate.key() for candidate in candidates_of(space)}
    assert len(found) == 2 * 4 * 4


def test_mutants_change_each_item_at_the_given_rate() -> None:
    hunt = _Hunt(SPACE, Evolution(mutation=0.3), COST, LIMIT)
    parent = SPACE.largest()
    drawn = [hunt._mutant([parent]) for _ in range(2000)]
    # of three widths the parent's own is drawn again a third of the time
    changed = sum(one.stages[0].embed_dim != 16 for one in drawn) / 2000
    assert changed == pytest.approx(0.3 * 2 / 3, abs=0.04)
    removed = sum(not one.stages[0].blocks[1].kept for one in drawn) / 2000
    assert removed == pytest.approx(0.3, abs=0.04)
    assert all(one.stages[0].blocks[0].kept for one in drawn)


def test_crossed_candidates_take_every_item_from_one_of_two_parents() -> None:
    hunt = _Hunt(SPACE, Evolution(), COST, LIMIT)
    drawn = [hunt._crossed([SPACE.largest(), SPACE.smallest()]) for _ in range(1000)]
    assert {one.stages[0].embed_dim for one in drawn if one} == {16, 8}
    assert {one.stages[0].blocks[0] for one in drawn if one} == {
        BlockChoice(heads, hidden) for heads in (3, 1) for hidden in (24, 8)
    }
    assert hunt._crossed([SPACE.largest()]) is None
