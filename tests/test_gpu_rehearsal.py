"""The tests that need a GPU are rehearsed on the CPU, or they would break unseen between two runs on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMOKE = (
    "test_gpu_logits.py::test_float32",
    "test_gpu_training.py::test_the_loss_falls[bf16]",
    "test_gpu_inference.py::test_any_number_of_images_gives_the_models_answers[eager-float32-8]",
    "test_gpu_inference.py::test_kernels_are_recorded[8]",
    "test_gpu_finetuning.py::test_it_learns_in_every_mode[head-float32]",
)


def rehearse(*tests: str, options: tuple[str, ...] = ("--gpu-device", "cpu"), limit_s: float) -> str:
    """The last line of pytest over tests of the folder, in a process of its own."""
    named = [str(HERE / "gpu" / test) for test in tests]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *options, *named],
        cwd=HERE.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_a_test_of_each_file_passes_on_the_cpu() -> None:
    assert re.match(r"12 passed, 10 skipped", rehearse(*SMOKE, limit_s=240))


def test_without_a_gpu_they_are_skipped() -> None:
    assert re.match(
        r"9 skipped in",
        rehearse("test_gpu_finetuning.py", "test_gpu_distributed.py", options=(), limit_s=240),
    )


@pytest.mark.slow
def test_all_of_them_pass_on_the_cpu() -> None:
    assert re.match(r"\d\d+ passed, \d+ skipped in", rehearse("", limit_s=900))
