"""Files written after a fine-tuning: figures, accuracies by class, cards; none describes the old weights."""

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from coloured import CLASSES, Counted, atom, recipe, save_folders

import deit_models
from deit_models.finetuning.report import Learned, write_report
from deit_models.models.layers import ImageClassifier
from deit_models.scoring.outcomes import Outcomes, Tally

FACTS = {"started_from": "a|b", "mode": "head", "recipe": "finetune", "data": "pets", "classes": 3, "train_images": 7}


def outcomes(labels: list[int], predicted: list[int], *, classes: int = 3) -> Outcomes:
    """The outcomes of a model that is sure of its predictions; a label of -1 is an unreadable image."""
    tally = Tally()
    tally.add([10.0 * torch.nn.functional.one_hot(torch.tensor(predicted), classes)], torch.tensor(labels))
    return tally.outcomes()


def learned(model: ImageClassifier, **changes: object) -> Learned:
    """Six images of three classes: two of class 0 (one wrong), three of class 1, none of class 2, one unreadable."""
    scored = {"val": (Counted(6), outcomes([0, 0, 1, 1, 1, -1], [0, 1, 1, 1, 1, 2]))}
    result = Learned(model, model, 7, None, scored, {"penalty": 0.1}, [])
    return result._replace(**changes)


def write(out: Path, result: Learned, *, plot: bool = False, **facts: object) -> dict:
    return write_report(out, result, recipe=recipe(), facts={**FACTS, **facts}, seconds=1.234, plot=plot)


def test_figures_are_means_over_images_and_over_the_classes_that_have_some(tmp_path: Path) -> None:
    metrics = write(tmp_path, learned(atom(num_classes=3)))
    assert metrics == json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics) == [*FACTS, "split", "val", "penalty", "seconds"]
    figures = metrics["val"]
    assert (figures["top1"], figures["balanced_accuracy"]) == (80.0, 75.0)
    assert (figures["images"], figures["unreadable"], metrics["seconds"]) == (5, 1, 1.23)


def test_accuracy_by_class_is_empty_for_a_class_without_images(tmp_path: Path) -> None:
    write(tmp_path, learned(atom(num_classes=3)))
    with (tmp_path / "per_class_val.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["class", "images", "correct", "accuracy", "predicted", "precision", "f1"],
        ["kind 0", "2", "1", "50.00", "1", "100.00", "66.67"],
        ["kind 1", "3", "3", "100.00", "4", "75.00", "85.71"],
        ["kind 2", "0", "0", "", "0", "", ""],
    ]


def test_test_images_decide_the_accuracy_in_the_card(tmp_path: Path) -> None:
    result = learned(atom(num_classes=3))
    exam = (Counted(3), outcomes([0, 1, 2], [0, 1, 1]))
    write(tmp_path, result._replace(scored={**result.scored, "test": exam}))
    origin = deit_models.from_pretrained(tmp_path / "best").origin
    assert (origin.top1, origin.dataset) == (66.67, "pets")
    card = (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    assert "7 images for training, 6 for validation, 3 for testing" in card
    assert r"started from | a\|b |" in card
    assert {path.name for path in tmp_path.glob("*.csv")} == {"per_class_val.csv", "per_class_test.csv"}


def test_best_and_last_model_are_told_apart(tmp_path: Path) -> None:
    best, last = atom(num_classes=3), atom(num_classes=3, seed=1)
    write(tmp_path, learned(best, last=last), mode="full")
    for name, model in (("best", best), ("model", last)):
        loaded = deit_models.from_pretrained(tmp_path / name)
        assert torch.equal(loaded.head.weight, model.head.weight)
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert ("These are the last weights" in card) == (name == "model")
        assert (loaded.origin.top1 == 80.0) == (name == "best")


def test_layout_that_a_family_lacks_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = deit_models.create_model("t2t_vit_7", **small)
    with caplog.at_level(logging.INFO, logger="deit_models"):
        write(tmp_path, learned(model))
    assert "not written for transformers: " in caplog.text
    assert (tmp_path / "best" / "config.json").exists()
    assert not (tmp_path / "transformers").exists()


# Old weights


@pytest.mark.parametrize("mode", ["head", "last-0", "full"])
def test_no_file_names_digest_accuracy_or_label_of_the_old_weights(tmp_path: Path, mode: str) -> None:
    model = atom(num_classes=3)
    old = {"top1": 71.23, "top5": 98.76, "sha256": "c0ffee" * 10 + "cafe", "notes": "old story"}
    model.origin = replace(model.origin, class_names=("yak", "zebu", "gnu"), dataset="Cattle", licence="MIT", **old)
    photos = save_folders(tmp_path / "photos")
    deit_models.finetune(model, train=photos, out=tmp_path / "out", mode=mode, recipe=recipe(), workers=0, device="cpu")
    files = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".md", ".json", ".csv", ".toml")]
    assert len([path for path in files if path.name == "README.md"]) == 6
    for path in files:
        text = path.read_text(encoding="utf-8")
        found = [word for word in ("71.23", "98.76", "c0ffee", "old story", "yak", "zebu", "gnu") if word in text]
        assert not found, path
    assert model.origin.class_names == CLASSES
    assert (model.origin.licence, model.origin.sha256, model.origin.dataset) == ("MIT", None, "photos")
