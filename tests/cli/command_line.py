"""The `deit-models` command as tests call it: in this process or as one of its own, and what it must not do."""

import io
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
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

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:
        return self._encoding

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
    *arguments: object, options: tuple[str, ...] = (), module: str = "deit_models", env=(), **popen: object
) -> "subprocess.Popen[str]":
    """`python -m deit_models` as a user runs it, with its output in pipes, and with more in the environment."""
    package = Path(deit_models.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    environment |= dict(env)
    command = [sys.executable, *options, "-m", module, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen}
    return subprocess.Popen(command, env=environment, **pipes)


def on_terminal(*arguments: object, columns: int = 80, **options: object) -> tuple[int, str]:
    """Status of the command as a user runs it on a terminal so wide, and all that the terminal receives."""
    pty, fcntl, termios = (pytest.importorskip(name, reason="needs Unix") for name in ("pty", "fcntl", "termios"))
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    options["env"] = {"TERM": "xterm-256color", **options.get("env", {})}
    process = start(*arguments, stdout=inside, stderr=inside, stdin=inside, **options)
    os.close(inside)
    received = []
    with suppress(OSError):  # EIO: the command has ended, and closed the terminal
        while part := os.read(outside, 1 << 16):
            received.append(part)
    os.close(outside)
    status = ended(process)[0]
    return status, b"".join(received).decode(errors="replace").replace("\r\n", "\n")


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
