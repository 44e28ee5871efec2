"""Every form of data in every command: the same images give the same figures as class folders (docs/data.md)."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CLASSES, MODELS, save_class_folders
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

import deit_models
from deit_models.cli import main
from deit_models.data.sources import image_sources
from deit_models.scoring.embeddings import load_features

pytestmark = [
    pytest.mark.usefixtures("atoms"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
]
PLAIN, DISTILLED = MODELS
SETTINGS: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "batch_size": 6, "precision": "float32"}
QUICK = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()] + ["--workers=0", "--device=cpu"]
COMMANDS = ("train", "distill", "finetune", "evaluate", "predict", "embed")


def rows(root: Path) -> list[dict[str, str]]:
    """Path, class and split of the images in class folders, in their order."""
    files = sorted(root.glob("train/*/*.png")) + sorted(root.glob("val/*/*.png"))
    return [{"path": str(f.relative_to(root)), "label": f.parts[-2], "split": f.parts[-3]} for f in files]


def separated(root: Path, name: str, delimiter: str) -> Path:
    with (root / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows(root))
    return root / name


def jsonl(root: Path) -> Path:
    (root / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(root)))
    return root / "t.jsonl"


def image_folder(root: Path) -> Path:
    for split in ("train", "val"):
        place = root / "beside" / split
        shutil.copytree(root / split, place)
        lines = [f"{row['path'].partition('/')[2]},{row['label']}" for row in rows(root) if row["split"] == split]
        (place / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    return root / "beside"


def named(root: Path) -> str:
    for split, place in {"train": "2021_train", "val": "2021_valid"}.items():
        shutil.copytree(root / split, root / place)
    return "inaturalist-2021"


def frame(root: Path) -> Any:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    found = pandas.DataFrame(rows(root))
    return found.assign(path=[str(root / path) for path in found["path"]])


def parquet(root: Path) -> Path:
    pytest.importorskip("datasets", reason="datasets is not installed")
    frame(root).to_parquet(root / "t.parquet")
    return root / "t.parquet"


def sets(root: Path) -> Any:
    library = pytest.importorskip("datasets", reason="datasets is not installed")
    library.disable_progress_bars()
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=list(CLASSES))})

    def made(split: str) -> Any:
        chosen = [row for row in rows(root) if row["split"] == split]
        images = [{"bytes": (root / row["path"]).read_bytes(), "path": None} for row in chosen]
        columns = {"image": images, "label": [row["label"] for row in chosen]}
        return library.Dataset.from_dict(columns, features=features)

    return library.DatasetDict(train=made("train"), validation=made("val"))


def saved(root: Path) -> Path:
    sets(root).save_to_disk(root / "saved")
    return root / "saved"


def hub_folder(root: Path) -> Path:
    (root / "hub/data").mkdir(parents=True)
    for split, data in sets(root).items():
        data.to_parquet(root / f"hub/data/{split}-00000-of-00001.parquet")
    return root / "hub"


def pairs(root: Path) -> dict[str, Any]:
    return {
        s: [(root / row["path"], row["label"]) for row in rows(root) if row["split"] == s] for s in ("train", "val")
    }


def torch_datasets(root: Path) -> dict[str, Dataset[Any]]:
    return {split: ImageFolder(str(root / split)) for split in ("train", "val")}


def class_folders(root: Path) -> Path:
    for place in [*root.iterdir()]:
        if place.name not in ("train", "val"):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    return root


FORMS: dict[str, Callable[[Path], Any]] = {
    "class folders": class_folders,
    "a name": named,
    "CSV": lambda root: separated(root, "t.csv", ";"),
    "TSV": lambda root: separated(root, "t.tsv", "\t"),
    "JSONL": jsonl,
    "Parquet table": parquet,
    "metadata.csv beside images": image_folder,
    "saved set": saved,
    "Parquet folder": hub_folder,
    "DataFrame": frame,
    "Dataset, DatasetDict": sets,
    "list of pairs": pairs,
    "torch Dataset": torch_datasets,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images for training and 6 for validation, of three classes."""
    root = tmp_path_factory.mktemp("images")
    save_class_folders(root / "train", CLASSES, 4)
    save_class_folders(root / "val", CLASSES, 2)
    return root


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A model to begin with, of the same classes; it is the teacher too."""
    torch.manual_seed(3)
    model = deit_models.create_model(DISTILLED)
    model.origin = replace(model.origin, class_names=CLASSES)
    model.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


Figures = list[Any]


def last_row(out: Path) -> Figures:
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    return [row["loss"], row["top1"]]


def by_command(command: str, source: str | Path, start: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> Figures:
    """The figures of a command line."""
    root = ["--root", out.parent / "root"] if isinstance(source, str) else []
    more: dict[str, list[Any]] = {
        "train": [source, "--out", out, "--model", PLAIN, "--recipe", "cifar_scratch", *QUICK, *root],
        "distill": [source, "--out", out, "--teacher", start, "--model", DISTILLED, "--recipe", "cifar_distill"],
        "finetune": [source, "--out", out, "--model", start, "--recipe", "finetune", *QUICK, *root],
        "evaluate": [start, source, "--json", "--workers=0", "--device=cpu", *root],
        "predict": [source, "--model", start, "--json", "--workers=0", "--device=cpu"],
        "embed": [source, "--model", start, "--output", f"{out}.npz", "--workers=0", "--device=cpu"],
    }
    more["distill"] += [*QUICK, *root]
    assert main([command, *map(str, more[command])]) == 0
    printed = capsys.readouterr().out
    if command == "evaluate":
        found = json.loads(printed)
        return [found["top1"], found["loss"], found["images"]]
    if command == "predict":
        return [json.loads(line)["predictions"] for line in printed.splitlines()]
    return load_features(Path(f"{out}.npz")).embeddings.tolist() if command == "embed" else last_row(out)


def by_python(command: str, source: Any, start: Path, out: Path) -> Figures:
    """The same figures by a function."""
    data = source if isinstance(source, dict) and "val" in source else {"train": source, "val": source}
    options = {"train": data["train"], "val": data["val"], "out": out, "workers": 0, "device": "cpu"}
    if command in ("train", "distill"):
        torch.manual_seed(0)
        model = deit_models.create_model(PLAIN if command == "train" else DISTILLED)
        recipe = deit_models.recipe_named("cifar_scratch" if command == "train" else "cifar_distill", **SETTINGS)
        teacher = deit_models.from_pretrained(start) if command == "distill" else None
        deit_models.train(model, recipe=recipe, teacher=teacher, **options)
        return last_row(out)
    if command == "finetune":
        recipe = deit_models.recipe_named("finetune", **SETTINGS)
        deit_models.finetune(start, recipe=recipe, **options)
        return last_row(out)
    model = deit_models.from_pretrained(start)
    if command == "evaluate":
        result = deit_models.evaluate(model, data["val"], workers=0, device="cpu")
        return [result.top1, result.loss, result.images]
    both = image_sources(source) if data["train"] is data["val"] else image_sources([data["train"], data["val"]])
    classifier = deit_models.Classifier(model)
    if command == "embed":
        classifier.embed_files(both, f"{out}.npz", workers=0)
        return load_features(Path(f"{out}.npz")).embeddings.tolist()
    found = classifier.classify_files(both, workers=0)
    return [[{"label": p.label, "probability": p.probability} for p in one.predictions] for one in found]


def rounded(figures: Any) -> Any:
    """Without the numbers of classes, and to six digits."""
    return json.loads(re.sub(r'"index": \d+(, )?', "", json.dumps(figures)).replace(", }", "}"), parse_float=_short)


def _short(text: str) -> float:
    return float(f"{float(text):.5g}")


@pytest.fixture(scope="module")
def expected() -> dict[str, Figures]:
    """The figures of class folders by command, as they become known."""
    return {}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_figures_of_class_folders(
    form: str,
    command: str,
    images: Path,
    start: Path,
    tmp_path: Path,
    expected: dict[str, Figures],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "root"
    shutil.copytree(images, root)
    if command not in expected:
        expected[command] = rounded(by_command(command, root, start, tmp_path / "first", capsys))
    source = FORMS[form](root)
    if form == "a name" and command in ("predict", "embed"):  # which are not for labelled images
        more = ["--output", str(tmp_path / "x.npz")] if command == "embed" else []
        assert main([command, str(source), "--model", str(start), *more]) == 1
        assert "inaturalist-2021: no such file" in capsys.readouterr().err
        return
    if isinstance(source, (str, Path)):
        found = by_command(command, source, start, tmp_path / "run", capsys)
    else:
        found = by_python(command, source, start, tmp_path / "run")
    assert rounded(found) == expected[command]


def test_the_table_of_the_documents_has_every_form_and_command() -> None:
    text = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    table = text[text.index("| form |") :].partition("\n\n")[0]
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in table.splitlines()}
    assert rows.pop("form") == [*COMMANDS]
    rows.pop("---")
    assert [*rows] == [*FORMS]
    for form, make in FORMS.items():
        expected = ["Python" if make in (frame, sets, pairs, torch_datasets) else "yes"] * 6
        assert rows[form] == ([*expected[:4], "no", "no"] if make is named else expected)
