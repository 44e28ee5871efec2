"""Every way to change a model: the saved card and config.json state nothing of the old weights that no longer holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from coloured import CLASSES, Counted, atom, recipe, save_folders
from nas.toy import SETTINGS, coloured, largest_network, toy_space

import deit_models
from deit_models import ConfigError
from deit_models.checkpoint import Origin, Preprocessing
from deit_models.models.layers import ImageClassifier
from deit_models.nas.costs import Macs
from deit_models.nas.search import search
from deit_models.nas.settings import Evolution
from deit_models.nas.supernet import extract
from deit_models.training.run import Computing

LABELS = ("oldlabel-ant", "oldlabel-bee", "oldlabel-cow")
DIGEST, TOP1, TOP5, NOTES = "0ddba11" * 9 + "0", 67.8901, 89.0123, "Notes on the old weights."
FIGURES = (DIGEST, str(TOP1), str(TOP5), NOTES)
QUICK = {"device": "cpu", "workers": 0}


def mark(model: ImageClassifier) -> ImageClassifier:
    """Give a model every fact that may be known of weights."""
    facts = {"dataset": "olddata", "top1": TOP1, "top5": TOP5, "sha256": DIGEST, "notes": NOTES}
    model.origin = replace(model.origin, class_names=LABELS, source="me/old", **facts)
    return model.eval()


@pytest.fixture
def old() -> ImageClassifier:
    return mark(atom(distilled=True, num_classes=3))


def statements(folder: Path) -> str:
    """Everything that is written beside the weights, in each layout below a folder."""
    files = [path for name in ("config.json", "README.md") for path in folder.rglob(name)]
    assert files
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def saved(model: ImageClassifier, folder: Path) -> str:
    for layout in ("native", "timm", "transformers"):
        model.save_pretrained(folder / layout, layout=layout)
    return statements(folder)


def stale(text: str, facts: tuple[str, ...]) -> list[str]:
    return [fact for fact in facts if fact in text]


def test_unchanged_model_states_them_all(old: ImageClassifier, tmp_path: Path) -> None:
    assert stale(saved(old, tmp_path), (*FIGURES, *LABELS)) == [*FIGURES, *LABELS]


def adapted(**options: object) -> Callable[[ImageClassifier, Path], str]:
    return lambda old, out: saved(deit_models.adapt_head(old, **options), out)


def reset(num_classes: int) -> Callable[[ImageClassifier, Path], str]:
    def change(model: ImageClassifier, folder: Path) -> str:
        model.reset_classifier(num_classes)
        return saved(model, folder)

    return change


def loaded(**options: object) -> Callable[[ImageClassifier, Path], str]:
    def change(old: ImageClassifier, out: Path) -> str:
        old.save_pretrained(out / "start")
        return saved(deit_models.from_pretrained(out / "start", **options), out / "saved")

    return change


def finetuned(mode: str) -> Callable[[ImageClassifier, Path], str]:
    def change(old: ImageClassifier, out: Path) -> str:
        photos = save_folders(out / "photos")
        deit_models.finetune(old, train=photos, out=out / "run", mode=mode, recipe=recipe(), **QUICK)
        return statements(out / "run")

    return change


def trained(old: ImageClassifier, out: Path) -> str:
    deit_models.train(old, recipe=recipe(), train=Counted(12), val=Counted(6, seed=50), out=out, **QUICK)
    return statements(out) + saved(old, out / "saved")


def distilled(old: ImageClassifier, out: Path) -> str:
    teacher = deit_models.adapt_head(atom(num_classes=3, seed=5), class_names=[f"kind {i}" for i in range(3)]).eval()
    settings = recipe(distillation="hard")
    deit_models.train(
        old, recipe=settings, train=Counted(12), val=Counted(6, seed=50), teacher=teacher, out=out, **QUICK
    )
    return statements(out) + saved(old, out / "saved")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(adapted(num_classes=5), id="adapt to a number"),
        pytest.param(adapted(num_classes=3), id="adapt to the same number"),
        pytest.param(adapted(class_names=CLASSES), id="adapt to names"),
        pytest.param(adapted(class_names=CLASSES, img_size=32), id="adapt to names and a size"),
        pytest.param(reset(5), id="reset the classifier"),
        pytest.param(reset(3), id="reset the classifier to the same number"),
        pytest.param(loaded(num_classes=5), id="load with other classes"),
        pytest.param(loaded(num_classes=5, img_size=32), id="load with other classes and another size"),
        *(pytest.param(finetuned(mode), id=f"finetune {mode}") for mode in ("head", "last-0", "last-1", "full")),
        pytest.param(trained, id="train"),
        pytest.param(distilled, id="distil"),
    ],
)
def test_new_classes_leave_no_fact_of_the_old_weights(
    old: ImageClassifier, tmp_path: Path, change: Callable[[ImageClassifier, Path], str]
) -> None:
    assert stale(change(old, tmp_path), (*FIGURES, *LABELS)) == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(adapted(img_size=32), id="adapt to a size"),
        pytest.param(adapted(class_names=LABELS[::-1]), id="other order"),
        pytest.param(loaded(img_size=32), id="load at another size"),
    ],
)
def test_same_classes_keep_their_names_alone(
    old: ImageClassifier, tmp_path: Path, change: Callable[[ImageClassifier, Path], str]
) -> None:
    text = change(old, tmp_path)
    assert stale(text, FIGURES) == []
    assert stale(text, LABELS) == [*LABELS]


def test_same_classes_and_size_change_nothing(old: ImageClassifier, tmp_path: Path) -> None:
    text = loaded(num_classes=3, img_size=16)(old, tmp_path)
    # the digest is that of the file, which is computed only where one is known to compare with
    assert stale(text, (*FIGURES, *LABELS)) == [str(TOP1), str(TOP5), NOTES, *LABELS]


def test_evaluation_leaves_the_facts_alone(old: ImageClassifier) -> None:
    before = old.origin
    deit_models.evaluate(old, Renamed(12), **QUICK)
    assert old.origin == before


class Renamed(Counted):
    """The images of `Counted`, with the old model's names in another order."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.classes = list(LABELS[::-1])


def test_optimised_copies_cannot_be_saved(old: ImageClassifier, tmp_path: Path) -> None:
    fast = deit_models.optimize(old, backend="eager")
    with pytest.raises(ConfigError, match="save the model"):
        fast.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def supernet() -> ImageClassifier:
    network = largest_network(toy_space())
    network.origin = Origin(name="supernet", preprocessing=Preprocessing(resize=16, crop=(16, 16)))
    return mark(network)


def test_searched_network_states_nothing_of_the_super_network(supernet: ImageClassifier, tmp_path: Path) -> None:
    space = toy_space()
    supernet.save_pretrained(tmp_path / "supernet")
    assert stale(statements(tmp_path / "supernet"), (*FIGURES, *LABELS)) == [*FIGURES, *LABELS]
    cost = Macs(space, SETTINGS["num_classes"])
    search(
        space,
        supernet=tmp_path / "supernet",
        images=coloured(12),
        out=tmp_path / "search",
        limit=cost(space.largest()),
        evolution=Evolution(population=3, generations=2, parents=2, mutants=1, crossovers=1, floor=0.0),
        precision="float32",
        batch_size=6,
        computing=Computing(**QUICK),
    )
    assert stale(statements(tmp_path / "search"), (*FIGURES, *LABELS)) == []


@torch.no_grad()
def test_extracted_network_has_no_facts_until_it_is_given_some(supernet: ImageClassifier, tmp_path: Path) -> None:
    network = extract(supernet, toy_space(), toy_space().smallest())
    assert network.origin is None
    with pytest.raises(ConfigError, match="no origin"):
        network.save_pretrained(tmp_path)
