"""The examples run as they are, and the benchmarks start."""

import base64
import io
import json
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import notebooks
import pytest
import torch
from PIL import Image

import deit_models

ROOT = Path(__file__).resolve().parents[1]


def run_here(script: Path, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script in this process, since another takes seconds to import torch."""
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example without network and gives its output."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run_script(script: str, *arguments: object) -> str:
        capsys.readouterr()
        run_here(ROOT / "examples" / script, *arguments, monkeypatch=monkeypatch)
        return capsys.readouterr().out

    return run_script


def run_as_a_user(script: str) -> str:
    """What an example prints in a process of its own, without network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that an example creates have one narrow block; theirs would take minutes."""
    create = deit_models.create_model
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    monkeypatch.setattr(deit_models, "create_model", lambda name, **options: create(name, **small, **options))


@pytest.fixture
def tiny_cifar(tmp_path: Path) -> Path:
    """Two classes that differ in brightness, as JPEG files of 32 pixels."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("test", 8)):
        for label, level in (("dark", 40), ("light", 200)):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(level - 30, level + 30, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.jpg")
    return tmp_path / "data"


@pytest.mark.usefixtures("small_models")
def test_training_example_resumes_and_saves_a_model_that_learned(
    run: Callable[..., str], tiny_cifar: Path, tmp_path: Path
) -> None:
    options = [tiny_cifar, "--out", tmp_path / "out", "--batch-size", 8, "--warmup-epochs", 1, "--lr", 3e-3]
    run("train_cifar10.py", *options, "--epochs", 3)
    printed = run("train_cifar10.py", *options, "--epochs", 3)  # nothing left to do: saves and scores again
    assert "epoch" not in printed
    assert "100.00 % of all 16 test images" in printed
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    model = deit_models.from_pretrained(tmp_path / "out" / "half")
    assert model.origin.class_names == ("dark", "light")
    assert model.head.weight.dtype == torch.float32  # stored as float16


def test_search_example_finds_a_winner_and_trains_it_beside_others(
    run: Callable[..., str], tiny_cifar: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = [tiny_cifar, "--out", out, "--supernet-epochs", 1, "--epochs", 1, "--spread", 1]
    options += ["--population", 3, "--generations", 2, "--offspring", 1]
    run("search_cifar10.py", *options, "--only", "winner")
    assert [path.name for path in (out / "alone").iterdir()] == ["winner"]
    printed = run("search_cifar10.py", *options)
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table in printed
    names = ("winner", "unsearched", "random", "spread1")
    assert all(f"| {name} | " in table for name in names)
    assert "over 3 networks" in table
    if find_spec("matplotlib"):  # else a line says that the picture needs the extra [plot]
        assert (out / "networks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_models")
def test_distillation_example_trains_a_teacher_and_four_students(
    run: Callable[..., str], tiny_cifar: Path, tmp_path: Path
) -> None:
    options = [tiny_cifar, "--out", tmp_path / "out", "--batch-size", 8, "--epochs", 2, "--teacher-epochs", 2]
    run("distill_cifar10.py", *options, "--arms", "none")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["none"]  # no teacher was needed
    printed = run("distill_cifar10.py", *options)
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert table in printed
    figures = [float(line.split("|")[3]) for line in table.splitlines()[2:]]
    assert len(figures) == 7
    rows = {name: (tmp_path / "out" / name / "log.jsonl").read_text().splitlines() for name in ("soft", "token")}
    assert figures[1] == round(json.loads(rows["soft"][-1])["top1"], 2)
    assert figures[4] == round(json.loads(rows["token"][-1])["distillation_top1"], 2)
    assert len(rows["token"]) == 2
    assert deit_models.from_pretrained(tmp_path / "out" / "token" / "model").config.distilled


def test_digits_example_compares_three_ways(run: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn.datasets")
    options = ["--out", tmp_path, "--seeds", 1, "--epochs", 1, "--ways", "head"]
    table = (tmp_path / "table.md").read_text(encoding="utf-8") if run("finetune_digits.py", *options) else ""
    way, accuracy, each, _ = (cell.strip() for cell in table.splitlines()[2].strip("|").split("|"))
    assert (way, accuracy) == ("head", each)
    assert float(accuracy) > 90


@pytest.mark.usefixtures("small_models")
def test_transfer_example_goes_from_five_classes_to_five(run: Callable[..., str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 2)):
        for label in range(10):
            folder = tmp_path / "data" / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 80, (32, 32, 3), generator=generator) + 17 * label
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.jpg")
    options = [tmp_path / "data", "--out", tmp_path / "out", "--seeds", 1, "--epochs", 1, "--shots", 6]
    printed = run("transfer_cifar10.py", *options, "--pretrain-epochs", 2)
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert table in printed
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["from scratch", "head", "full"]
    known = deit_models.from_pretrained(tmp_path / "out" / "pretrained" / "model").origin.class_names
    new = deit_models.from_pretrained(tmp_path / "out" / "full_0" / "best").origin.class_names
    assert known == tuple(f"class {i}" for i in range(5))
    assert new == tuple(f"class {i}" for i in range(5, 10))


def test_labels_example_compares_ways_on_uneven_classes_and_on_mosaics(
    run: Callable[..., str], tiny_cifar: Path, tmp_path: Path
) -> None:
    options = [tiny_cifar, "--seeds", 0, "--modes", "head", "--out"]
    uneven = run("uneven_and_several_labels.py", "uneven", *options, tmp_path / "uneven", "--largest", 24)
    rows = [line.split(" | ")[0] for line in uneven.splitlines() if line.startswith("| head")]
    assert rows == ["| head, without", "| head, class_weights"]
    small = ["--images", 20, "--size", 32]
    several = run("uneven_and_several_labels.py", "several", *options, tmp_path / "several", *small)
    assert "| way | map | macro_f1 | micro_f1 | seconds |" in several
    assert (tmp_path / "several" / "table.md").exists()


def test_photos_and_cifar_examples_fine_tune_folders(run: Callable[..., str], tiny_cifar: Path, tmp_path: Path) -> None:
    lines = run("finetune_photos.py", tiny_cifar / "train", "--out", tmp_path / "photos").splitlines()
    assert lines[0].endswith("of 10 images that were set aside; by class:")
    assert lines[-1].split(": ")[1].split(" (")[0] == Path(lines[-1].split(": ")[0]).parent.name
    options = ["--data", tiny_cifar, "--model", "deit_micro_patch4_32", "--out", tmp_path / "cifar"]
    printed = run("finetune_cifar10.py", *options, "epochs=2", "warmup_epochs=0", "batch_size=8", "repeats=1")
    assert "of 16 test images" in printed
    recipe = (tmp_path / "cifar" / "recipe.toml").read_text(encoding="utf-8")
    assert 'optimizer = "nesterov"' in recipe


def test_similar_photos_are_drawn_and_embedded_once(run: Callable[..., str], tiny_cifar: Path, tmp_path: Path) -> None:
    sheet, features = tmp_path / "similar.png", tmp_path / "similar.npz"
    options = [tiny_cifar / "train", "--out", sheet, "--queries", 4, "--count", 5]
    printed = run("find_similar.py", *options)
    assert "4 queries; 20 of 20 photos found lie in the query's folder" in printed  # they differ in brightness
    with Image.open(sheet) as picture:
        assert picture.size == (6 * 112 + 8, 4 * 112 + 8)
        frames = [[picture.getpixel((10 + 112 * x, 10 + 112 * y)) for x in range(6)] for y in range(4)]
    assert {row[0] for row in frames} == {(65, 105, 225)}, "the queries are framed"
    assert {colour for row in frames for colour in row[1:]} == {(255, 255, 255)}, "none of another class"
    before = features.stat().st_mtime_ns
    assert run("find_similar.py", *options) == printed
    assert features.stat().st_mtime_ns == before
    run("find_similar.py", tiny_cifar / "test", *options[1:])
    assert features.stat().st_mtime_ns != before, "other photos"


@pytest.mark.slow
def test_ray_example_classifies_every_photo(tiny_cifar: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is no dependency of tests: pip install 'ray[data]'")
    from pyarrow import parquet

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["RAY_worker_niceness"] = "0"  # Ray's actors would wait for all other processes of a busy machine
    command = [sys.executable, ROOT / "examples" / "ray_batches.py", tiny_cifar / "test", "--out", tmp_path / "out"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "16 images" in done.stdout
    table = parquet.read_table(tmp_path / "out").to_pydict()
    paths = sorted((tiny_cifar / "test").rglob("*.jpg"))
    assert sorted(table["path"]) == [str(path) for path in paths]
    classifier = deit_models.Classifier()
    expected = {result.source: result.predictions[0] for result in classifier([str(path) for path in paths], top_k=1)}
    embeddings = dict(zip(map(str, paths), classifier.embed(paths), strict=True))
    for path, label, embedding in zip(table["path"], table["label"], table["embedding"], strict=True):
        assert label == expected[path].label
        torch.testing.assert_close(torch.tensor(embedding), embeddings[path], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", ["kingdom", "genus", "name"])
def test_inaturalist_example_reads_the_competitions_format(run: Callable[..., str], tmp_path: Path, rank: str) -> None:
    taxa = [
        ("Aves", "Corvus", "Corvus corax"),
        ("Aves", "Corvus", "Corvus frugilegus"),
        ("Plantae", "Rosa", "Rosa canina"),
    ]
    categories = [
        {
            "id": i,
            "name": name,
            "genus": genus,
            "kingdom": "Plantae" if top == "Plantae" else "Animalia",
            "supercategory": top,
        }
        for i, (top, genus, name) in enumerate(taxa)
    ]
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    for split, count in (("train", 6), ("val", 2)):
        images, annotations = [], []
        for category, (top, *_) in enumerate(taxa):
            for number in range(count):
                file = f"train_val2018/{top}/{category}/{split}{number}.jpg"
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 36), [(200, 30, 30), (30, 200, 30), (30, 30, 200)][category]).save(
                    tmp_path / file
                )
                images.append({"id": len(images), "file_name": file})
                annotations.append({"image_id": len(annotations), "category_id": category})
        (tmp_path / f"{split}2018.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    options = [tmp_path, "--out", tmp_path / "out", "--rank", rank, "--mode", "head", "--model", "deit_micro_patch4_32"]
    printed = run("finetune_inaturalist.py", *options)
    classes = {"kingdom": ("Animalia", "Plantae"), "genus": ("Corvus", "Rosa"), "name": tuple(t[2] for t in taxa)}[rank]
    assert printed.splitlines()[-1] == f"100.00 % of 6 validation images, {len(classes)} classes by {rank}"
    assert deit_models.from_pretrained(tmp_path / "out" / "best").origin.class_names == classes


def test_photo_example_prints_what_the_start_page_shows_offline() -> None:
    lines = run_as_a_user("classify_photo.py").splitlines()
    assert Path(lines[0]) == ROOT / "examples" / "cat.jpg"
    assert "\n".join(["examples/cat.jpg", *lines[1:]]) in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert lines[1].split()[1] == "cat"


def test_photo_example_takes_files(run: Callable[..., str], tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "green").save(tmp_path / "ein grünes Bild.png")
    lines = run("classify_photo.py", tmp_path / "ein grünes Bild.png").splitlines()
    assert lines[0] == str(tmp_path / "ein grünes Bild.png")
    assert len(lines) == 4


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_notebook_runs_offline_and_its_stored_outputs_are_up_to_date(name: str, request: pytest.FixtureRequest) -> None:
    for module in ("nbclient", "ipykernel", "matplotlib", "skimage"):
        pytest.importorskip(module, reason="notebooks need the extra [notebook]")
    path = notebooks.EXAMPLES / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Jupyter; a warning of ours would be an output of the notebook
        found = notebooks.run_notebook(path)
    if request.config.getoption("--update-notebooks"):
        notebooks.write_notebook(found, path)
    stored = json.loads(path.read_text(encoding="utf-8"))
    stale = "\n".join(notebooks.differences(stored, found))
    again = f"`pytest tests/test_examples.py -k {name} --update-notebooks` writes it again"
    assert not stale, f"{path} is out of date: {stale}\n{again}"


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_notebook_is_kept_with_text_and_pictures_and_is_small(name: str) -> None:
    text = (notebooks.EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.encode()) < notebooks.MOST_BYTES
    cells = notebooks.code_cells(json.loads(text))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom"
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "error" not in kinds
    names = {output.get("name") for cell in cells for output in cell["outputs"]}
    assert "stderr" not in names, "a warning"
    assert sum(len(notebooks.shown(cell).pictures) for cell in cells) >= 2


@pytest.mark.parametrize(
    ("before", "after", "alike"),
    [
        ("cat: 54.1 %", "cat: 54.0 %", True),
        ("cat: 54.1 %", "cat: 45.0 %", False),
        ("cat: 54.1 %", "dog: 54.1 %", False),
        ("cat: 54.1 %", "cat: 54.1 %\ndog: 3.0 %", False),
        ("1,207,444 parameters", "1,207,445 parameters", False),
        ("LeViT   36.3 images/s", "LeViT  1,136.3 images/s", True),
        ("took 3.2 s, 80.1 %", "took 13.9 s, 80.2 %", True),
        ("took 3.2 s, 80.1 %", "took 13.9 s, 60.2 %", False),
        ("wrote /tmp/tmpa1b/run/best", "wrote /private/var/folders/x/tmpc2_/run/best", True),
        ("wrote /tmp/tmpa1b/run/best", "wrote /tmp/tmpa1b/run/last", False),
    ],
)
def test_outputs_are_compared_without_what_differs_from_run_to_run(before: str, after: str, alike: bool) -> None:
    pair = [notebook_of({"output_type": "stream", "name": "stdout", "text": text}) for text in (before, after)]
    assert (notebooks.differences(*pair) == []) == alike


def test_picture_that_is_missing_or_of_another_size_is_out_of_date() -> None:
    def picture(width: int, kind: str = "PNG") -> dict[str, object]:
        file = io.BytesIO()
        Image.new("RGB", (width, 100)).save(file, kind)
        content = base64.b64encode(file.getvalue()).decode()
        return {"output_type": "display_data", "data": {f"image/{kind.lower()}": content, "text/plain": "<Figure>"}}

    stored = notebook_of(picture(200))
    assert notebooks.differences(stored, notebook_of(picture(203))) == []
    assert "(200, 100)" in notebooks.differences(stored, notebook_of(picture(300)))[0]
    assert "come out" in notebooks.differences(stored, notebook_of())[0]
    assert "come out" in notebooks.differences(stored, notebook_of(picture(200, "JPEG")))[0]


def notebook_of(*outputs: dict[str, object]) -> dict[str, object]:
    return {"cells": [{"cell_type": "code", "id": "one", "outputs": list(outputs)}]}


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_benchmarks_import_and_say_what_they_take(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(ROOT / "benchmarks" / script, "--help", monkeypatch=monkeypatch)
    assert ended.value.code == 0
    assert f"benchmarks/{script}" in capsys.readouterr().out


def test_every_stage_of_the_gpu_benchmark_runs_and_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = ROOT / "benchmarks" / "gpu.py"
    stages = runpy.run_path(str(script))["STAGES"]
    command = [sys.executable, str(script), "--toy", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    for name, stage in stages.items():
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["complete"], name
        assert found["stage"] == name
        assert found["columns"] == stage.columns
        assert found["rows"], name
        assert "rehearsal" in found["card"]
        assert all(list(row) == list(stage.columns) for row in found["rows"])
        table = (tmp_path / f"{name}.md").read_text()
        assert f"| {' | '.join(stage.columns.values())} |" in table
        assert table.count("\n| ") == len(found["rows"]) + 2
        assert "Incomplete" not in table
    check = json.loads((tmp_path / "check.json").read_text())["rows"][0]
    assert check["passed"] > 0
    assert check["failed"] == 0
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout.count("skipped, its result is there") == len(stages)
    # a stage that was broken off measures what it lacks
    found = json.loads((tmp_path / "inference.json").read_text())
    kept = {**found, "complete": False, "rows": [dict(row, images_per_second=1.0) for row in found["rows"]]}
    (tmp_path / "inference.json").write_text(json.dumps(kept))
    subprocess.run([*command, "--stage", "inference"], check=True)
    assert json.loads((tmp_path / "inference.json").read_text())["rows"] == kept["rows"]
