"""The `deit-models` command as tests call it: in this process or as one of its own, and what it must not do."""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import deit_models
from deit_models.cli import main

NAMES = tuple("plane car bird cat deer dog frog horse ship lorry".split())
CLASSES = ("ant", "bee", "cow")
MODELS = ("deit_atom_patch8_16", "deit_atom_distilled_patch8_16")


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and keeps what is written."""

    def isatty(self) -> bool:
        return True


def save_pictures(folder: Path, count: int) -> Path:
    generator = np.random.default_rng(0)
    for i in range(count):
        PIL.Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


def save_class_folders(folder: Path, classes: Sequence[str], count: int) -> Path:
    """A folder of pictures for each class; all of a class have much of one colour."""
    generator = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 100, (16, 16, 3), dtype=np.uint8)
            pixels[..., k % 3] += 150
            PIL.Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def start(
    *arguments: object, options: tuple[str, ...] = (), module: str = "deit_models", **popen: object
) -> "subprocess.Popen[str]":
    """`python -m deit_models` as a user runs it, with its output in pipes."""
    package = Path(deit_models.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    command = [sys.executable, *options, "-m", module, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen}
    return subprocess.Popen(command, env=environment, **pipes)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Status and output of a process that is about to end, which is killed if it does not."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def run(*arguments: object, **options: object) -> tuple[int, str, str]:
    return ended(start(*arguments, **options))


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
