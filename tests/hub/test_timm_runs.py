"""Folders of timm's train.py: the settings in args.yaml are honoured or refused by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHAPE, photo, refusal

from deit_models import CheckpointError, ConfigError, DeitModelsError, from_pretrained, transform_for

# Settings of training alone, or at the value that says nothing.
USUAL = {"aa": "rand-m9", "batch_size": 128, "bn_eps": None, "class_map": "", "crop_pct": None, "data": None}
USUAL |= {"drop": 0.0, "gp": None, "img_size": None, "in_chans": None, "initial_checkpoint": "", "input_img_mode": None}
USUAL |= {"input_size": None, "interpolation": "", "lr": 0.001, "mean": None, "std": None, "model_ema": False}
USUAL |= {"num_classes": 3, "opt": "adamw", "train_interpolation": "random", "model": "deit_tiny_patch16_224"}


class Run:
    """A folder as timm leaves it, and timm's own answer for an image."""

    def __init__(self, folder: Path, **said: Any) -> None:
        timm = pytest.importorskip("timm")
        self.folder, settings = folder, {**USUAL, "model_kwargs": {}, **said}
        settings["model_kwargs"] = {**SHAPE, **settings["model_kwargs"]}
        channels = settings["in_chans"] or (settings["input_size"] or [3])[0]
        self.model = timm.create_model(
            settings["model"],
            num_classes=settings["num_classes"],
            in_chans=channels,
            global_pool=settings["gp"],
            **settings["model_kwargs"],
        ).eval()
        self.transform = timm.data.create_transform(**timm.data.resolve_data_config(settings, model=self.model))
        (folder / "args.yaml").write_text(json.dumps(settings), encoding="utf-8")  # YAML, too
        contents = {"state_dict": self.model.state_dict(), "args": argparse.Namespace(**settings), "epoch": 3}
        torch.save(contents, folder / "model_best.pth.tar")
        self.image = photo(301, 407) if channels == 3 else photo(301, 407).convert("L")

    def load(self, name: str = "", **options: Any) -> Any:
        return from_pretrained(self.folder / name, cache_dir=self.folder / "cache", **options)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        {"in_chans": 1, "mean": [0.4], "std": [0.3], "input_img_mode": "L"},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"img_size": 64, "model_kwargs": {"img_size": 64}},
        {"input_size": [3, 32, 64], "model_kwargs": {"img_size": [32, 64]}},
        {"crop_mode": "squash", "num_classes": 7},
        {"gp": "token", "model_kwargs": {"patch_size": 32, "drop_path_rate": 0.1}},
        {"model": "deit_tiny_distilled_patch16_224"},
        {"model": "deit3_small_patch16_224", "std": [1.0, 1.0, 1.0]},
    ],
    ids=str,
)
def test_settings_of_a_run_are_honoured(tmp_path: Path, said: dict[str, Any]) -> None:
    run = Run(tmp_path, **said)
    name = said.get("model", USUAL["model"])
    for ours in (run.load(), run.load("model_best.pth.tar"), run.load(model=name)):
        pixels, theirs = transform_for(ours)(run.image), run.transform(run.image)
        torch.testing.assert_close(pixels, theirs, atol=1e-5, rtol=0)
        with torch.inference_mode():
            torch.testing.assert_close(ours(pixels[None]), run.model(theirs[None]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"crop_mode": "border"}, "crop_mode"),
        ({"gp": "avg"}, "global_pool"),
        ({"class_map": "/data/classes.txt"}, "class_map"),
        ({"model_kwargs": {"init_values": 1e-5}}, "init_values"),
        ({"model_kwargs": {"no_embed_class": True}}, "no_embed_class"),
        ({"model_kwargs": {"qk_norm": True}}, "qk_norm"),
    ],
)
def test_settings_that_are_unknown_here_are_refused_by_name(tmp_path: Path, said: dict[str, Any], named: str) -> None:
    run = Run(tmp_path, **said)
    assert named in refusal(DeitModelsError, run.load)


@pytest.mark.parametrize(
    "changed", [{"bn_eps": 1e-3}, {"input_img_mode": "RGBA"}, {"model_kwargs": [1]}, {"mean": "x"}]
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    run = Run(tmp_path)
    place = tmp_path / "args.yaml"
    place.write_text(json.dumps({**json.loads(place.read_text(encoding="utf-8")), **changed}), encoding="utf-8")
    assert "args.yaml" in refusal(DeitModelsError, run.load)


def test_class_map_names_the_classes(tmp_path: Path) -> None:
    run = Run(tmp_path, class_map="/data/classes.txt")
    (tmp_path / "classes.txt").write_text("dog\nants and bees\ncat\n", encoding="utf-8")
    assert run.load().origin.class_names == ("dog", "ants and bees", "cat")
    (tmp_path / "classes.txt").write_text("dog\n", encoding="utf-8")
    assert "1 class names" in refusal(CheckpointError, run.load)


def test_run_of_another_number_of_classes_than_its_file_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    place = tmp_path / "args.yaml"
    place.write_text(
        place.read_text(encoding="utf-8").replace('"num_classes": 3', '"num_classes": 4'), encoding="utf-8"
    )
    assert "wrong shape" in refusal(CheckpointError, run.load)
    assert run.load(num_classes=5).num_classes == 5


@pytest.mark.parametrize(
    "text", ["model: [", "model: 3", "- a", "", "\0", "task: detect", "&a [*a]", "model: !!python/x y"]
)
def test_args_of_another_program_ask_for_the_model(tmp_path: Path, text: str) -> None:
    run = Run(tmp_path)
    (tmp_path / "args.yaml").write_text(text, encoding="utf-8")
    assert "pass model=" in refusal(CheckpointError, run.load)
    with pytest.raises(CheckpointError, match="not the weights"):  # of its full width
        run.load(model="deit_base_patch16_224")


def test_config_beside_the_settings_is_what_counts(tmp_path: Path) -> None:
    run = Run(tmp_path, mean=[0.1, 0.1, 0.1])
    saved = run.load()
    saved.save_pretrained(tmp_path, layout="timm")
    (tmp_path / "args.yaml").write_text("model: resnet18", encoding="utf-8")
    assert run.load().origin.preprocessing == saved.origin.preprocessing
    assert refusal(ConfigError, lambda: run.load(num_classes=-1))
