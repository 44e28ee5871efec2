"""The recipe record: defaults, every field checked, overriding, and the way to TOML and back."""

import dataclasses
import math
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from deit_models import ConfigError
from deit_models.recipes.presets import PRESETS
from deit_models.recipes.recipe import Recipe, read_recipe, recipe_named

KINDS = get_type_hints(Recipe)
NUMBERS = [name for name, kind in KINDS.items() if kind in (int, float)]
CHOICES = [name for name, kind in KINDS.items() if get_args(kind)]


# The papers' figures


def test_defaults_are_the_papers_for_training_from_scratch():
    assert Recipe() == Recipe(
        epochs=300, batch_size=1024, optimizer="adamw", lr=5e-4, lr_batch=512, weight_decay=0.05, warmup_epochs=5,
        label_smoothing=0.1, drop_rate=0.0, drop_path_rate=0.1, repeats=3, clip_grad=0.0, mix_prob=1.0, mixup=0.8,
        cutmix=1.0, erase=0.25, augment="rand-m9-mstd0.5-inc1",
    )  # fmt: skip
    assert Recipe().peak_lr == pytest.approx(1e-3)
    assert dataclasses.replace(recipe_named("deit_300e"), preset="custom") == Recipe()


# Derived figures


def test_learning_rate_grows_with_the_batch_unless_told_otherwise():
    assert Recipe(lr=3e-4, batch_size=64, lr_batch=256).peak_lr == pytest.approx(0.75e-4)
    assert Recipe(lr=3e-4, batch_size=64, lr_batch=0).peak_lr == 3e-4


def test_cool_down_adds_to_the_epochs():
    assert Recipe(epochs=300, cooldown_epochs=10).total_epochs == 310


# Every field is checked


def test_every_field_is_explained():
    assert all(field.metadata["help"] for field in dataclasses.fields(Recipe))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, math.inf, math.nan, True, "1", None])
def test_number_out_of_every_range_or_of_another_type_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"^{name}="):
        Recipe(**{name: value})


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_choice_is_refused_with_the_known_ones(name):
    for value in ("whatever", 3, ["adamw"], *([] if name == "compile" else [True])):
        with pytest.raises(ConfigError) as refused:
            Recipe(**{name: value})
        assert str(refused.value) == f"{name}={value!r}; expected one of {', '.join(get_args(KINDS[name]))}"


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_accepted(name):
    for value in get_args(KINDS[name]):
        relation = {"label_smoothing": 0.0} if value == "bce" else {}
        assert getattr(Recipe(**{name: value}, **relation), name) == value


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind is bool])
def test_switch_takes_no_number(name):
    with pytest.raises(ConfigError, match=f"{name}=1 is not of type bool"):
        Recipe(**{name: 1})


@pytest.mark.parametrize(
    ("name", "fine", "wrong"),
    [
        ("epochs", 6, 0), ("batch_size", 1, 0), ("repeats", 1, 0), ("eval_every", 1, 0), ("accumulate", 1, 0),
        ("save_every", 1, 0),
        ("cooldown_epochs", 0, -1), ("lr_batch", 0, -1), ("img_size", 0, -1), ("warmup_epochs", 0, -1),
        ("lr", 0.0, -1e-9), ("clip_grad", 0.0, -1e-9), ("mixup", 0.0, -0.1), ("color_jitter", 0.0, -0.1),
        ("eps", 1e-12, 0.0), ("tau", 1e-3, 0.0), ("crop_scale", 1.0, 1.01), ("crop_scale", 1e-3, 0.0),
        ("hflip", 1.0, 1.01), ("erase", 0.0, -0.01), ("alpha", 1.0, 1.01), ("label_smoothing", 1.0, 1.01),
        ("ema_decay", 0.99999, 1.0), ("beta1", 0.0, -0.1), ("drop_path_rate", 0.9, 1.0),
        ("seed", 2**63 - 1, 2**63),
    ],
)  # fmt: skip
def test_end_of_a_range_is_in_it_and_the_next_value_is_not(name, fine, wrong):
    assert getattr(Recipe(**{name: fine}), name) == fine
    with pytest.raises(ConfigError, match=rf"^{name}={wrong}; expected .*\d"):
        Recipe(**{name: wrong})


def test_whole_number_will_do_for_a_float_but_not_the_other_way_round():
    recipe = Recipe(lr=1, mixup=0)
    assert (recipe.lr, recipe.mixup) == (1.0, 0.0)
    assert type(recipe.lr) is float
    with pytest.raises(ConfigError, match=r"epochs=100\.0 is not of type int"):
        Recipe(epochs=100.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss": "bce"}, "label_smoothing=0"),
        ({"best_of": "ema", "ema_decay": 0.0}, "best_of='ema' needs an average"),
        ({"cosub": True, "drop_path_rate": 0.0}, "cosub needs drop_path_rate above 0"),
        ({"cosub": True, "train_mode": False}, "cosub needs train_mode=true"),
        ({"cosub": True, "distillation": "hard"}, "cosub takes the place of a teacher"),
        ({"cosub": True, "class_weights": "balanced"}, "without class_weights"),
        ({"cosub": True, "mix_mode": "patch"}, "without that of mix_mode='patch'"),
        ({"batch_size": 100, "accumulate": 3}, "batch_size=100 is not a multiple of accumulate=3"),
        ({"epochs": 5}, "warmup_epochs=5 leaves none of epochs=5 to train"),
        ({"preset": "deit_301e"}, "unknown recipe 'deit_301e'; nearest: deit_300e"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        Recipe(**options)


@pytest.mark.parametrize(("given", "kept"), [(True, "on"), (False, "off"), ("auto", "auto"), ("on", "on")])
def test_compile_takes_the_switch_of_older_recipes(given, kept, tmp_path):
    assert Recipe(compile=given).compile == kept
    text = f"compile = {str(given).lower() if isinstance(given, bool) else repr(given)}\n"
    assert read_recipe(write(tmp_path, text)).compile == kept
    with pytest.raises(ConfigError, match=r"compile=1; expected one of auto, on, off"):
        Recipe(compile=1)


def test_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().lr = 1.0


# Overriding


def test_override_replaces_a_presets_field_and_no_other():
    recipe = recipe_named("cifar_scratch", epochs=7, lr=0.5)
    assert dataclasses.replace(recipe, epochs=100, lr=1e-3) == recipe_named("cifar_scratch")
    assert (recipe.epochs, recipe.lr) == (7, 0.5)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown recipe 'deit_300'; nearest: deit_300e"):
        recipe_named("deit_300")
    with pytest.raises(ConfigError, match=r"unknown option 'batchsize' for Recipe; nearest: batch_size"):
        recipe_named("deit_300e", batchsize=3)
    with pytest.raises(ConfigError, match=r"unknown option 'name'"):
        recipe_named("deit_300e", name="mine")


# TOML


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_recipe_comes_back_from_toml_unchanged(name, tmp_path):
    recipe = recipe_named(name, lr=1 / 3, min_lr=1.5e-7, compile=True, seed=2**63 - 1, distill_on="class", clip_grad=1)
    assert read_recipe(write(tmp_path, recipe.to_toml())) == recipe


def test_toml_names_every_field_in_order():
    assert [line.split(" = ")[0] for line in Recipe().to_toml().splitlines()] == list(KINDS)


def test_toml_replaces_fields_of_its_preset_and_keywords_replace_both(tmp_path):
    path = write(tmp_path, 'preset = "cifar_scratch"\nepochs = 20\nlr = 0.25\n')
    assert read_recipe(path) == recipe_named("cifar_scratch", epochs=20, lr=0.25)
    assert read_recipe(path, epochs=30) == recipe_named("cifar_scratch", epochs=30, lr=0.25)


def test_toml_without_a_preset_starts_from_the_defaults(tmp_path):
    assert read_recipe(write(tmp_path, "epochs = 20")) == Recipe(epochs=20)


def test_keyword_mends_what_the_file_has_wrong(tmp_path):
    assert read_recipe(write(tmp_path, "epochs = 3"), warmup_epochs=0).epochs == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("epochs = ", "not TOML: Invalid value"),
        ("epochs = -3", "epochs=-3; expected 1 or more"),
        (f"batch_size = {2**40}", "expected less than 2**31"),
        ('augment = "randaugment"', "augment='randaugment'; expected none, 3-augment or"),
        ('augment = ""', "augment=''; expected none"),
        ("epoch = 3", "unknown option 'epoch' for Recipe; nearest: epochs"),
        ("name = 'mine'\npreset = 'deit_300e'", "unknown option 'name'"),
        ("preset = 'deit_300'", "unknown recipe 'deit_300'; nearest: deit_300e"),
        ("preset = ['deit_300e']", "unknown recipe"),
        ("preset = 5", "unknown recipe '5'"),
        ("epochs = 5", "warmup_epochs=5 leaves none"),
        ("[train]\nepochs = 5", "unknown option 'train'"),
    ],
)
def test_file_that_is_wrong_is_named_in_one_line(text, reason, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        read_recipe(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message


def test_file_that_cannot_be_read_is_named(tmp_path):
    for path, content in ((tmp_path / "none.toml", None), (tmp_path, None), (tmp_path / "latin.toml", b"# caf\xe9")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as refused:
            read_recipe(path)
        assert str(refused.value).startswith(f"{path}: ")
