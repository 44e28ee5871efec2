"""`deit-models embed`, and results that several processes share: what is written, said, and goes on after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import CLASSES, failure, save_class_folders, save_pictures, usage_error

import deit_models
from deit_models.cli import build_parser, main
from deit_models.cli.inference import _begin_parts, _predict_in_parts
from deit_models.data.sources import image_sources
from deit_models.distributed import join_processes
from deit_models.scoring.embeddings import load_features, retrieval

ROOT = Path(deit_models.__file__).parents[1]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return save_class_folders(tmp_path / "labelled", CLASSES, 4)


def test_embed_writes_what_the_classifier_gives_and_says_so(tiny, labelled, tmp_path, capsys):
    file = tmp_path / "x.npz"
    assert main(["embed", str(labelled), "--model", str(tiny), "--output", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split() for line in out.splitlines()] == [
        ["output", str(file)], ["images", "12"], ["width", "16"], ["storage", "float32"], ["unreadable", "0"],
    ]  # fmt: skip
    found = load_features(file)
    torch.testing.assert_close(found.embeddings, deit_models.Classifier(tiny).embed(list(found.paths)))
    assert found.labels is None


def test_embed_measures_retrieval_of_labelled_folders(tiny, labelled, tmp_path, capsys):
    (labelled / "bee" / "2.png").write_bytes(b"")
    file = tmp_path / "x.npz"
    arguments = ["embed", str(labelled), "--model", str(tiny), "--output", str(file), "--storage", "float16"]
    assert main([*arguments, "--retrieval", "--json"]) == 1
    out, err = capsys.readouterr()
    facts, features = json.loads(out), load_features(file)
    assert err.startswith("deit-models: 1 of 12 images could not be read:\n")
    assert "2.png" in err
    assert (facts["images"], facts["unreadable"], facts["queries"], features.embeddings.dtype) == (
        11, 1, 11, torch.float16,
    )  # fmt: skip
    expected = retrieval(features.embeddings, [Path(path).parent.name for path in features.paths])
    assert facts["recall@1"] == round(expected.recall[1], 2)
    assert facts["mAP"] == round(expected.mean_average_precision, 2)
    assert main([*arguments, "--retrieval", "--json", "--resume"]) == 1, "nothing to do, the same figures"
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--output", "x.txt"], "expected .npz or .parquet"),
        (["--output", "nowhere/x.npz"], "there is no folder nowhere"),
        (["--output", "x.npz", "--resume", "--batch-size", "0"], "batch_size=0"),
        (["--output", "x.npz", "--workers", "-1"], "workers=-1"),
    ],
)
def test_embed_explains_in_one_line_what_it_cannot_do(tiny, photos, tmp_path, monkeypatch, capsys, options, text):
    monkeypatch.chdir(tmp_path)
    assert text in failure(capsys, "embed", photos, "--model", tiny, *options)
    assert "required: --output" in usage_error(capsys, "embed", photos)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_embed_refuses_a_file_that_exists_before_anything_is_loaded(photos, tmp_path, capsys):
    (tmp_path / "x.npz").write_text("mine")
    arguments = ("embed", photos, "--model", "no/such-model", "--output", tmp_path / "x.npz")
    assert "x.npz exists; --resume" in failure(capsys, *arguments)
    assert "no/such-model" in failure(capsys, *arguments, "--overwrite")
    assert (tmp_path / "x.npz").read_text() == "mine"


def test_retrieval_without_classes_is_refused(tiny, photos, tmp_path, capsys):
    arguments = ["embed", photos, "--model", tiny, "--output", tmp_path / "x.npz", "--retrieval"]
    assert "no class folders" in failure(capsys, *arguments)


# Results in parts


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("earlier", [0, 4], ids=["from the start", "after a run alone"])
def test_run_in_parts_goes_on_after_kills_to_the_results_of_a_run_alone(tiny, tmp_path, form, earlier, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    save_pictures(folder, 21)
    (folder / "002.png").write_bytes(b"")
    (folder / "017.png").write_bytes(b"")
    os.rename(folder / "004.png", folder / 'a "b", c.png')
    output = tmp_path / "labels"
    # one at a time: in a batch of another size the last digits of a probability may differ
    arguments = ["predict", str(folder), "--model", str(tiny), "--format", form, "--output", str(output)]
    arguments += ["--batch-size", "1"]
    assert main(arguments) == 1
    whole, said = output.read_bytes(), capsys.readouterr().err.splitlines()
    lines = whole.splitlines(keepends=True)
    per_image = [i for i, line in enumerate(lines) if b",1," in line or b"predictions" in line or b"error" in line]
    output.write_bytes(b"".join(lines[: per_image[earlier]]) + lines[per_image[earlier]][:9] if earlier else b"")
    args = build_parser().parse_args([*arguments, "--resume"])
    for _ in range(2):  # two runs of several processes, of which only some blocks were done when they were killed
        with join_processes("cpu") as process:
            parts, _, images, _ = _begin_parts(args, image_sources(args.images), None, process)
        done = parts.mine[1::3]
        for block in done:
            names = [str(images[i]) for i in block]
            errors = [error.strip() for error in said if any(name in error for name in names)]
            with parts.new(block, errors) as part:
                part.write_bytes(b"".join(_results_of(lines, name, form) for name in names))
        (parts.folder / "x.tmp").write_text("torn")
    line = failure(capsys, *arguments)
    assert "exists; --resume" in line
    assert main([*arguments, "--resume"]) == 1
    assert output.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels", "photos"]
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(said)


def _results_of(lines: list[bytes], name: str, form: str) -> bytes:
    key = name.replace('"', '\\"' if form == "jsonl" else '""').encode()
    return b"".join(line for line in lines if key in line)


def test_parts_of_other_images_or_settings_are_refused(tiny, photos, tmp_path, capsys):
    output = tmp_path / "labels.jsonl"
    arguments = ["predict", str(photos), "--model", str(tiny), "--json", "--output", str(output), "--resume"]
    args = build_parser().parse_args(arguments)
    with join_processes("cpu") as process:
        _begin_parts(args, image_sources(args.images), None, process)
    assert "is of another run (top_k: 5 then, 3 now)" in failure(capsys, *arguments, "--top-k", "3")
    save_pictures(photos, 4)
    assert "is of another run (images: 3 then, 4 now)" in failure(capsys, *arguments)
    assert main([*arguments[:-1], "--overwrite"]) == 0
    assert output.read_bytes().count(b"\n") == 4
    assert not list(tmp_path.glob("*.parts"))


def torchrun(processes: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """A command in several processes of this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*start, "-m", "deit_models", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_three_processes_write_the_file_of_one(tiny, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    save_pictures(folder, 50)
    (folder / "007.png").write_bytes(b"")
    arguments = ["predict", str(folder), "--model", str(tiny), "--format", "csv", "--batch-size", "1"]
    assert main([*arguments, "--output", str(tmp_path / "alone.csv")]) == 1
    said = capsys.readouterr().err
    done = torchrun(3, *arguments, "--output", tmp_path / "shared.csv")
    assert done.returncode == 1, "of torchrun, as one image could not be read"
    assert said in done.stderr
    assert (tmp_path / "shared.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_evaluate_into_the_file_of_one(tmp_path, capsys):
    for number, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "data" / name).mkdir(parents=True)
        save_pictures(tmp_path / "data" / name, 6 + number)
    model = deit_models.create_model("deit_micro_patch4_32", num_classes=3, depth=1)
    model.save_pretrained(tmp_path / "model")
    arguments = ["evaluate", str(tmp_path / "model"), str(tmp_path / "data"), "--json", "--ignore-class-names"]
    assert main([*arguments, "--output", str(tmp_path / "alone.npz")]) == 0
    alone = json.loads(capsys.readouterr().out)
    done = torchrun(2, *arguments, "--output", tmp_path / "shared.npz")
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    assert shared.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-4)
    assert shared == alone
    with np.load(tmp_path / "alone.npz") as one, np.load(tmp_path / "shared.npz") as two:
        assert one["images"].tolist() == two["images"].tolist()
        assert len(one["images"]) == 21
        np.testing.assert_allclose(one["losses"], two["losses"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of torchrun as Linux lists them")
@pytest.mark.parametrize("command", ["predict", "embed", "evaluate"])
def test_rehearsal_finds_every_file_once_although_a_process_is_killed_twice(command):
    script = [sys.executable, ROOT / "benchmarks" / "rehearsal.py", "--files", "2000", "--command", command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, script)), env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2000 results, 2000 different, of 2000 files; in order: True" in done.stdout


def test_share_of_one_process_is_the_whole_and_joined_with_its_errors(tiny, photos, tmp_path):
    (photos / "001.png").write_bytes(b"")
    output = tmp_path / "labels.jsonl"
    args = build_parser().parse_args(["predict", str(photos), "--model", str(tiny), "--json", "--output", str(output)])
    with join_processes("cpu") as process:
        parts, classifier, images, before = _begin_parts(args, image_sources(args.images), None, process)
    errors = _predict_in_parts(args, parts, classifier, images, process)
    assert (before, [error.partition(":")[0] for error in errors]) == ([], [str(photos / "001.png")])
    assert len(output.read_text().splitlines()) == 3
