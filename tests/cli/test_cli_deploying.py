"""`deit-models export`: what it writes and says, and with which status."""

import json
import sys

import pytest
import torch
from command_line import NAMES, failure, usage_error

import deit_models
from deit_models.cli import main
from deit_models.deploy.formats import open_exported, read_metadata


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


def test_export_as_json(tiny, tmp_path, capsys):
    path = tmp_path / "tiny.pt2"
    assert main(["export", str(tiny), str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["format"]) == (str(path), "torch-export")
    assert found["max_abs_diff"] <= found["tolerance"] == 1e-4


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
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
