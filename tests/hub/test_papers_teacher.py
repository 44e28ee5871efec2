"""The papers' teacher by name: from its sources, verified, cached; and the papers' distillation command as a whole."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hub.conftest import HubEnv
from PIL import Image
from safetensors.torch import save
from tiny_models import refusal
from torch import nn
from training.test_teacher import STUDENT, filled_regnet, images, timm_names

from deit_models.checkpoint import DEFAULT_TEACHER, IMAGENET_MEAN, IMAGENET_STD, Source, load_teachers
from deit_models.cli import main
from deit_models.errors import FetchError, TrainingError
from deit_models.training import teacher
from deit_models.training.run import train
from deit_models.training.teacher import load_teacher


def test_its_sources_are_the_authors_file_and_timms_repository() -> None:
    info = load_teachers()[DEFAULT_TEACHER]
    assert (info.network, info.num_classes) == ("regnet_y_16gf", 1000)
    assert {source.repo or source.url for source in info.sources} == {
        "timm/regnety_160.deit_in1k",
        "https://dl.fbaipublicfiles.com/deit/regnety_160-a5fe301d.pth",
    }


@pytest.fixture
def small(hub_env: HubEnv, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A small network with random weights, which the server has in the place of the papers' teacher, in both forms."""
    model = filled_regnet(10)
    names = {name: tensor.contiguous() for name, tensor in timm_names(model).items()}
    hub_env.server.add_repo("timm/small", {"model.safetensors": save(names)})
    buffer = io.BytesIO()
    torch.save({"model": names}, buffer)
    known = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    address = hub_env.server.add_file("small.pth", buffer.getvalue())
    sources = (
        Source(repo="timm/small", layout="timm"),
        Source(url=address, layout="timm", payload="model", sha256_prefix=known),
    )
    info = replace(load_teachers()[DEFAULT_TEACHER], network="regnet_y_400mf", num_classes=10, sources=sources)
    monkeypatch.setattr(teacher, "load_teachers", lambda: {DEFAULT_TEACHER: info})
    return model


def check_answers(model: nn.Module) -> None:
    found = load_teacher(DEFAULT_TEACHER, num_classes=10, student=STUDENT, channels_last=False)
    with torch.no_grad():
        expected = model(images(mean=IMAGENET_MEAN, std=IMAGENET_STD))
    torch.testing.assert_close(found(images()), expected, atol=1e-4, rtol=1e-4)


def test_papers_teacher_is_fetched_by_name_and_once(small: nn.Module, hub_env: HubEnv) -> None:
    check_answers(small)
    hub_env.go_offline()
    check_answers(small)
    assert hub_env.server.count("GET", "/cdn/") == 1


def test_papers_teacher_falls_back_to_the_authors_file(
    small: nn.Module, hub_env: HubEnv, caplog: pytest.LogCaptureFixture
) -> None:
    hub_env.server.corrupt("/cdn/", times=None)
    check_answers(small)
    assert "regnety_160: " in caplog.text
    hub_env.server.corrupt("small.pth", times=None)
    hub_env.server.repos.clear()
    check_answers(small)  # from the converted copy


def test_papers_teacher_that_is_nowhere_is_explained(small: nn.Module, hub_env: HubEnv) -> None:
    hub_env.go_offline()
    assert "regnety_160" in refusal(FetchError, lambda: check_answers(small))


@pytest.mark.usefixtures("small")
def test_training_that_distils_takes_it_by_default_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = tiny.model(num_classes=10, distilled=True)
    settings = tiny.recipe(epochs=1, warmup_epochs=0, distillation="hard", distill_on="token")
    data = tiny.Pictures(8, classes=10)
    with pytest.raises(TrainingError, match=r"has 10 classes, the data 3: pass teacher=.* or distillation='none'"):
        train(tiny.model(distilled=True), recipe=settings, train=tiny.Pictures(8), out=tmp_path / "x", workers=0)
    train(student, recipe=settings, train=data, out=tmp_path / "run", device="cpu", workers=0)
    assert [r.message for r in caplog.records if "teacher" in r.message] == [
        "the recipe distils and no teacher is given: taking the papers', regnety_160"
    ]
    other = tiny.model(num_classes=10, distilled=True)
    named = {"out": tmp_path / "named", "teacher": DEFAULT_TEACHER}
    train(other, recipe=settings, train=data, device="cpu", workers=0, **named)
    tiny.same_bits(student.state_dict(), other.state_dict())


@pytest.mark.slow
def test_papers_distillation_command_runs_with_a_filled_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The authors' command (README of DeiT) but for paths, one epoch, images of 32 pixels, two an image class."""
    colours = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().tolist()
    for part in ("train", "val"):
        for number, colour in enumerate(colours):
            folder = tmp_path / "imagenet" / part / f"n{number:08}"
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), tuple(colour)).save(folder / "0.png")
    torch.save({"model": timm_names(filled_regnet(1000, name="regnet_y_16gf"))}, tmp_path / "regnety_160.pth")
    status = main(
        [
            *("distill", str(tmp_path / "imagenet"), "--model", "deit_base_distilled_patch16_224"),
            *("--teacher", "regnety_160", "--teacher-weights", str(tmp_path / "regnety_160.pth")),
            *("--distillation", "hard", "--out", str(tmp_path / "out"), "--img-size", "32", "--epochs", "1"),
            *("--warmup-epochs", "0", "--batch-size", "64", "--device", "cpu", "--workers", "0"),
        ]
    )
    assert status == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "best" / "model.safetensors").is_file()
