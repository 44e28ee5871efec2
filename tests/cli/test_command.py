"""The `deit-models` command as a whole: its parser, its exit statuses, where it prints, and what it imports."""

import json
import os
import signal

import pytest
from command_line import ended, run, start, usage_error

import deit_models
from deit_models.cli import build_parser, main

COMMANDS = [
    ["list"], ["info"], ["predict"], ["explain"], ["embed"], ["evaluate"], ["finetune"], ["train"], ["distill"],
    ["label-maps"],
    ["search"], ["search", "all"], ["search", "supernet"], ["search", "evolve"], ["search", "show"],
    ["convert"], ["export"], ["bench"],
    ["cache"], ["cache", "list"], ["cache", "verify"], ["cache", "clear"], ["cache", "record"],
    ["demo"],
]  # fmt: skip

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
        (["predict", ""], "an argument is empty; is a variable of the shell not set?"),
        (["predict", "a.jpg", "--model", ""], "an argument is empty"),
        (["finetune", "photos", "--out="], "--out is empty"),
    ],
    ids=" ".join,
)
def test_wrong_usage_has_status_2_and_names_the_argument(arguments, reason, capsys):
    assert reason in usage_error(capsys, *arguments)


# As a process


def test_list_and_info_import_neither_torch_nor_the_hub_client():
    for arguments in (["list"], ["info", "deit_tiny_patch16_224"], ["--help"], ["train", "--list-recipes"]):
        status, out, err = run(*arguments, options=("-X", "importtime"))
        assert status == 0
        assert out
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in err.splitlines()}
        assert "argparse" in imported
        assert imported.isdisjoint({"torch", "torchvision", "huggingface_hub", "PIL", "numpy", "safetensors"})


def test_package_of_the_command_is_a_module_to_run():
    status, out, _ = run("list", "deit_base*384", module="deit_models.cli")
    assert (status, out.split()) == (0, deit_models.list_models("deit_base*384"))


def test_failure_names_the_process_among_many(monkeypatch, capsys):
    for rank, prefix in (("0", "deit-models: "), ("3", "deit-models (process 3): ")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert main(["info", "deit_tiny"]) == 1
        assert capsys.readouterr().err.startswith(prefix + "unknown model")


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
@pytest.mark.usefixtures("ctrl_c")
def test_interrupt_ends_predict_with_status_130_and_one_line(tiny, photos):
    # more results than a pipe holds: it cannot be done before the signal
    process = start("predict", *[photos] * 400, "--model", tiny, "--json", "--batch-size", "1")
    assert process.stdout.readline().startswith("{")
    process.send_signal(signal.SIGINT)
    status, out, err = ended(process)
    assert (status, err) == (130, "deit-models: interrupted\n")
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


def test_interrupt_while_a_command_starts_has_no_traceback(capsys):
    class Interrupted(list):
        def __iter__(self):
            raise KeyboardInterrupt

    assert main(Interrupted(["list"])) == 130
    assert capsys.readouterr() == ("", "deit-models: interrupted\n")
