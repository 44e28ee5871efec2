"""`deit-models finetune`: what a run prints and leaves, which settings it chooses, what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import CLASSES, MODELS, failure, save_class_folders

import deit_models
from deit_models.cli import main
from deit_models.recipes.recipe import read_recipe, recipe_named
from deit_models.registry import DEFAULT_MODEL

QUICK = ["--epochs=2", "--warmup-epochs=0", "--batch-size=6", "--precision=float32", "--workers=0", "--device=cpu"]

pytestmark = pytest.mark.usefixtures("atoms")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A folder with a model that knows other classes."""
    torch.manual_seed(0)
    deit_models.create_model(MODELS[0]).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return save_class_folders(tmp_path / "pictures", CLASSES, 6)


def finetune(capsys: pytest.CaptureFixture[str], data: Path, out: Path, *more: object) -> list[str]:
    """Run the command to its end; the lines it prints."""
    assert main([str(argument) for argument in ("finetune", data, "--out", out, *QUICK, *more)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    return printed.partition("next:\n")[0].splitlines()


def test_run_prints_what_it_does_an_epoch_a_line_and_where_the_models_are(pictures, start, tmp_path, capsys):
    out = tmp_path / "run"
    plan, first, second, summary = finetune(capsys, pictures, out, "--model", start)
    assert plan == (f"{start}, mode full, recipe finetune: 18 images of 3 classes, 20% of them set aside; into {out}")
    assert first.startswith("epoch 1/2  loss ")
    assert second.startswith("epoch 2/2  loss ")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert summary == (
        f"validation {metrics['val']['top1']:.2f} % of 3 images; wrote {out / 'best'} and the like for timm and "
        "transformers"
    )
    assert deit_models.from_pretrained(out / "best").origin.class_names == CLASSES


def test_run_ends_with_commands_for_its_model_and_repeated_trains_nothing(pictures, start, tmp_path, capsys):
    arguments = ["finetune", pictures, "--out", tmp_path / "run", *QUICK, "--model", start]
    assert main([str(argument) for argument in arguments]) == 0
    steps = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    assert [line.split()[0] for line in steps] == ["look", "classify", "publish"]
    assert main([str(argument) for argument in arguments]) == 0
    assert "\nepoch" not in capsys.readouterr().out
    options = [*QUICK, "--model", start, "--test-data", pictures]
    assert main([str(argument) for argument in ("finetune", pictures, "--out", tmp_path / "tested", *options)]) == 0
    assert f"deit-models evaluate {tmp_path / 'tested' / 'best'} {pictures}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--mode", "hed"], "mode='hed'; expected 'full', 'head', 'attention', or 'last-N'"),
        (["--mode", "last-"], "mode='last-'; expected"),
        (["--mode", "Head"], "mode='Head'; expected"),
        (["--teacher-weights", "teacher.pth"], "--teacher-weights belong to a teacher; name it with --teacher"),
        (["--layout", "timm"], "--layout is of the model that is pushed"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, capsys, options, text):
    out = tmp_path / "out"
    assert text in failure(capsys, "finetune", tmp_path / "no data", "--out", out, "--model", "no/model", *options)
    assert not out.exists()


def test_options_without_use_in_head_mode_are_named(pictures, start, tmp_path, caplog):
    options = ["--mode", "head", "--model", start, "--lr", "0.1", "--mixup", "0.5", "--patience", "3", "--workers=0"]
    assert main([str(part) for part in ("finetune", pictures, "--out", tmp_path / "out", *options, "--seed=1")]) == 0
    assert [text for text in caplog.messages if "mode head" in text] == [
        "mode head has no use for --lr, --mixup, --patience"
    ]


@pytest.mark.parametrize("options", [["--tensorboard"], ["--report-to", "tensorboard", "--mode", "head"]])
def test_tensorboard_files_are_written(pictures, start, tmp_path, capsys, options):
    pytest.importorskip("tensorboard")
    finetune(capsys, pictures, tmp_path / "run", "--model", start, *options)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_head_mode_says_nothing_of_epochs(data, start, tmp_path, capsys):
    plan, summary = finetune(
        capsys, data, tmp_path / "run", "--model", start, "--mode", "head", "--test-data", data / "val"
    )
    assert plan == f"{start}, mode head: 12 images of 3 classes, 6 for validation; into {tmp_path / 'run'}"
    assert summary.startswith("validation ")
    assert "test " in summary
    assert "fitted" not in summary
    assert "trained: " not in plan


def test_own_validation_images_can_be_passed_over(data, start, tmp_path, capsys):
    plan, summary = finetune(
        capsys, data, tmp_path / "run", "--model", start, "--mode=head", "--val-data=split", "--val-fraction=0.5"
    )
    assert "12 images of 3 classes, 50% of them set aside" in plan
    assert "% of 6 images before the head was fitted to all 12; wrote" in summary
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert (len(split["train"]), len(split["val"])) == (6, 6)


def test_default_recipe_goes_by_the_data_and_the_options_before_it(pictures, start, tmp_path, capsys):
    finetune(capsys, pictures, tmp_path / "run", "--model", start, "--hflip", "0.25")
    recipe = read_recipe(tmp_path / "run" / "recipe.toml")
    expected = {"epochs": 2, "warmup_epochs": 0, "batch_size": 6, "precision": "float32", "hflip": 0.25, "crop": "pad"}
    assert recipe == recipe_named("finetune", **expected)


def test_recipe_can_be_chosen(pictures, start, tmp_path, capsys):
    finetune(capsys, pictures, tmp_path / "run", "--model", start, "--recipe", "finetune_sgd")
    assert read_recipe(tmp_path / "run" / "recipe.toml").optimizer == "nesterov"


def test_teacher_turns_distillation_on(pictures, start, tmp_path, capsys):
    deit_models.create_model(MODELS[1]).save_pretrained(tmp_path / "student")
    deit_models.adapt_head(deit_models.from_pretrained(start), class_names=CLASSES).save_pretrained(
        tmp_path / "teacher"
    )
    options = ["--model", tmp_path / "student", "--teacher", tmp_path / "teacher"]
    finetune(capsys, pictures, tmp_path / "run", *options)
    recipe = read_recipe(tmp_path / "run" / "recipe.toml")
    assert (recipe.distillation, recipe.distill_on) == ("hard", "token")


def test_pictures_are_drawn(pictures, start, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the pictures need the extra [plot]")
    finetune(capsys, pictures, tmp_path / "run", "--model", start, "--mode", "head", "--plot")
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"curves.png", "confusion.png", "mistakes.png"}


def test_help_shows_the_default_presets_values(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "default by the data, finetune where they are not known" in shown
    assert "the head learns at the full rate; default 0.75" in shown


def test_interruption_says_what_is_kept(pictures, start, tmp_path, capsys):
    stop = tmp_path / "stop.py"  # Ctrl-C while the teacher is made
    stop.write_text("def teacher():\n    raise KeyboardInterrupt\n")
    arguments = ["finetune", pictures, "--out", tmp_path / "run", "--model", start, "--teacher", f"{stop}:teacher"]
    arguments = [*map(str, arguments), *QUICK]
    assert main(arguments) == 130
    assert (
        capsys.readouterr().err == "deit-models: interrupted; no epoch was finished, so the same command starts again\n"
    )
    assert main([*arguments, "--mode", "head"]) == 130
    assert "the features computed so far stay, and the same command goes on from there" in capsys.readouterr().err


def test_folder_in_use_is_refused_when_a_fresh_one_is_asked_for(pictures, start, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    message = failure(capsys, "finetune", pictures, "--out", tmp_path / "run", "--model", start, "--fresh")
    assert "run is not empty; --fresh starts in a new or empty folder" in message


def test_plot_that_cannot_be_drawn_is_said_before_anything(pictures, start, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = failure(capsys, "finetune", pictures, "--out", tmp_path / "run", "--model", start, "--plot")
    assert "pip install 'deit-models[plot]'" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--mode", "heads"], "mode='heads'; expected 'full', 'head', 'attention', or 'last-N'"),
        (["--recipe", "finetun"], "unknown recipe 'finetun'; nearest: finetune"),
        (["--val-data", "nowhere"], "nowhere: neither a folder, a table nor a data set known by name"),
    ],
)
def test_mistakes_are_one_line(pictures, start, tmp_path, capsys, change, message):
    arguments = ["finetune", pictures, "--out", tmp_path / "run", "--model", start, *QUICK, *change]
    assert main([str(argument) for argument in arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_without_a_model_it_begins_with_the_one_that_comes_with_the_package(
    capsys: pytest.CaptureFixture[str], pictures: Path, tmp_path: Path
) -> None:
    arguments = ["finetune", str(pictures), "--out", str(tmp_path / "run"), "--mode", "head"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert f"no --model given: {DEFAULT_MODEL}" in shown.err
    assert shown.out.startswith(f"{DEFAULT_MODEL}, mode head")


def test_backbone_without_a_head_is_embedded_and_learns_one(pictures, tmp_path, capsys):
    torch.manual_seed(0)
    body = deit_models.create_model(MODELS[0], num_classes=0).eval()
    body.save_pretrained(tmp_path / "body")
    assert main([*map(str, ["embed", pictures, "--model", tmp_path / "body", "--output", tmp_path / "x.npz"])]) == 0
    out, err = capsys.readouterr()
    assert (["width", "16"] in [line.split() for line in out.splitlines()], err) == (True, "")
    finetune(capsys, pictures, tmp_path / "run", "--model", tmp_path / "body", "--mode", "head")
    tuned = deit_models.from_pretrained(tmp_path / "run" / "best")
    assert (tuned.num_classes, tuned.origin.class_names) == (3, CLASSES)
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(tuned.embed(x), body(x))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val"]["top1"] == 100
