"""`deit-models predict`: what it prints, where, and with which status."""

import csv
import json
import os
import re
import select
import struct
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from command_line import NAMES, ended, failure, on_terminal, run, save_pictures, start

import deit_models
from deit_models import predict
from deit_models.cli import build_parser, main
from deit_models.cli.inference import make_classifier, run_predict
from deit_models.deploy.adaptive import AdaptiveClassifier


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


def test_predict_draws_bars_on_a_terminal_and_plain_text_in_a_pipe(tiny, photos):
    photo = photos / "001.png"
    arguments = ["predict", photo, "--model", tiny, "--top-k", "3"]
    status, received = on_terminal(*arguments, columns=60)
    name, *lines = received.splitlines()
    assert (status, name) == (0, str(photo))
    label = expected(tiny, photo)[0]
    assert re.fullmatch(rf"  [ \d]\d\d?\.\d\d %  \x1b\[32m[█▏▎▍▌▋▊▉ ]{{16}}\x1b\[0m  \x1b\[1m{label}\x1b\[0m", lines[0])
    assert len(lines) == 3
    status, plain, _ = run(*arguments)
    assert status == 0
    bare = re.sub(r"\x1b\[\d+m", "", received)
    assert plain == re.sub(r"%  [█▏▎▍▌▋▊▉ ]{16}  ", "%  ", bare)


def test_predict_without_a_model_says_what_the_default_knows(photos, capsys):
    assert main(["predict", str(photos / "001.png"), "--json"]) == 0
    out, err = capsys.readouterr()
    info = deit_models.model_info(predict.DEFAULT_MODEL)
    assert {entry["label"] for entry in json.loads(out)["predictions"]} <= set(info.class_names)
    assert err.count("\n") == 1
    for part in (info.name, f"{info.num_classes} classes of {info.dataset}", "deit_small_patch16_224", "1000"):
        assert part in err


def test_predict_does_not_overwrite_results_unless_it_is_told_to(tiny, photos, tmp_path, capsys):
    results = tmp_path / "results.csv"
    arguments = ["predict", str(photos), "--model", str(tiny), "--format", "csv", "--output", str(results)]
    results.touch()  # as mktemp leaves it: nothing to lose
    assert main(arguments) == 0
    whole = results.read_bytes()
    results.write_bytes(whole + b"a note of mine\n")
    text = failure(capsys, *arguments[:-4], "--output", results, "--format", "csv")
    assert "exists" in text
    assert "--resume" in text
    assert "--overwrite" in text
    assert results.read_bytes().endswith(b"a note of mine\n")
    assert main([*arguments, "--overwrite"]) == 0
    assert results.read_bytes() == whole
    assert main([*arguments, "--resume"]) == 0
    assert results.read_bytes().count(b"\n") == whole.count(b"\n")
    assert main([*arguments[:-1], os.devnull]) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--overwrite"], "--overwrite is for a file; name it with --output"),
        (["--resume"], "--resume is for a file; name it with --output"),
        (["--output", "nowhere/results.csv"], "there is no folder nowhere; make it first"),
    ],
)
def test_predict_refuses_a_place_for_results_before_anything_is_loaded(photos, capsys, options, text):
    assert text in failure(capsys, "predict", photos, "--model", "no/such-model", *options)


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


def test_fast_pixels_reach_the_classifier(tiny, tmp_path, capsys):
    PIL.Image.effect_mandelbrot((600, 400), (-2.0, -1.0, 1.0, 1.0), 50).convert("RGB").save(tmp_path / "large.jpg")
    found = []
    for fast, options in ((False, []), (True, ["--fast-pixels"])):
        assert main(["predict", str(tmp_path), "--model", str(tiny), "--json", *options]) == 0
        found.append([entry["probability"] for entry in json.loads(capsys.readouterr().out)["predictions"]])
        (result,) = deit_models.Classifier(tiny, fast_pixels=fast).classify_files([tmp_path / "large.jpg"])
        assert found[-1] == [prediction.probability for prediction in result.predictions]
    assert found[0] != found[1]


def test_optimize_classifies_by_the_optimised_model_with_the_same_answers(tiny, photos, capsys):
    arguments = ["predict", str(photos), "--model", str(tiny), "--json", "--batch-size", "2"]
    (photos / "000.png").write_bytes(b"")
    assert main(arguments) == 1
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    made, batches = [], []

    def in_torch(model, **options):
        made.append(options)
        fast = deit_models.optimize(model, backend="eager", precision="float32", **options)
        fast.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
        return fast

    assert run_predict(build_parser().parse_args([*arguments, "--optimize"]), optimize=in_torch) == 1
    fast = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (options,) = made
    assert sum(batches) == 2, "the optimised model computed both images"
    assert (options["sample"], options["preprocessing"], len(options["calibration"])) == (2, True, 2)
    assert plain[0] == fast[0], "the broken one"
    for a, b in zip(plain[1:], fast[1:], strict=True):
        assert [p["label"] for p in a["predictions"]] == [p["label"] for p in b["predictions"]]
        assert a["predictions"][0]["probability"] == pytest.approx(b["predictions"][0]["probability"], abs=1e-4)


@pytest.mark.parametrize(
    ("images", "option", "adaptive"),
    [
        (301, [], True),
        (300, [], False),
        (301, ["--no-optimize"], False),
        (301, ["--heat-maps", "maps"], False),
    ],
)
def test_many_images_are_optimised_by_themselves_unless_that_is_refused(tiny, images, option, adaptive):
    args = build_parser().parse_args(["predict", "photos", "--model", str(tiny), "--device", "cpu", *option])
    classifier = make_classifier(args, [Path("photo.jpg")] * images)
    assert isinstance(classifier.model, AdaptiveClassifier) == adaptive
    assert getattr(classifier.model, "images", images) == images


def test_few_images_do_not_even_import_what_optimises(tiny, photos):
    code = "import sys; from deit_models.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "predict", str(photos), "--model", str(tiny), "--workers", "0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(deit_models.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    loaded = done.stderr.splitlines()[-1].split()
    assert "deit_models.predict" in loaded
    assert [name for name in loaded if name.startswith("deit_models.deploy")] == []


def test_how_to_optimize_is_passed_on(tiny, photos, capsys):
    seen = []
    arguments = ["predict", str(photos), "--model", str(tiny), "--optimize"]
    tuning = ["--precision", "int8", "--min-agreement", "0.9", "--token-merging", "2"]
    for line in ([*arguments, *tuning], arguments):
        args = build_parser().parse_args(line)
        assert run_predict(args, optimize=lambda model, **options: seen.append(options) or model) == 0
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
        (["--batch-size", str(10**20)], "expected 1 or more, as many as memory holds"),
        (["--output", "."], "--output . is a folder; name a file in it"),
        (["--workers", "-1"], "workers=-1; expected a whole number from 0 to 1024"),
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


def test_named_device_is_used(tiny, photos, capsys):
    arguments = ["predict", str(photos), "--model", str(tiny), "--device", "cpu", "--json"]
    classifier = make_classifier(build_parser().parse_args(arguments), [])
    assert {parameter.device.type for parameter in classifier.model.parameters()} == {"cpu"}
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="pseudo-terminals as Linux has them")
@pytest.mark.parametrize("on_screen", [False, True])
def test_bar_appears_on_a_real_terminal_that_shows_no_results(tiny, photos, on_screen):
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows and columns; none by default
    try:
        pipes = {"stderr": theirs, **({"stdout": theirs} if on_screen else {})}
        assert ended(start("predict", photos, "--model", tiny, **pipes))[0] == 0
        os.set_blocking(ours, False)
        shown = os.read(ours, 1 << 16).decode() if select.select([ours], [], [], 0)[0] else ""
    finally:
        os.close(theirs)
        os.close(ours)
    assert ("3/3" in shown) != on_screen
    assert ("000.png" in shown) == on_screen


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


def test_resumed_run_classifies_only_what_is_missing(tiny, photos, tmp_path, capsys):
    output = tmp_path / "labels.jsonl"
    arguments = ["predict", str(photos), "--model", str(tiny), "--json", "--output", str(output), "--resume"]
    assert main(arguments) == 0, "nothing there yet is a fresh start"
    before = output.read_text(encoding="utf-8")
    save_pictures(photos, 4)
    for done in ("000.png", "001.png", "002.png"):
        (photos / done).write_bytes(b"")  # which would fail if it were read again
    assert main(arguments) == 0
    rows = output.read_text(encoding="utf-8")
    assert rows.startswith(before)
    assert [Path(json.loads(row)["file"]).name for row in rows.splitlines()[3:]] == ["003.png"]
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
