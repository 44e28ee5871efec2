"""The recipe of a command line: one option a field, what goes before what, and the help that shows it."""

import dataclasses

import pytest
from command_line import usage_error

from deit_models.cli import build_parser, main
from deit_models.cli.long_runs import chosen_recipe
from deit_models.recipes.presets import PRESETS
from deit_models.recipes.recipe import Recipe, recipe_named

OTHER = {
    "epochs": 7, "cooldown_epochs": 3, "batch_size": 64, "accumulate": 4, "optimizer": "sgd", "lr": 3e-3,
    "lr_batch": 0, "warmup_lr": 1e-7, "min_lr": 0.0, "warmup_epochs": 2, "schedule": "constant", "weight_decay": 0.1,
    "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "clip_grad": 1.0, "clip_mode": "agc", "ema_decay": 0.0,
    "drop_path_rate": 0.0, "drop_rate": 0.2, "patch_drop_rate": 0.5, "train_mode": False, "img_size": 32,
    "crop": "pad", "crop_scale": 0.5, "interpolation": "random", "hflip": 0.0, "augment": "3-augment",
    "color_jitter": 0.0, "erase": 0.0, "repeats": 1, "mixup": 0.0, "cutmix": 0.0, "mix_prob": 0.5, "mix_switch": 0.25,
    "label_smoothing": 0.0, "loss": "bce", "distillation": "soft", "distill_on": "class", "alpha": 0.1, "tau": 3.0,
    "precision": "fp16", "compile": "on", "seed": 9, "eval_every": 5, "save_every": 3, "patience": 4,
    "class_weights": "balanced", "sampling": "balanced", "grad_checkpointing": True,
    "layer_decay": 0.75, "label_heads": "both", "mix_mode": "patch", "erase_after_mixing": True, "best_of": "ema",
    "mix_size": 64, "cosub": True, "token_labels": 0.5, "class_target": "label", "mix_token": True,
}  # fmt: skip
"""Another value of each field than the default."""


def recipe_of(*arguments: object, command: str = "train") -> Recipe:
    teacher = ["--teacher", "resnet18"] if command == "distill" else []
    return chosen_recipe(build_parser().parse_args([command, "photos", "--out", "out", *teacher, *map(str, arguments)]))


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The help, its line breaks taken out."""
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_every_field_but_the_presets_name_has_another_value_here():
    assert {name for name, value in OTHER.items() if value != getattr(Recipe(), name)} == {
        field.name for field in dataclasses.fields(Recipe) if field.name != "preset"
    }


@pytest.mark.parametrize("name", OTHER)
def test_every_field_is_an_option(name):
    value, option = OTHER[name], "--" + name.replace("_", "-")
    arguments = [option, value]
    if isinstance(value, bool):
        arguments = [option if value else "--no-" + option[2:]]
    needed = {"loss": {"label_smoothing": 0.0}, "mix_token": {"token_labels": 0.5, "mixup": 0.0, "cutmix": 0.0}}
    more = needed.get(name, {})
    for other, wanted in more.items():
        arguments += ["--" + other.replace("_", "-"), wanted]
    assert recipe_of(*arguments) == recipe_named("deit_300e", **{name: value}, **more)


def test_command_goes_before_file_before_preset_before_defaults(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "cifar_scratch"\nepochs = 20\nlr = 0.25\ncompile = true\n')
    given = recipe_of("--recipe", path, "--epochs", 30, "--compile", "off")
    assert given == recipe_named("cifar_scratch", epochs=30, lr=0.25, compile=False)
    assert (given.batch_size, given.weight_decay) == (128, Recipe().weight_decay)


def test_each_command_has_its_own_preset():
    assert recipe_of() == recipe_named("deit_300e")
    assert recipe_of(command="distill") == recipe_named("deit_distill_300e")


def test_file_needs_no_suffix_and_a_presets_name_goes_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "cifar_scratch"):
        (tmp_path / name).write_text("epochs = 20")
    assert recipe_of("--recipe", "mine") == Recipe(epochs=20)
    assert recipe_of("--recipe", "cifar_scratch") == recipe_named("cifar_scratch")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--lr", "low"], "--lr: invalid float value: 'low'"),
        (["--schedule", "linear"], "--schedule: invalid choice: 'linear'"),
        (["--workers", "-1"], "--workers: -1; expected 0 or more"),
        (["--shard", "zero"], "--shard: invalid choice: 'zero'"),
        (["--device", "abacus"], "no device 'abacus' on this machine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_names_the_option(arguments, reason, capsys):
    assert reason in usage_error(capsys, "train", "photos", "--out", "out", *arguments)


def test_what_must_be_given_is_named(capsys):
    assert "required: data" in usage_error(capsys, "train", "--out", "out")
    assert "required: --out" in usage_error(capsys, "train", "photos")


def test_help_explains_every_field_with_its_value(capsys):
    text = help_of(capsys, "train")
    for field in dataclasses.fields(Recipe):
        if field.name != "preset":
            value = {True: "on", False: "off"}.get(field.default) if isinstance(field.default, bool) else field.default
            assert f"--{field.name.replace('_', '-')}" in text
            # argparse breaks lines after hyphens
            explained = f"{' '.join(field.metadata['help'].split())}; default {value}".replace(" ", "")
            assert explained in text.replace(" ", ""), field.name


def test_help_shows_the_values_of_what_stands_before_it(capsys):
    assert "default 100" in help_of(capsys, "train", "--recipe", "cifar_scratch")
    assert "default 33" in help_of(capsys, "train", "--recipe", "cifar_scratch", "--epochs", "33")
    assert "decision); default hard" in help_of(capsys, "distill")


def test_presets_are_listed_with_their_sources(capsys):
    for command in ("train", "distill"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--list-recipes"])
        assert stopped.value.code == 0
        _, *rows = capsys.readouterr().out.splitlines()
        assert [row.split()[0] for row in rows] == list(PRESETS)
        for row, (source, _) in zip(rows, PRESETS.values(), strict=True):
            assert row.endswith(source)
    assert rows[0].split()[1:6] == ["300", "1024", "0.001", "model's", "none"]
