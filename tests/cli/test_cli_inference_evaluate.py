"""`deit-models evaluate`: the figures, what stands beside them, and how classes are matched."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from command_line import CLASSES, MODELS, failure, save_class_folders, usage_error
from torch.nn import functional as F

import deit_models
from deit_models.cli import main
from deit_models.scoring import evaluation

PLAIN, DISTILLED = MODELS
QUICK = ["--workers", "0", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("atoms")


@pytest.fixture
def saved(tmp_path):
    """Saves a model with random heads that know CLASSES, and an accuracy to stand beside; gives its folder."""
    return save(tmp_path / "model", class_names=CLASSES, top1=66.6, top5=99.9, dataset="Fauna")


def save(folder: Path, name: str = DISTILLED, seed: int = 0, **origin: object) -> Path:
    torch.manual_seed(seed)
    model = deit_models.create_model(name)
    for part in model.head_names:
        if (head := getattr(model, part)) is not None:
            torch.nn.init.normal_(head.weight)
    model.origin = replace(model.origin, **origin)
    model.save_pretrained(folder)
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], model: Path, data: Path, *more: object) -> dict[str, object]:
    """What `evaluate --json` prints, and nothing else."""
    assert main([*map(str, ["evaluate", model, data, "--json", *QUICK, *more])]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def expected(model: Path, folder: Path, classes: tuple[str, ...] = CLASSES) -> dict[str, object]:
    """The figures, the plain way."""
    network = deit_models.from_pretrained(model)
    transform = deit_models.transform_for(network)
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
    labels = torch.tensor([label for _, label in files])
    with torch.no_grad():
        heads = network.forward_heads(torch.stack([transform(path) for path, _ in files]))
    mean = (heads.cls + heads.dist) / 2
    right = [100 * (logits.argmax(1) == labels).double().mean().item() for logits in (mean, *heads)]
    return {"top1": right[0], "loss": F.cross_entropy(mean, labels).item(), "class": right[1], "distillation": right[2]}


# The figures


def test_figures_are_those_of_the_model_and_of_each_head(saved, data, capsys):
    found = evaluate(capsys, saved, data, "--batch-size", 4)
    plain = expected(saved, data / "val")
    assert {"top1": found["top1"], "loss": found["loss"], **found["heads"]} == pytest.approx(plain, rel=1e-4)
    assert (found["images"], found["skipped"], found["top5"]) == (6, 0, 100)
    assert found["published"] == {"top1": 66.6, "top5": 99.9, "dataset": "Fauna"}
    chosen = {"model": str(saved), "data": str(data), "split": "val", "style": "checkpoint", "precision": "float32"}
    assert chosen.items() <= found.items()


def test_text_shows_the_published_figures_beside_the_measured(saved, data, capsys):
    plain = expected(saved, data / "val")
    assert main(["evaluate", str(saved), str(data), *QUICK]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    title, *lines = out.splitlines()
    assert title == f"{saved} on {data}, val"
    rows = {line[2:22].strip(): line[22:] for line in lines}
    assert rows.pop("macro F1").endswith(" %")
    assert rows == {
        "top-1": f"{plain['top1']:.2f} %  published: 66.6 % (Fauna)",
        "top-5": "100.00 %  published: 99.9 % (Fauna)",
        "balanced accuracy": f"{plain['top1']:.2f} %",  # of classes with as many images
        "class head": f"{plain['class']:.2f} % top-1",
        "distillation head": f"{plain['distillation']:.2f} % top-1",
        "loss": f"{plain['loss']:.4f}",
        "images": "6",
        "skipped": "0",
    }


def test_nothing_stands_beside_where_nothing_is_published(data, tmp_path, capsys):
    model = save(tmp_path / "model", PLAIN, class_names=CLASSES)
    found = evaluate(capsys, model, data)
    assert (found["published"], found["heads"]) == (None, {})
    assert main(["evaluate", str(model), str(data), *QUICK]) == 0
    out = capsys.readouterr().out
    assert "published" not in out
    assert "head" not in out


@pytest.mark.parametrize("classes", [CLASSES[:2], CLASSES[1:], CLASSES[::2]])
def test_published_figures_of_all_classes_do_not_stand_beside_those_of_some(saved, data, tmp_path, capsys, classes):
    for name in classes:
        shutil.copytree(data / "val" / name, tmp_path / "some" / name)
    found = evaluate(capsys, saved, tmp_path / "some")
    assert found["published"] is None
    assert found["images"] == 2 * len(classes)
    assert main(["evaluate", str(saved), str(tmp_path / "some"), *QUICK]) == 0
    assert "published:" not in capsys.readouterr().out


def test_split_and_folders_are_the_users_choice(saved, data, capsys):
    whole = evaluate(capsys, saved, data, "--split", "train")
    assert (whole["images"], whole["split"]) == (12, "train")
    assert whole["loss"] == pytest.approx(expected(saved, data / "train")["loss"], rel=1e-4)
    right_in_it = evaluate(capsys, saved, data / "train")
    assert right_in_it["loss"] == whole["loss"]


def test_bare_weights_file_takes_the_model_by_name(saved, data, tmp_path, capsys, caplog):
    torch.save(deit_models.from_pretrained(saved).state_dict(), tmp_path / "bare.pth")
    cache = ["--cache-dir", tmp_path / "cache"]
    assert "say which model it is" in failure(capsys, "evaluate", tmp_path / "bare.pth", data, *QUICK, *cache)
    options = [*QUICK, *cache, "--model", DISTILLED, "--json"]
    assert main([*map(str, ["evaluate", tmp_path / "bare.pth", data, *options])]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["loss"] == pytest.approx(expected(saved, data / "val")["loss"], rel=1e-4)
    assert "does not name its classes" in caplog.text


def test_style_and_precision_reach_the_evaluation(saved, data, capsys):
    for path in data.rglob("*.png"):  # not square, so that crops differ
        PIL.Image.open(path).resize((40, 16)).save(path)
    plain = evaluate(capsys, saved, data)["loss"]
    losses = [
        evaluate(capsys, saved, data, *more)["loss"] for more in (["--style", "transformers"], ["--precision", "bf16"])
    ]
    assert plain == pytest.approx(expected(saved, data / "val")["loss"], rel=1e-4)
    assert len({plain, *losses}) == 3
    assert losses[1] == pytest.approx(plain, rel=0.05)


def test_image_that_cannot_be_read_is_counted_and_gives_status_1(saved, data, capsys, caplog):
    (data / "val" / "bee" / "1.png").write_text("no picture")
    assert main(["evaluate", str(saved), str(data), "--json", *QUICK]) == 1
    out, err = capsys.readouterr()
    assert (json.loads(out)["images"], json.loads(out)["skipped"]) == (5, 1)
    assert err == "deit-models: 1 of 6 images could not be read\n"
    assert [str(Path("bee", "1.png")) in record.getMessage() for record in caplog.records] == [True]


# Classes


def test_classes_in_another_order_are_matched_by_name(data, tmp_path, capsys):
    names = ("cow", "ant", "bee")
    model = save(tmp_path / "model", class_names=names)
    found, plain = evaluate(capsys, model, data), expected(model, data / "val", names)
    assert (found["top1"], found["loss"]) == pytest.approx((plain["top1"], plain["loss"]), rel=1e-4)
    assert plain["loss"] != pytest.approx(expected(model, data / "val")["loss"], rel=1e-3)


def test_other_classes_are_refused_unless_the_user_knows_better(data, tmp_path, capsys):
    model = save(tmp_path / "model", class_names=("ant", "bee", "dog"))
    line = failure(capsys, "evaluate", model, data, *QUICK)
    assert "the model alone knows dog, the data alone has cow" in line
    assert "--ignore-class-names" in line
    found = evaluate(capsys, model, data, "--ignore-class-names")
    assert found["loss"] == pytest.approx(expected(model, data / "val")["loss"], rel=1e-4)


def test_another_number_of_classes_is_refused_whatever_they_are_called(saved, data, capsys):
    for split in ("train", "val"):
        save_class_folders(data / split / "more", ["dog"], 1)
        (data / split / "more" / "dog").rename(data / split / "dog")
        (data / split / "more").rmdir()
    for more in ([], ["--ignore-class-names"]):
        line = failure(capsys, "evaluate", saved, data, *QUICK, *more)
        assert f"{data.name} has 4 classes, the model has 3" in line


def test_model_without_class_names_is_said_to_have_none(data, tmp_path, capsys, caplog):
    model = save(tmp_path / "model", class_names=None)
    assert main(["evaluate", str(model), str(data), "--json", *QUICK]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["loss"] == pytest.approx(expected(model, data / "val")["loss"], rel=1e-4)
    assert caplog.messages == ["the model does not name its classes: taken to be in the order of data"]


# Refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--batch-size", "0"], "--batch-size: 0; expected 1 or more"),
        (["--workers", "-1"], "--workers: -1; expected 0 or more"),
        (["--workers", "many"], "--workers: invalid int value: 'many'"),
        (["--split", "test"], "--split: invalid choice: 'test'"),
        (["--style", "mine"], "--style: invalid choice: 'mine'"),
        (["--precision", "int8"], "--precision: invalid choice: 'int8'"),
        (["--device", "abacus"], "no device 'abacus' on this machine"),
    ],
    ids=" ".join,
)
def test_wrong_usage_names_the_option(options, reason, capsys):
    assert reason in usage_error(capsys, "evaluate", "model", "data", *options)


def test_what_is_not_there_is_one_line(saved, data, tmp_path, capsys):
    assert "unknown model 'deit_huge'" in failure(capsys, "evaluate", "deit_huge", data)
    assert "no/such/folder" in failure(capsys, "evaluate", saved, "no/such/folder")
    (tmp_path / "empty").mkdir()
    assert "no class folders" in failure(capsys, "evaluate", saved, tmp_path / "empty")
    line = failure(capsys, "evaluate", saved, "cifar10", "--root", tmp_path / "sets")
    assert "--download" in line


# The report


def test_report_has_the_printed_figures(capsys, saved, data, tmp_path):
    page = tmp_path / "page.html"
    found = evaluate(capsys, saved, data, "--report", page)
    text = page.read_text(encoding="utf-8")
    assert f'data-figure="images.top1">{found["top1"]:.2f} %' in text
    assert f'data-figure="images.loss">{found["loss"]:.4f}' in text
    assert f"{saved} on {data}, val" in text


@pytest.mark.parametrize("file", [".", "missing/page.html"])
def test_report_that_cannot_be_written_is_refused_before_anything_is_read(capsys, tmp_path, file):
    message = failure(capsys, "evaluate", "no_such_model", tmp_path / "none", "--report", tmp_path / file)
    assert f"--report {tmp_path / file}: expected a file in a folder that is there" in message


def test_row_for_each_image_gives_the_same_figures_and_is_read_again(capsys, saved, data, tmp_path, monkeypatch):
    output, plain = tmp_path / "rows.npz", evaluate(capsys, saved, data)
    first = evaluate(capsys, saved, data, "--output", output)
    assert first.pop("loss") == pytest.approx(plain.pop("loss"), rel=1e-5)
    assert first == plain
    with np.load(output) as rows:
        assert len(rows["images"]) == plain["images"]
    assert f"--output {output} exists" in failure(capsys, "evaluate", saved, data, "--output", output)
    monkeypatch.setattr(evaluation, "score", None)  # nothing is scored any more
    again = evaluate(capsys, saved, data, "--output", output, "--resume")
    assert {**again, "loss": None} == {**plain, "loss": None}
    assert "expected .npz" in failure(capsys, "evaluate", saved, data, "--output", tmp_path / "rows.csv")
    assert "--resume is for a file" in failure(capsys, "evaluate", saved, data, "--resume")


# Without a head


def test_backbone_is_refused_with_what_to_do(tmp_path, data, capsys):
    deit_models.create_model(PLAIN, num_classes=0).save_pretrained(tmp_path / "body")
    for command in (["evaluate", tmp_path / "body", data], ["predict", data / "val", "--model", tmp_path / "body"]):
        line = failure(capsys, *command)
        assert "num_classes=0, no head and no classes: embed gives its features, evaluate --knn" in line
        assert "finetune" in line


def test_nearest_training_images_classify_without_a_head(tmp_path, data, capsys):
    torch.manual_seed(0)
    deit_models.create_model(PLAIN, num_classes=0).save_pretrained(tmp_path / "body")
    found = evaluate(capsys, tmp_path / "body", data, "--knn", data)
    (tmp_path / "mixed" / "train").mkdir(parents=True)
    for name, other in zip(CLASSES, CLASSES[1:] + CLASSES[:1], strict=True):
        shutil.copytree(data / "train" / name, tmp_path / "mixed" / "train" / other)
    wrong = evaluate(capsys, tmp_path / "body", data, "--knn", tmp_path / "mixed")
    assert (found["top1"], found["images"], found["knn"], found["published"]) == (100, 6, str(data), None)
    assert wrong["top1"] == 0, "the labels are those of the training images"
    assert main([*map(str, ["evaluate", tmp_path / "body", data, "--knn", data, *QUICK])]) == 0
    assert f"by the nearest of {data}\n  top-1               100.00 %\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--ignore-class-names"], ["--report", "x.html"], ["--output", "x.npz"]])
def test_options_of_the_head_are_refused_beside_the_nearest_images(option, data, capsys):
    assert "--knn classifies without the model's head" in failure(capsys, "evaluate", "x", data, "--knn", data, *option)
