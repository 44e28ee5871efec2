"""`deit-models train` and `distill`: what a run prints and leaves, what it goes on with, and what it refuses."""

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch
from command_line import CLASSES, MODELS, ended, failure, on_terminal, run, save_class_folders, start

import deit_models
from deit_models.cli import build_parser, main
from deit_models.cli.long_runs import epoch_line
from deit_models.cli.train import run_train
from deit_models.recipes.recipe import read_recipe, recipe_named

PLAIN, DISTILLED = MODELS
SETTINGS = {"epochs": 2, "warmup_epochs": 0, "batch_size": 6, "precision": "float32"}
QUICK = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()] + ["--workers=0", "--device=cpu"]
FROZEN = ["--lr=0", "--warmup-lr=0", "--min-lr=0"]  # the weights end as they began

pytestmark = pytest.mark.usefixtures("atoms")


def train(capsys: pytest.CaptureFixture[str], data: Path, out: Path, *more: object) -> list[str]:
    """Run `train` to its end; the lines it prints."""
    arguments = ["train", data, "--out", out, "--recipe", "cifar_scratch", *QUICK, *more]
    assert main([str(argument) for argument in arguments]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    return printed.partition("next:\n")[0].splitlines()


def head(folder: Path) -> torch.Tensor:
    return deit_models.from_pretrained(folder).head.weight.detach()


# A run


def test_run_prints_what_it_does_a_line_an_epoch_and_where_the_models_are(data, tmp_path, capsys):
    out = tmp_path / "run"
    plan, first, second, summary = train(capsys, data, out, "--model", PLAIN)
    assert plan == (
        f"{PLAIN} with random weights, recipe cifar_scratch: 12 images of 3 classes, 6 to evaluate on; into {out}"
    )
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [first, second] == [epoch_line(row, 2) for row in rows]
    assert first.startswith("epoch 1/2  loss ")
    assert f"top-1 {rows[1]['top1']:.2f} %" in summary
    assert summary.endswith(f"wrote {out / 'model'} and {out / 'best'}")


def test_commands_that_a_run_ends_with_work(data, tmp_path, capsys):
    arguments = ["train", data, "--out", tmp_path / "run", "--recipe", "cifar_scratch", "--model", PLAIN, *QUICK]
    assert main([str(argument) for argument in arguments]) == 0
    steps = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.partition("next:\n")[2].splitlines())
    photo = next((data / "val" / "bee").iterdir())
    for name, found in (("classify", str(photo)), ("evaluate", "top-1")):
        command = shlex.split(steps[name].replace("IMAGE", shlex.quote(str(photo))))
        assert main(command[1:]) == 0
        assert found in capsys.readouterr().out


def test_terminal_shows_the_running_epoch_live_and_a_line_for_each_finished_one(data, tmp_path):
    model = "deit_micro_patch4_32"  # a process knows registered names alone
    options = ["--model", model, "--recipe", "cifar_scratch", *QUICK, "--out", tmp_path / "run"]
    status, received = on_terminal("train", data, *options, columns=100)
    assert status == 0
    live = [re.sub(r"\x1b\[[0-9;]*m", "", part) for part in received.split("\r")]
    assert any(re.match(r"epoch 1/2 +\d+ %, loss \d\.\d{4}, \d+ images/s, \d\d:\d\d left  ", part) for part in live)
    assert any(re.match(r"epoch 2/2 +\d+ %, loss \d\.\d{4}, best \d+\.\d\d %, ", part) for part in live)
    assert all(len(part) < 100 for part in live if part.startswith("epoch") and "\n" not in part)
    kept = [part.partition("\n")[0] for part in live if "\n" in part]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line for line in kept if line.startswith("epoch")] == [epoch_line(row, 2) for row in rows]


def test_run_leaves_the_resolved_recipe_and_models_that_know_their_classes(data, tmp_path, capsys):
    train(capsys, data, tmp_path / "run", "--model", PLAIN, "--hflip", "0.25")
    assert read_recipe(tmp_path / "run" / "recipe.toml") == recipe_named("cifar_scratch", **SETTINGS, hflip=0.25)
    for name in ("model", "best"):
        model = deit_models.from_pretrained(tmp_path / "run" / name)
        assert model.origin.class_names == CLASSES
        assert model.origin.name == PLAIN
    assert not model.config.distilled


def test_cache_is_an_option(data, tmp_path, capsys):
    train(capsys, data, tmp_path / "kept", "--model", PLAIN, "--cache", "ram")
    train(capsys, data, tmp_path / "read", "--model", PLAIN, "--cache", "none")
    assert torch.equal(head(tmp_path / "kept" / "model"), head(tmp_path / "read" / "model"))
    PIL.Image.new("RGB", (9, 7)).save(data / "train" / "bee" / "1.png")
    odd = ["train", str(data), "--out", str(tmp_path / "odd"), "--model", PLAIN, *QUICK, "--cache", "ram"]
    assert main(odd) == 1
    assert re.search(r"pixels, others .*; only images of one size are kept in memory", capsys.readouterr().err)
    assert not (tmp_path / "odd").exists()
    for command in ("train", "distill", "finetune", "search supernet", "search all"):
        more = {"distill": ["--teacher=x"], "search supernet": ["--space=x"], "search all": ["--space=x", "--limit=1"]}
        args = [*command.split(), "data", "--out=x", *more.get(command, [])]
        assert build_parser().parse_args(args).cache == "auto"
        assert build_parser().parse_args([*args, "--cache=none"]).cache == "none"


def test_plot_draws_the_curves(data, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs the extra [plot]")
    train(capsys, data, tmp_path / "run", "--model", PLAIN, "--plot")
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_plot_that_cannot_be_drawn_is_said_before_training(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = failure(capsys, "train", data, "--out", tmp_path / "run", "--model", PLAIN, *QUICK, "--plot")
    assert "pip install 'deit-models[plot]'" in message
    assert not (tmp_path / "run").exists()


def test_recipe_of_a_run_trains_the_same_model_again(data, tmp_path, capsys):
    train(capsys, data, tmp_path / "run", "--model", PLAIN, "--seed", "5")
    train(capsys, data, tmp_path / "same", "--model", PLAIN, "--recipe", tmp_path / "run" / "recipe.toml")
    train(capsys, data, tmp_path / "other", "--model", PLAIN, "--seed", "6")
    assert torch.equal(head(tmp_path / "same" / "model"), head(tmp_path / "run" / "model"))
    assert not torch.equal(head(tmp_path / "other" / "model"), head(tmp_path / "run" / "model"))


def test_img_size_of_the_recipe_builds_the_model(data, tmp_path, capsys):
    train(capsys, data, tmp_path / "run", "--model", PLAIN, "--img-size", "24")
    model = deit_models.from_pretrained(tmp_path / "run" / "model")
    assert model.config.image_hw == (24, 24)
    assert model.origin.preprocessing.crop == (24, 24)


def test_finished_run_has_nothing_left_to_do(data, tmp_path, capsys):
    _, *lines, summary = train(capsys, data, tmp_path / "run", "--model", PLAIN)
    plan, again = train(capsys, data, tmp_path / "run", "--model", PLAIN)
    assert len(lines) == 2
    assert plan.endswith(f"going on in {tmp_path / 'run'}")
    assert again == summary


def test_image_that_cannot_be_read_is_passed_over_and_counted(data, tmp_path, capsys, caplog):
    (data / "train" / "bee" / "1.png").write_bytes(b"")
    _, _, second, _ = train(capsys, data, tmp_path / "run", "--model", PLAIN)
    assert second.endswith("1 unreadable")
    assert [str(Path("bee", "1.png")) in record.getMessage() for record in caplog.records] == [True]


# Going on


def train_with(work: Callable[..., object], *arguments: object) -> int:
    """Run the command with `work` in the place of `deit_models.train`; its exit status."""
    return run_train(build_parser().parse_args([str(argument) for argument in arguments]), train=work)


def interrupted_after(epochs: int) -> Callable[..., object]:
    """Training in which Ctrl-C is pressed when so many epochs are done."""

    def broken(*args, on_epoch, **options):
        def stop(row):
            on_epoch(row)
            if row["epoch"] + 1 == epochs:
                raise KeyboardInterrupt

        if not epochs:
            raise KeyboardInterrupt
        return deit_models.train(*args, on_epoch=stop, **options)

    return broken


def test_interrupted_run_says_what_is_kept_and_goes_on_from_there(data, tmp_path, capsys):
    train(capsys, data, tmp_path / "whole", "--model", PLAIN)
    arguments = ["train", data, "--out", tmp_path / "run", "--recipe", "cifar_scratch", *QUICK, "--model", PLAIN]
    assert train_with(interrupted_after(1), *arguments) == 130
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("epoch 1/2")
    assert err == (
        f"deit-models: interrupted; {tmp_path / 'run'} keeps epoch 1 of 2, and the same command goes on from there\n"
    )
    plan, second, _ = train(capsys, data, tmp_path / "run", "--model", PLAIN)
    assert plan.endswith(f"going on in {tmp_path / 'run'}")
    assert second.startswith("epoch 2/2")
    assert torch.equal(head(tmp_path / "run" / "model"), head(tmp_path / "whole" / "model"))


def test_interrupted_run_tells_the_epoch_that_was_saved(data, tmp_path, capsys):
    arguments = ["train", data, "--out", tmp_path / "run", "--recipe", "cifar_scratch", *QUICK, "--model", PLAIN]
    assert train_with(interrupted_after(1), *arguments, "--save-every", "2") == 130
    assert capsys.readouterr().err.endswith("no epoch was saved, so the same command starts again\n")


def test_run_that_is_interrupted_at_once_keeps_what_there_was(data, tmp_path, capsys):
    arguments = ["train", data, "--out", tmp_path / "run", "--recipe", "cifar_scratch", *QUICK, "--model", PLAIN]
    assert train_with(interrupted_after(0), *arguments) == 130
    assert capsys.readouterr().err.endswith("no epoch was finished, so the same command starts again\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes(b"")
    assert train_with(interrupted_after(0), *arguments) == 130
    assert capsys.readouterr().err.endswith(
        f"{tmp_path / 'run'} is as before, and the same command goes on from there\n"
    )


def test_run_with_other_settings_does_not_go_on(data, tmp_path, capsys):
    train(capsys, data, tmp_path / "run", "--model", PLAIN)
    more = ["--out", tmp_path / "run", "--recipe", "cifar_scratch", *QUICK, "--model", PLAIN, "--lr", "0.5"]
    assert main([str(argument) for argument in ["train", data, *more]]) == 1
    assert "lr=0.001 (now 0.5)" in capsys.readouterr().err


def test_fresh_refuses_a_folder_in_use_and_takes_an_empty_one(data, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    train(capsys, data, out, "--model", PLAIN, "--fresh")
    before = (out / "last.pt").read_bytes()
    assert f"{out} is not empty" in failure(capsys, "train", data, "--out", out, "--fresh", "--model", PLAIN)
    assert (out / "last.pt").read_bytes() == before


# What it starts from


def test_pretrained_weights_keep_their_heads_for_the_same_classes(data, tmp_path, capsys):
    train(capsys, data, tmp_path / "first", "--model", PLAIN)
    source = tmp_path / "first" / "model"
    plan, *_ = train(capsys, data, tmp_path / "second", "--pretrained", source, *FROZEN)
    assert plan.startswith(f"{source} with its heads, recipe")
    assert torch.equal(head(tmp_path / "second" / "model"), head(source))


@pytest.mark.parametrize("classes", [("ant", "bee", "dog"), ("ant", "bee", "cow", "dog")], ids=len)
def test_pretrained_weights_get_new_heads_for_other_classes(data, tmp_path, classes, capsys):
    train(capsys, data, tmp_path / "first", "--model", PLAIN)
    source, other = tmp_path / "first" / "model", tmp_path / "other"
    for split in ("train", "val"):
        save_class_folders(other / split, classes, 2)
    plan, *_ = train(capsys, other, tmp_path / "second", "--pretrained", source, *FROZEN)
    assert plan.startswith(f"{source} with new heads, recipe")
    new, old = (deit_models.from_pretrained(folder) for folder in (tmp_path / "second" / "model", source))
    assert torch.equal(new.blocks[0].attn.qkv.weight, old.blocks[0].attn.qkv.weight)
    assert new.head.weight.shape[0] == len(classes)
    assert not torch.equal(new.head.weight[:3], old.head.weight)


def test_pretrained_bare_file_takes_the_model_by_name(data, tmp_path, capsys):
    model = deit_models.create_model(PLAIN)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    arguments = ["--pretrained", tmp_path / "bare.pth", "--cache-dir", tmp_path / "cache"]
    assert "say which model it is" in failure(capsys, "train", data, "--out", tmp_path / "run", *arguments)
    train(capsys, data, tmp_path / "run", *arguments, "--model", PLAIN, *FROZEN)
    written = deit_models.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(written.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


# The data


def test_validation_images_may_lie_elsewhere_or_be_left_out(data, tmp_path, capsys):
    only = data / "train"
    line = failure(capsys, "train", only, "--out", tmp_path / "run", "--model", PLAIN)
    assert "--val-data" in line
    assert "--val-data none" in line
    plan, *_ = train(capsys, only, tmp_path / "run", "--val-data", data / "val", "--model", PLAIN)
    assert "6 to evaluate on" in plan
    plan, first, _, summary = train(capsys, only, tmp_path / "blind", "--val-data", "none", "--model", PLAIN)
    assert "none to evaluate on" in plan
    assert "top-1" not in first
    assert summary == f"wrote {tmp_path / 'blind' / 'model'}"


def test_validation_images_of_other_classes_are_refused(data, tmp_path, capsys):
    save_class_folders(tmp_path / "other", ("ant", "bee", "dog"), 2)
    line = failure(capsys, "train", data, "--out", tmp_path / "run", "--val-data", tmp_path / "other")
    assert "missing cow; not in training dog" in line


def test_options_for_named_sets_are_refused_for_folders(data, tmp_path, capsys):
    for option in (["--root", tmp_path], ["--download"]):
        line = failure(capsys, "train", data, "--out", tmp_path / "run", *option)
        assert "known by name" in line


def test_named_set_that_is_not_there_says_how_to_get_it(tmp_path, capsys):
    line = failure(capsys, "train", "cifar10", "--root", tmp_path / "sets", "--out", tmp_path / "run")
    assert "--download" in line


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["no/such/folder"], "no/such/folder"),
        (["DATA", "--model", "deit_huge"], "unknown model 'deit_huge'"),
        (["DATA", "--recipe", "deit_400e"], "unknown recipe 'deit_400e'; nearest: deit_300e"),
        (["DATA", "--recipe", "no_such.toml"], "no_such.toml: No such file"),
        (["DATA", "--epochs", "0"], "epochs=0; expected 1 or more"),
        (["DATA", "--model", PLAIN, "--img-size", "20"], "img_size=20 is not a multiple of patch_size=8"),
        (["DATA", "--distillation", "soft"], "the data 3: pass teacher=... (deit-models distill --teacher NAME)"),
        (["DATA", "--pretrained", PLAIN, "--model", DISTILLED], f"leave out --model {DISTILLED}"),
    ],
)
def test_train_explains_in_one_line_what_it_cannot_do(data, tmp_path, options, reason, capsys):
    options = [data if option == "DATA" else option for option in options]
    assert reason in failure_after_plan(capsys, "train", *options, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def failure_after_plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that explains a failure, also one that comes after the plan was printed."""
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) <= 1
    assert err.startswith("deit-models: ")
    assert err.count("\n") == 1
    return err


def test_too_little_gpu_memory_is_one_line_with_what_to_do(data, tmp_path):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    options = ["--model", PLAIN, "--recipe", "cifar_scratch", "--accumulate", "2"]
    with pytest.raises(deit_models.TrainingError, match="memory for 64 images at once; --accumulate 4"):
        train_with(full, "train", data, "--out", tmp_path / "run", *options)


# Distillation


def test_distill_trains_a_distilled_model_with_the_teacher(data, tmp_path, capsys):
    train(capsys, data, tmp_path / "teacher", "--model", PLAIN)
    options = ["--teacher", tmp_path / "teacher" / "model", "--model", DISTILLED, "--recipe", "cifar_distill", *QUICK]
    assert main([str(argument) for argument in ["distill", data, "--out", tmp_path / "run", *options]]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "class head" in out.splitlines()[1]
    assert deit_models.from_pretrained(tmp_path / "run" / "model").config.distilled


def test_teachers_weights_and_precision_reach_it(data, tmp_path, monkeypatch):
    seen = {}
    known = deit_models.create_model(PLAIN)
    torch.nn.init.normal_(known.head.weight)
    torch.save(known.state_dict(), tmp_path / "teacher.pth")
    options = ["--teacher", PLAIN, "--teacher-weights", tmp_path / "teacher.pth", "--teacher-precision", "bf16"]
    arguments = ["distill", data, "--out", tmp_path / "run", *options, "--model", DISTILLED]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit, match="7"):
        train_with(lambda *_, teacher, **__: seen.update(teacher=teacher) or sys.exit(7), *arguments)
    teacher = seen["teacher"]
    assert teacher.dtype is torch.bfloat16
    assert torch.equal(teacher.network.head.weight.float(), known.head.weight.bfloat16().float())
    assert teacher.network.num_classes == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--teacher", "resnet_1"], "unknown teacher 'resnet_1'"),
        (["--teacher", "resnet18"], "the teacher has 1000 classes"),
        (["--teacher", "resnet18", "--distillation", "none"], "would not use the teacher; pass --distillation hard"),
        (["--teacher", "resnet18", "--recipe", "cifar_scratch"], "would not use the teacher"),
    ],
)
def test_distill_explains_in_one_line_what_it_cannot_do(data, tmp_path, options, reason, capsys):
    arguments = ["distill", data, "--out", tmp_path / "run", "--model", DISTILLED, *options]
    assert reason in failure_after_plan(capsys, *arguments)


# As a process


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.usefixtures("ctrl_c")
def test_interrupted_process_ends_with_one_line_and_keeps_its_epochs(data, tmp_path):
    model = "deit_micro_patch4_32"  # a process knows registered names alone
    options = ["--model", model, "--recipe", "cifar_scratch", *QUICK[1:], "--epochs", 5000, "--workers", 1]
    process = start("train", data, "--out", tmp_path / "run", *options, start_new_session=True)
    lines = [process.stdout.readline() for _ in range(3)]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the loading processes get it too
    status, out, err = ended(process)
    assert lines[2].startswith("epoch    2/5000")
    done = 2 + len(out.splitlines())
    kept = re.fullmatch(
        rf"deit-models: interrupted; {tmp_path / 'run'} keeps epoch (\d+) of 5000, and the same command goes on .*\n",
        err,
    )
    # the signal may come when an epoch is done and its line not printed
    assert kept is not None
    assert (status, int(kept[1]) - done) in ((130, 0), (130, 1))
    assert (tmp_path / "run" / "last.pt").is_file()


@pytest.mark.slow
def test_of_two_processes_only_the_first_prints(data, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--model", "deit_micro_patch4_32", "--recipe", "cifar_scratch", *QUICK, "--out", tmp_path / "run"]
    status, out, _ = run("train", data, *options, options=tuple(torchrun))
    assert status == 0
    begun, _, steps = out.partition("next:\n")
    assert [line.split()[0] for line in begun.splitlines()] == ["deit_micro_patch4_32", "epoch", "epoch", "top-1"]
    assert [line.split()[0] for line in steps.splitlines()] == ["look", "classify", "evaluate"]
    status, out, _ = run("evaluate", tmp_path / "run" / "model", data, "--json", options=tuple(torchrun))
    assert (status, json.loads(out)["images"]) == (0, 6)


# Token labelling


def test_label_maps_are_made_and_trained_with(data, tmp_path, capsys):
    torch.manual_seed(0)
    teacher = deit_models.create_model(PLAIN)
    teacher.save_pretrained(tmp_path / "teacher")
    maps = ["label-maps", data, "--teacher", tmp_path / "teacher", "--model", PLAIN, "--out", tmp_path / "maps"]
    maps = [str(argument) for argument in (*maps, "--workers=0", "--device=cpu")]
    assert main(maps) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'maps'}: 12 maps of 2x2 cells, 3 classes\n"
    assert "--resume (resume=True) goes on" in failure(capsys, *maps)
    assert main([*maps, "--overwrite"]) == 0
    capsys.readouterr()
    options = ["--model", PLAIN, "--label-maps", tmp_path / "maps", "--token-labels=0.5", "--mix-token"]
    train(capsys, data, tmp_path / "run", *options)
    assert read_recipe(tmp_path / "run" / "recipe.toml").token_labels == 0.5
    assert "patch_head" in torch.load(tmp_path / "run" / "last.pt")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--token-labels=0.5"], r"token_labels=0.5 needs label maps of the training images; .*\(--label-maps\)"),
        (["--label-maps=nowhere"], "nowhere holds no label maps .*`deit-models label-maps` makes them"),
        (["--mix-token"], "mix_token mixes labels of patches; pass token_labels above 0"),
    ],
)
def test_token_labelling_without_its_parts_is_refused(data, tmp_path, options, reason, capsys):
    arguments = ["train", data, "--out", tmp_path / "run", "--recipe", "cifar_scratch", "--model", PLAIN, *QUICK]
    assert main([str(argument) for argument in (*arguments, *options)]) == 1
    assert re.search(reason, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
