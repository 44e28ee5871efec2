"""Search spaces: the paper's figures, what is refused, and TOML there and back."""

from pathlib import Path
from typing import Any

import pytest
from golden import reference
from nas.toy import toy_space

from deit_models import ConfigError, create_model
from deit_models.nas.space import (
    SPACES,
    SearchSpace,
    StageChoices,
    candidate_from_key,
    candidates_of,
    read_space,
    space_from_toml,
    stages_of,
)
from deit_models.registry import model_spec

STAGE = {"embed_dim": (16, 8), "head_dim": 4, "num_heads": (2, 1), "mlp_hidden": (16, 8), "depth": 2}


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_largest_network_of_the_papers_space_is_the_published_super_network(name: str) -> None:
    space = SPACES[name]
    assert (
        space.config_of(space.largest()).stages
        == create_model(f"vit_resnas_supernet_{name}", device="meta").config.stages
    )


@pytest.mark.parametrize(("name", "space"), [("tiny", "tiny"), ("small", "small"), ("medium", "small")])
def test_searched_networks_lie_in_the_papers_spaces(name: str, space: str) -> None:
    # one published width is outside what the authors' repository lists: medium's second stage has all else in common
    stages = create_model(f"vit_resnas_{name}", device="meta").config.stages
    for stage, choices in zip(stages, SPACES[space].stages, strict=True):
        assert stage.embed_dim in choices.embed_dim
        assert stage.head_dim == choices.head_dim
        assert set(stage.num_heads) <= set(choices.num_heads)
        assert set(stage.mlp_hidden) <= set(choices.mlp_hidden)
        assert choices.depth - len(choices.removable) <= len(stage.num_heads) <= choices.depth


@pytest.mark.parametrize("space", [*SPACES.values(), toy_space()], ids=[*SPACES, "toy"])
def test_toml_comes_back(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(space.to_toml(), encoding="utf-8")
    assert read_space(path) == space


def test_every_candidate_is_listed_once_and_counted() -> None:
    space = SearchSpace(stages=(StageChoices(**STAGE, removable=(1,)),), settings={"img_size": 16, "patch_size": 4})
    found = list(candidates_of(space))
    assert len(found) == len({candidate.key() for candidate in found}) == space.count() == 2 * 4 * 5
    assert {space.largest(), space.smallest()} <= {*found} | {space.smallest()}
    assert space.smallest().key() in {candidate.key() for candidate in found}


def test_candidates_that_are_the_same_network_have_one_key() -> None:
    candidates = list(candidates_of(toy_space()))
    configs: dict[str, set[str]] = {}
    for candidate in candidates[:: len(candidates) // 500]:
        configs.setdefault(candidate.key(), set()).add(str(toy_space().config_of(candidate)))
    assert len(configs) > 100
    assert all(len(different) == 1 for different in configs.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": (8, 16)}, "from the largest to the smallest"),
        ({"num_heads": ()}, "one choice or more"),
        ({"mlp_hidden": (16.5, 8)}, "whole numbers"),
        ({"mlp_hidden": (16, "8")}, "whole numbers"),
        ({"embed_dim": [[16]]}, "whole numbers"),
        ({"num_heads": 2.0}, "whole numbers"),
        ({"removable": (0, 1)}, "not all of them"),
        ({"removable": (2,)}, "places 0 to 1"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_impossible_choices_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StageChoices(**{**STAGE, **change})


def test_a_stage_that_could_narrow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"16 wide and the next one 8.*never get narrower"):
        SearchSpace(stages=(StageChoices(**STAGE), StageChoices(**STAGE)), settings={"img_size": 16, "patch_size": 4})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[stages]]\nembed_dims = [16]", "unknown field 'embed_dims' of a stage; nearest: embed_dim"),
        ("[[stages]]\nembed_dim = [16]", "a stage lacks head_dim"),
        ("[setings]", "not 'setings'"),
        ("[settings]\npatch = 4", "one stage or more"),
        ("[settings", "not TOML"),
    ],
)
def test_wrong_toml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space_from_toml(text)


@pytest.mark.parametrize("text", ["stages = 5", "settings = 3\n", "stages = [1, 2]", "preprocessing = 7"])
def test_value_in_the_place_of_a_table_is_refused_with_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.toml"):
        read_space(tmp_path / "a.toml")


def test_unknown_space_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no search space 'smal32'; nearest: small32"):
        read_space("smal32")


def test_key_is_read_back_to_the_same_network() -> None:
    space = toy_space()
    for candidate in list(candidates_of(space))[::301]:
        again = candidate_from_key(space, candidate.key())
        assert again.key() == candidate.key()
        assert space.config_of(again) == space.config_of(candidate)


@pytest.mark.parametrize("key", ["", "16: 1x8", "7: 1x8 | 24: 1x24", "16: 1x8 1x8 1x8 | 24: 1x24", "16: x | 24: 1x24"])
def test_key_of_no_network_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="is no network of this space"):
        candidate_from_key(toy_space(), key)


def test_networks_in_the_authors_notation_are_the_registered_ones() -> None:
    network_def = reference.read("vit_resnas_tiny")["config"]["network_def"]
    assert stages_of(network_def) == model_spec("vit_resnas_tiny").config.stages
    # a block that was searched away is left out
    with_removed = [*network_def[:2], [1, [176, 6, 32], [176, 384], 0], *network_def[2:]]
    assert stages_of(with_removed) == stages_of(network_def)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([[4, 16], [1, [24, 2, 8], [24, 32], 1]], "follows tokens of width 16"),
        ([[4, 16], [1, [16, 2, 8], [16, 32], 1], [1, [16, 2, 4], [16, 32], 1], [2, 16, 10]], r"widths \[4, 8\]"),
        ([[4, 16], [7, 16]], "of no known kind"),
        ([[4, 16], [2, 16, 10]], r"heads of widths \[\]"),
    ],
)
def test_wrong_notation_is_refused(entries: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stages_of(entries)
