"""`deit-models predict`: what it prints, where, and with which status."""

import csv
import json
import os
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from command_line import NAMES, failure, save_pictures

import deit_models
from deit_models import predict
from deit_models.cli import arguments as progress
from deit_models.cli import main


def expected(tiny: Path, photo: Path) -> list[str]:
    """The labels of the classes, likeliest first, the plain way."""
    model = deit_models.from_pretrained(tiny)
    with torch.no_grad():
        logits = model(deit_models.transform_for(model)(photo)[None])[0]
    return [NAMES[i] for i in logits.argsort(descending=True)]


def test_predict_prints_labels_and_percents_for_readers(tiny, photos, capsys):
    photo = photos / "001.png"
    assert main(["predict", str(photo), "--model", str(tiny), "--top-k", "2"]) == 0
    out, err = capsys.readouterr()
    name, *lines = out.splitlines()
    assert (name, err) == (str(photo), "")
    assert [line.split(" %  ")[1] for line in lines] == expected(tiny, photo)[:2]
    percents = [float(line.split(" %  ")[0]) for line in lines]
    assert 100 > percents[0] > percents[1] > 0


def test_predict_without_a_model_says_what_the_default_knows(photos, capsys):
    assert main(["predict", str(photos / "001.png"), "--json"]) == 0
    out, err = capsys.readouterr()
    info = deit_models.model_info(predict.DEFAULT_MODEL)
    assert {entry["label"] for entry in json.loads(out)["predictions"]} <= set(info.class_names)
    assert err.count("\n") == 1
    for part in (info.name, f"{info.num_classes} classes of {info.dataset}", "deit_small_patch16_224", "1000"):
        assert part in err


def test_predict_takes_files_and_folders_in_the_order_given(tiny, photos, tmp_path, capsys):
    PIL.Image.new("RGB", (50, 40)).save(tmp_path / "first.jpg")
    assert main(["predict", str(tmp_path / "first.jpg"), str(photos), "--model", str(tiny), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["first.jpg", "000.png", "001.png", "002.png"]


def test_predict_as_json_lines_gives_five_predictions_an_image(tiny, photos, capsys):
    assert main(["predict", str(photos), "--model", str(tiny), "--format", "jsonl"]) == 0
    lines = capsys.readouterr().out
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [p["label"] for p in rows[2]["predictions"]] == expected(tiny, photos / "002.png")[:5]
    assert main(["predict", str(photos), "--model", str(tiny), "--json"]) == 0
    assert capsys.readouterr().out == lines


def test_predict_writes_csv_to_a_file(tiny, photos, tmp_path, capsys):
    output = tmp_path / "labels.csv"
    arguments = ["predict", str(photos), "--model", str(tiny), "--format", "csv", "--output", str(output)]
    assert main(arguments) == 0
    assert capsys.readouterr() == ("", "")
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert [row["label"] for row in rows[:5]] == expected(tiny, photos / "000.png")[:5]


def test_fast_pixels_reach_the_classifier(tiny, photos, monkeypatch, capsys):
    seen = []
    real = predict.Classifier
    monkeypatch.setattr(predict, "Classifier", lambda *a, **k: seen.append(k["fast_pixels"]) or real(*a, **k))
    for options in ([], ["--fast-pixels"]):
        assert main(["predict", str(photos), "--model", str(tiny), "--json", *options]) == 0
    assert seen == [False, True]
    capsys.readouterr()


def test_optimize_classifies_by_the_optimised_model_with_the_same_answers(tiny, photos, monkeypatch, capsys):
    from deit_models.deploy import optimize as module

    arguments = ["predict", str(photos), "--model", str(tiny), "--json", "--batch-size", "2"]
    (photos / "000.png").write_bytes(b"")
    assert main(arguments) == 1
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    made = []
    real = module.optimize

    def in_torch(model, **options):
        made.append((options, real(model, backend="eager", precision="float32", **options)))
        return made[-1][1]

    monkeypatch.setattr(module, "optimize", in_torch)
    used = []
    init = predict.Classifier.__init__
    monkeypatch.setattr(predict.Classifier, "__init__", lambda s, m, **k: used.append(m) or init(s, m, **k))
    assert main([*arguments, "--optimize"]) == 1
    fast = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ((options, model),) = made
    assert used[-1] is model
    assert (options["sample"], options["preprocessing"], len(options["calibration"])) == (2, True, 2)
    assert plain[0] == fast[0], "the broken one"
    for a, b in zip(plain[1:], fast[1:], strict=True):
        assert [p["label"] for p in a["predictions"]] == [p["label"] for p in b["predictions"]]
        assert a["predictions"][0]["probability"] == pytest.approx(b["predictions"][0]["probability"], abs=1e-4)


def test_how_to_optimize_is_passed_on(tiny, photos, monkeypatch, capsys):
    from deit_models.deploy import optimize as module

    seen = []
    monkeypatch.setattr(module, "optimize", lambda model, **options: seen.append(options) or model)
    arguments = ["predict", str(photos), "--model", str(tiny), "--optimize"]
    tuning = ["--precision", "int8", "--min-agreement", "0.9", "--token-merging", "2"]
    assert main([*arguments, *tuning]) == main(arguments) == 0
    capsys.readouterr()
    assert (seen[0]["precision"], seen[0]["min_agreement"], seen[0]["token_merging"]) == ("int8", 0.9, 2)
    assert not {"precision", "min_agreement", "token_merging"} & set(seen[1])


@pytest.mark.parametrize("option", [["--precision", "int8"], ["--min-agreement", "0.9"], ["--token-merging", "2"]])
def test_how_to_optimize_without_optimize_is_refused(tiny, photos, option, capsys):
    assert f"{option[0]} is for --optimize; pass both" in failure(capsys, "predict", photos, "--model", tiny, *option)


@pytest.mark.parametrize("workers", [0, 2])
def test_three_broken_files_of_fifty_are_counted_named_and_give_status_1(tiny, tmp_path, workers, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    save_pictures(folder, 50)
    (folder / "007.png").write_bytes(b"")
    (folder / "023.png").write_text("not a picture")
    whole = (folder / "041.png").read_bytes()
    (folder / "041.png").write_bytes(whole[: len(whole) // 2])
    arguments = ["predict", str(folder), "--model", str(tiny), "--batch-size", "8", "--workers", str(workers)]
    assert main([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [Path(row["file"]).name for row in rows] == [f"{i:03}.png" for i in range(50)]
    assert sum("predictions" in row for row in rows) == 47
    first, *named = err.splitlines()
    assert first == "deit-models: 3 of 50 images could not be read:"
    assert [[name for name in ("007", "023", "041") if f"{name}.png" in line] for line in named] == [
        ["007"], ["023"], ["041"]
    ]  # fmt: skip


def test_text_leaves_broken_files_to_the_error_output(tiny, photos, capsys):
    (photos / "001.png").write_bytes(b"")
    assert main(["predict", str(photos), "--model", str(tiny), "--top-k", "1"]) == 1
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        str(photos / "000.png"), str(photos / "002.png")
    ]  # fmt: skip
    assert "001.png" in err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_name_that_is_not_unicode_stops_no_format(tiny, photos, tmp_path, capfd):
    os.rename(photos / "001.png", os.fsencode(photos) + b"/\xff.png")
    for form in ("text", "csv", "jsonl"):
        output = tmp_path / form
        arguments = ["predict", str(photos), "--model", str(tiny), "--format", form, "--output", str(output)]
        assert main(arguments) == 0
        assert "udcff.png" in output.read_text(encoding="utf-8")
    assert capfd.readouterr().err == ""


def test_missing_image_is_a_named_failure(tiny, photos, capsys):
    assert main(["predict", str(photos / "009.png"), str(photos / "000.png"), "--model", str(tiny)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(str(photos / "000.png"))
    assert err.startswith("deit-models: 1 of 2 images could not be read:\n")
    assert "009.png" in err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--top-k", "0"], "top_k=0; expected 1 to 10"),
        (["--batch-size", "0"], "batch_size=0; expected 1 or more"),
        (["--workers", "-1"], "workers=-1; expected 0 or more"),
        (["--output", "no/such/folder/labels.csv"], "labels.csv"),
        (["--revision", "main", "--model", "deit_tiny_patch4_32"], "no weights of deit_tiny_patch4_32 are published"),
        (["--model", "deit_huge"], "unknown model 'deit_huge'"),
        (["--model", "no/such/folder"], "neither a file or directory here nor a Hub repository"),
    ],
)
def test_predict_explains_in_one_line_what_it_cannot_do(tiny, photos, options, reason, capsys):
    model = [] if "--model" in options else ["--model", tiny]
    assert reason in failure(capsys, "predict", photos, *model, *options)


def test_folder_without_images_is_one_line(tiny, tmp_path, capsys):
    assert "no image in it or below" in failure(capsys, "predict", tmp_path, "--model", tiny)


def test_offline_option_reaches_the_hub_client(photos, tmp_path, capsys):
    options = ["--model", "nobody/nothing", "--offline", "--cache-dir", tmp_path / "cache"]
    assert "not in the cache, and offline" in failure(capsys, "predict", photos, *options)


def test_named_device_is_used(tiny, photos, monkeypatch, capsys):
    seen = []
    real = predict.Classifier
    monkeypatch.setattr(predict, "Classifier", lambda *a, **k: seen.append(k["device"]) or real(*a, **k))
    assert main(["predict", str(photos), "--model", str(tiny), "--device", "cpu", "--json"]) == 0
    assert seen == ["cpu"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("terminal", "on_screen", "bar"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_bar_appears_on_a_terminal_that_shows_no_results(terminal, on_screen, bar, monkeypatch, capsys):
    from huggingface_hub.utils import tqdm as module

    monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", None, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(progress.with_progress(iter("abc"), 3, on_screen=on_screen)) == list("abc")
    assert ("3/3" in capsys.readouterr().err) == bar


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("lost", [0, 1, 40, 200, 400, 10_000])
def test_interrupted_run_is_resumed_to_the_same_file(tiny, tmp_path, form, lost, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    save_pictures(folder, 9)
    (folder / "002.png").write_bytes(b"")
    os.rename(folder / "004.png", folder / 'a "b", c.png')
    output = tmp_path / "labels"
    # one at a time: in a batch of another size the last digits of a probability may differ
    arguments = ["predict", str(folder), "--model", str(tiny), "--format", form, "--output", str(output)]
    arguments += ["--batch-size", "1"]
    assert main(arguments) == 1
    whole, said = output.read_bytes(), capsys.readouterr().err
    output.write_bytes(whole[: max(len(whole) - lost, 0)])
    assert main([*arguments, "--resume"]) == 1
    assert output.read_bytes() == whole
    assert capsys.readouterr().err == said


def test_resumed_run_classifies_only_what_is_missing(tiny, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "labels.jsonl"
    arguments = ["predict", str(photos), "--model", str(tiny), "--json", "--output", str(output), "--resume"]
    assert main(arguments) == 0, "nothing there yet is a fresh start"
    seen = []
    real = predict.Classifier.classify_files
    monkeypatch.setattr(predict.Classifier, "classify_files", lambda s, p, **k: seen.extend(p) or real(s, p, **k))
    save_pictures(photos, 4)
    assert main(arguments) == 0
    assert [path.name for path in seen] == ["003.png"]
    assert len(output.read_text(encoding="utf-8").splitlines()) == 4
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ("", [], "format='text' cannot be resumed; use 'jsonl' or 'csv' from the start"),
        ("a shopping list\nmilk\n", ["--json"], "holds other things than results as jsonl"),
        ("name,price\nmilk,1\n", ["--format", "csv"], "other things than results as csv"),
        ("milk", ["--format", "csv"], "other things than results as csv"),
        ("milk", ["--json"], "other things than results as jsonl"),
        ("[1]\n", ["--json"], "holds other things than results as jsonl"),
        (
            "name,price,and,more,columns,than,these,ones,here\nmilk,1\n",
            ["--format", "csv"],
            "other things than results as csv",
        ),
    ],
)
def test_resuming_another_file_is_refused_and_leaves_it_alone(tiny, photos, tmp_path, content, options, reason, capsys):
    output = tmp_path / "file"
    output.write_text(content)
    line = failure(capsys, "predict", photos, "--model", tiny, "--output", output, "--resume", *options)
    assert reason in line
    assert output.read_text() == content


def test_resuming_without_a_file_is_refused(tiny, photos, capsys):
    assert "name it with --output" in failure(capsys, "predict", photos, "--model", tiny, "--resume")
