"""The `deit-models` command: what it prints, where, and with which status."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deit_models
from deit_models import cli, predict
from deit_models.cli import build_parser, main

NAMES = tuple("plane car bird cat deer dog frog horse ship lorry".split())
COMMANDS = [
    ["list"], ["info"], ["predict"], ["convert"],
    ["cache"], ["cache", "list"], ["cache", "verify"], ["cache", "clear"], ["cache", "record"],
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder that `save_pretrained` wrote: a model of a few thousand parameters with class names."""
    torch.manual_seed(0)
    model = deit_models.create_model("deit_micro_distilled_patch4_32", depth=1, embed_dim=16, num_heads=2)
    nn.init.normal_(model.head.weight)
    model.origin = replace(model.origin, class_names=NAMES)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return save_pictures(folder, 3)


def save_pictures(folder: Path, count: int) -> Path:
    generator = np.random.default_rng(0)
    for i in range(count):
        PIL.Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


def expected(tiny: Path, photo: Path) -> list[str]:
    """The labels of the classes, likeliest first, the plain way."""
    model = deit_models.from_pretrained(tiny)
    with torch.no_grad():
        logits = model(deit_models.transform_for(model)(photo)[None])[0]
    return [NAMES[i] for i in logits.argsort(descending=True)]


def start(*arguments: object, options: tuple[str, ...] = (), **popen: object) -> "subprocess.Popen[str]":
    """`python -m deit_models` as a user has it, with its output in pipes."""
    package = Path(deit_models.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    command = [sys.executable, *options, "-m", "deit_models", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen}
    return subprocess.Popen(command, env=environment, **pipes)


def run(*arguments: object, **options: object) -> tuple[int, str, str]:
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line a failed command explains itself with."""
    assert main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("deit-models: ")
    assert err.count("\n") == 1
    return err


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: deit-models")
    return err.splitlines()[-1]


# The parser


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    example = capsys.readouterr().out.splitlines()[-1]
    assert example.startswith(f"example: deit-models {' '.join(command)}")
    arguments = [word.strip("'") for word in example.split()[2:]]
    assert build_parser().parse_args(arguments).run


def test_commands_of_this_file_are_all_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "example: deit-models" in out
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("    ") and line[4] != " "]
    assert listed == [command[0] for command in COMMANDS if len(command) == 1]


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"deit-models {deit_models.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "COMMAND"),
        (["classify", "cat.jpg"], "invalid choice: 'classify'"),
        (["list", "--sorted"], "unrecognized arguments: --sorted"),
        (["info"], "required: model"),
        (["predict"], "required: images"),
        (["predict", "a.jpg", "--top-k", "many"], "--top-k: invalid int value: 'many'"),
        (["predict", "a.jpg", "--format", "xml"], "--format: invalid choice: 'xml'"),
        (["predict", "a.jpg", "--json", "--format", "csv"], "not allowed with"),
        (["predict", "a.jpg", "--device", "abacus"], "no device 'abacus' on this machine"),
        (["predict", "a.jpg", "--device", "meta"], "no device 'meta' on this machine"),
        (["convert", "a.pth"], "required: destination"),
        (["convert", "a.pth", "out", "--layout", "onnx"], "--layout: invalid choice: 'onnx'"),
        (["cache"], "ACTION"),
        (["cache", "clear"], "one of the arguments name --all is required"),
        (["cache", "clear", "deit_tiny_patch16_224", "--all"], "not allowed with"),
    ],
    ids=" ".join,
)
def test_wrong_usage_has_status_2_and_names_the_argument(arguments, reason, capsys):
    assert reason in usage_error(capsys, *arguments)


# list and info


def test_list_prints_every_name_on_a_line(capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr() == ("\n".join(deit_models.list_models()) + "\n", "")


def test_list_takes_a_pattern_and_json(capsys):
    assert main(["list", "deit_*distilled*", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert names == deit_models.list_models("deit_*distilled*")
    assert names


def test_list_can_leave_out_models_without_weights(capsys):
    assert main(["list", "--pretrained"]) == 0
    names = capsys.readouterr().out.split()
    assert names == deit_models.list_models(pretrained=True)
    assert "deit_tiny_patch4_32" not in names


def test_list_of_nothing_has_status_1_and_says_so(capsys):
    assert "no model matches 'vgg*'" in failure(capsys, "list", "vgg*")
    assert main(["list", "vgg*", "--json"]) == 1
    assert capsys.readouterr() == ("[]\n", "")


def test_info_shows_what_is_known(capsys):
    assert main(["info", "deit_base_distilled_patch16_384"]) == 0
    out = capsys.readouterr().out
    for fact in (
        "deit, distilled", "87,630,032", "55.59 G", "384x384", "85.2 % top-1, 97.2 % top-5", "Apache-2.0",
        "shorter side to 438 (bicubic), centre crop 384x384", "facebook/deit-base-distilled-patch16-384", "https://",
    ):  # fmt: skip
        assert fact in out


def test_info_of_a_model_without_weights_says_so(capsys):
    assert main(["info", "deit_tiny_patch4_32"]) == 0
    out = capsys.readouterr().out
    assert "none published" in out
    assert "None" not in out


def test_info_as_json_is_the_whole_record(capsys):
    assert main(["info", "deit_tiny_patch16_224", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    info = deit_models.model_info("deit_tiny_patch16_224")
    assert (data["params"], data["top1"], data["preprocessing"]["crop"]) == (info.params, info.top1, [224, 224])
    assert [source["layout"] for source in data["sources"]] == [source.layout for source in info.sources]


def test_info_of_an_unknown_name_is_one_line_with_the_nearest(capsys):
    line = failure(capsys, "info", "deit_tiny_patch16_225")
    assert "unknown model 'deit_tiny_patch16_225'" in line
    assert "deit_tiny_patch16_224" in line


# predict


def test_predict_prints_labels_and_percents_for_readers(tiny, photos, capsys):
    photo = photos / "001.png"
    assert main(["predict", str(photo), "--model", str(tiny), "--top-k", "2"]) == 0
    out, err = capsys.readouterr()
    name, *lines = out.splitlines()
    assert (name, err) == (str(photo), "")
    assert [line.split(" %  ")[1] for line in lines] == expected(tiny, photo)[:2]
    percents = [float(line.split(" %  ")[0]) for line in lines]
    assert 100 > percents[0] > percents[1] > 0


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
    assert list(cli._with_progress(iter("abc"), 3, on_screen=on_screen)) == list("abc")
    assert ("3/3" in capsys.readouterr().err) == bar


# convert


@pytest.mark.parametrize("layout", ["native", "timm", "transformers"])
def test_convert_to_a_layout_and_back_keeps_every_bit(tiny, tmp_path, layout, capsys):
    assert main(["convert", str(tiny), str(tmp_path / layout), "--layout", layout]) == 0
    assert capsys.readouterr() == (f"wrote {tmp_path / layout} ({layout}, float32)\n", "")
    assert main(["convert", str(tmp_path / layout), str(tmp_path / "back")]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert deit_models.from_pretrained(tmp_path / "back").origin.class_names == NAMES


def test_convert_to_half_precision_halves_the_file(tiny, tmp_path):
    assert main(["convert", str(tiny), str(tmp_path), "--dtype", "float16"]) == 0
    whole, half = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path))
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in whole.items())


def test_convert_reads_an_authors_pth_when_told_the_model(tmp_path, capsys):
    model = deit_models.create_model("deit_micro_patch4_32")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "authors.pth")
    source, cache = tmp_path / "authors.pth", ["--cache-dir", tmp_path / "cache"]
    assert "say which model it is" in failure(capsys, "convert", source, tmp_path / "out", *cache)
    assert not (tmp_path / "out").exists()
    options = ["--model", "deit_micro_patch4_32", *map(str, cache)]
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())


def test_convert_refuses_a_file_as_destination(tiny, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert "is a file; expected a directory" in failure(capsys, "convert", tiny, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


# As a process


def test_list_and_info_import_neither_torch_nor_the_hub_client():
    for arguments in (["list"], ["info", "deit_tiny_patch16_224"], ["--help"]):
        status, out, err = run(*arguments, options=("-X", "importtime"))
        assert status == 0
        assert out
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in err.splitlines()}
        assert "argparse" in imported
        assert imported.isdisjoint({"torch", "torchvision", "huggingface_hub", "PIL", "numpy", "safetensors"})


def test_failure_of_a_process_is_one_line_without_traceback():
    status, out, err = run("info", "deit_tiny")
    assert (status, out) == (1, "")
    assert err.startswith("deit-models: unknown model 'deit_tiny'; nearest: ")
    assert err.count("\n") == 1


def test_nothing_but_results_appears_in_pipes(tiny, photos):
    status, out, err = run("predict", photos, "--model", tiny, "--json")
    assert (status, err) == (0, "")
    assert len([json.loads(line) for line in out.splitlines()]) == 3


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_interrupt_ends_predict_with_status_130_and_one_line(tiny, photos):
    # more results than a pipe holds: it cannot be done before the signal
    process = start("predict", *[photos] * 400, "--model", tiny, "--json", "--batch-size", "1")
    assert process.stdout.readline().startswith("{")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "deit-models: interrupted\n")
    assert len(out.splitlines()) < 1199


@pytest.mark.parametrize("command", ["list", "predict"])
def test_reader_that_has_seen_enough_ends_it_silently(command, tiny, photos):
    arguments = ["list"] if command == "list" else ["predict", photos, "--model", tiny, "--json"]
    process = start(*arguments)
    process.stdout.close()  # before anything was written
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        status, _, err = run("list", stdout=full)
    assert status == 1
    assert err.startswith("deit-models: ")
    assert err.count("\n") == 1


def test_interrupt_while_a_command_starts_has_no_traceback(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr() == ("", "deit-models: interrupted\n")
