"""`deit-models export` and `bench`: what they write and say, and with which status."""

import json
import sys

import pytest
import torch
from command_line import NAMES, failure, usage_error

import deit_models
from deit_models.cli import main
from deit_models.deploy.runtimes import open_exported, read_metadata


def test_export_writes_a_file_and_says_how_well_it_agrees(tiny, tmp_path, capsys):
    path = tmp_path / "tiny.pt2"
    assert main(["export", str(tiny), str(path), "--preprocessing"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"wrote {path} (torch-export, 0.")
    assert "run and compared: logits differ by at most" in out
    assert err == ""
    assert tuple(read_metadata(path)["class_names"]) == NAMES
    model = deit_models.from_pretrained(tiny)
    pixels = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    spec = model.origin.preprocessing
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    with torch.no_grad():
        torch.testing.assert_close(open_exported(path)(pixels), model((1 - mean) / std * torch.ones(1, 3, 32, 32)))


def test_export_may_merge_tokens(tiny, tmp_path, capsys):
    path = tmp_path / "tiny.pt2"
    assert main(["export", str(tiny), str(path), "--token-merging", "3"]) == 0
    assert set(read_metadata(path)["token_merging"]) == {3}
    capsys.readouterr()


def test_export_as_json(tiny, tmp_path, capsys):
    path = tmp_path / "tiny.pt2"
    assert main(["export", str(tiny), str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["format"]) == (str(path), "torch-export")
    assert found["max_abs_diff"] <= found["tolerance"] == 1e-4


def test_export_for_the_browser_says_how_well_the_quantised_network_agrees(tiny, photos, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    assert photos
    judged = ["--images", str(tmp_path / "photos"), "--min-agreement", "0"]
    options = ["--format", "transformers.js", "--no-preprocessing", *judged]
    assert main(["export", str(tiny), str(tmp_path / "web"), *options]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"wrote {tmp_path / 'web'} (transformers.js, ")
    assert "model_quantized.onnx (" in out
    assert "of 3 images" in out
    assert err == ""
    assert json.loads((tmp_path / "web" / "preprocessor_config.json").read_text())["do_normalize"] is True


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("tiny", [], "or format='transformers.js' for a folder"),
        ("tiny.pt2", ["--min-agreement", "0.9"], "images and min_agreement are for format='transformers.js'"),
        ("tiny.pb", [], "tiny.pb: unknown kind of file; expected .onnx (onnx), .xml (openvino), .pt2 (torch-export)"),
        ("tiny.pt2", ["--format", "onnx"], "expected a name that ends in .onnx for format='onnx'"),
        ("tiny.pt2", ["--tolerance=-1"], "from the model's, -1 is allowed; not written"),
    ],
)
def test_export_explains_in_one_line_what_it_cannot_do(tiny, tmp_path, name, options, reason, capsys):
    assert reason in failure(capsys, "export", tiny, tmp_path / name, *options)
    assert list(tmp_path.glob("tiny*")) == []


def test_missing_library_is_named(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    line = failure(capsys, "export", tiny, tmp_path / "tiny.onnx")
    assert "writing ONNX needs onnx; pip install 'deit-models[export]'" in line


def test_unknown_format_is_wrong_usage(tiny, tmp_path, capsys):
    assert "invalid choice: 'tflite'" in usage_error(capsys, "export", tiny, tmp_path / "x", "--format", "tflite")


def test_bench_prints_a_table(capsys):
    short = ["--batch-sizes", "1", "2", "--backends", "model", "eager", "--precision", "float32", "--seconds", "0.01"]
    assert main(["bench", "deit_micro_patch4_32", *short]) == 0
    out, err = capsys.readouterr()
    rows = [line.split(" | ")[:3] for line in out.splitlines() if line.startswith("| ")][2:]
    assert rows == [[f"| {side}", "float32", n] for n in "12" for side in ("model", "eager")]
    assert err == ""


def test_bench_as_json(capsys):
    short = ["--batch-sizes", "1", "--backends", "model", "--seconds", "0.01", "--json"]
    assert main(["bench", "deit_micro_patch4_32", *short]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["backend"], row["batch_size"], row["error"]) == ("model", 1, None)


def test_bench_refuses_what_it_does_not_know(capsys):
    assert "deit_micro_patch4_32" in failure(capsys, "bench", "deit_mikro_patch4_32")
    assert "expected one of model, openvino" in failure(
        capsys, "bench", "deit_micro_patch4_32", "--backends", "tensorrt"
    )
    assert "expected 1 or more" in usage_error(capsys, "bench", "--batch-sizes", "0")
