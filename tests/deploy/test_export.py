"""Exported files: written, run, compared, described; and what is refused."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import TINY, build, needs, normalised, pixels
from torch import Tensor

import deit_models
from deit_models import AgreementError, ConfigError, MissingExtraError, SaveError
from deit_models.deploy import export as exporting
from deit_models.deploy.hardware import Runner
from deit_models.deploy.network import prepare
from deit_models.deploy.runtimes import EXPORT_FORMATS, open_exported, read_metadata
from deit_models.models.deit import DeiT, DeiTConfig

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "torch-export": ()}


@pytest.fixture(params=EXPORT_FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    needs(*NEEDS[request.param])
    return request.param


@torch.inference_mode()
def test_file_gives_the_models_logits_for_other_batch_sizes(kind: str, tmp_path: Path) -> None:
    model = build("distilled")
    path = tmp_path / f"model{EXPORT_FORMATS[kind].suffix}"
    done = deit_models.export(model, path, format=kind)
    assert (done.path, done.format, done.tolerance) == (path, kind, 1e-4)
    assert done.max_abs_diff <= 1e-4
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == (["model.bin", "model.xml"] if kind == "openvino" else [path.name])
    assert done.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    run = open_exported(path)
    for count in (1, 5):
        x = normalised(model, pixels(count))
        torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_file_with_preprocessing_takes_pixels(kind: str, tmp_path: Path) -> None:
    model = build("levit")
    path = tmp_path / f"model{EXPORT_FORMATS[kind].suffix}"
    deit_models.export(model, path, format=kind, preprocessing=True)
    expected = model(normalised(model, pixels(4)))
    torch.testing.assert_close(open_exported(path)(pixels(4)), expected, atol=1e-4, rtol=0)


def test_file_tells_class_names_and_transform(kind: str, tmp_path: Path) -> None:
    model = build("deit")
    model.origin = replace(model.origin, class_names=("ant", "bee", "猫", 'a "b"', "&c"), licence="Apache-2.0")
    path = tmp_path / f"model{EXPORT_FORMATS[kind].suffix}"
    deit_models.export(model, path, format=kind, preprocessing=True)
    found = read_metadata(path)
    assert found["class_names"] == ["ant", "bee", "猫", 'a "b"', "&c"]
    assert found["preprocessing"] == json.loads(json.dumps(model.origin.preprocessing.to_dict()))
    assert (found["model"], found["pixels"], found["input"]) == ("deit_tiny_patch16_224", True, [3, 64, 64])
    assert found["licence"] == "Apache-2.0"


@torch.inference_mode()
def test_onnx_input_has_the_name_other_programs_feed_and_files_with_another_name_run(tmp_path: Path) -> None:
    """Earlier versions called it "images", other programs call it as they like."""
    needs(*NEEDS["onnx"])
    import onnx

    model, path = build("one block"), tmp_path / "m.onnx"
    deit_models.export(model, path)
    file, x = onnx.load(path), normalised(model, pixels(3))
    assert [entry.name for entry in (*file.graph.input, *file.graph.output)] == ["pixel_values", "logits"]
    before = "pixel_values"
    for name in ("images", "input", "x.1"):
        for node in file.graph.node:
            node.input[:] = [name if entry == before else entry for entry in node.input]
        file.graph.input[0].name = before = name
        onnx.save(file, path)
        torch.testing.assert_close(open_exported(path)(x), model(x), atol=1e-4, rtol=0)
        assert read_metadata(path)["input"] == [3, 64, 64]


def test_vanishing_random_features_are_no_nan_in_a_file(tmp_path: Path) -> None:
    """A Performer's sums of features become zero for large queries; 1e-8 in the divisor makes 0 of 0 / 0."""
    needs(*NEEDS["onnx"])
    model = build("t2t_vit")
    with torch.no_grad():
        model.tokens_to_token.attention1.kqv.weight.mul_(3)
    assert deit_models.export(model, tmp_path / "m.onnx", tolerance=1e-3).max_abs_diff <= 1e-3


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("takes_pixels", [False, True])
def test_every_family_goes_through_torch_export(shape: str, takes_pixels: bool, tmp_path: Path) -> None:
    done = deit_models.export(
        build(shape), tmp_path / "m.pt2", format="torch-export", preprocessing=takes_pixels, tolerance=1e-3
    )
    assert done.path.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("shape", TINY)
def test_every_family_goes_through_every_format(shape: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"m{EXPORT_FORMATS[kind].suffix}"
    assert deit_models.export(build(shape), path, format=kind, tolerance=1e-3).max_abs_diff <= 1e-3


def test_shipped_checkpoint_goes_out_and_comes_back_with_its_names(tmp_path: Path) -> None:
    model = deit_models.from_pretrained("deit_micro_patch4_32")
    done = deit_models.export(model, tmp_path / "micro.pt2", format="torch-export", preprocessing=True)
    assert read_metadata(done.path)["class_names"][:2] == ["airplane", "automobile"]


@pytest.mark.parametrize(
    ("suffix", "libraries"), [("onnx", ("onnxscript", "onnxruntime")), ("xml", ("openvino",)), ("pt2", ())]
)
@torch.inference_mode()
def test_files_merge_too_and_say_so(suffix: str, libraries: tuple[str, ...], tmp_path: Path) -> None:
    needs(*libraries)
    model, path = build("distilled"), tmp_path / f"model.{suffix}"
    kind = {"onnx": "onnx", "xml": "openvino", "pt2": "torch-export"}[suffix]
    done = deit_models.export(model, path, token_merging=(3, 1), preprocessing=True)
    assert done.format == kind, "by the suffix"
    expected = prepare(model, fold=False, plan=(3, 1))(normalised(model, pixels(5)))
    torch.testing.assert_close(open_exported(path)(pixels(5)), expected, atol=1e-4, rtol=0)
    assert read_metadata(path)["token_merging"] == [3, 1]


# Refusals


def write_with(answer: Callable[[Tensor], Tensor], path: Path) -> None:
    """Export, to a runtime whose logits are changed."""
    real = EXPORT_FORMATS["torch-export"]

    def wrong(file: Path) -> Runner:
        run = real.open(file)
        return lambda images: answer(run(images))

    exporting._write(build("deit"), path, real._replace(open=wrong), pixels=False, tolerance=1e-4, plan=())


def test_wrong_logits_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_text("what was there before")
    with pytest.raises(
        AgreementError, match=r"model\.pt2: a logit differs by 0\.01 from the model's, 0\.0001 is allowed"
    ):
        write_with(lambda logits: logits + 0.01, tmp_path / "model.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "what was there before"


@pytest.mark.parametrize("answer", [lambda logits: logits * float("nan"), lambda logits: logits[:1]])
def test_no_numbers_and_a_fixed_batch_are_refused(answer: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    with pytest.raises(AgreementError, match="differs by nan"):
        write_with(answer, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("model.pt", "onnx", r"model\.pt: expected a name that ends in \.onnx for format='onnx'"),
        ("model.onnx", "openvino", r"ends in \.xml"),
        ("model.tflite", None, r"model\.tflite: unknown kind of file; expected \.onnx \(onnx\), \.xml \(openvino\)"),
        (
            "model.onnx",
            "onx",
            "format='onx'; expected one of onnx, openvino, torch-export, transformers.js; nearest: onnx",
        ),
    ],
)
def test_wrong_format_or_suffix_is_refused(name: str, kind: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        deit_models.export(build("deit"), tmp_path / name, format=kind)


@pytest.mark.parametrize(("name", "library"), [("onnx", "onnx"), ("onnx", "onnxscript"), ("openvino", "openvino")])
def test_missing_library_is_one_line_with_what_to_install(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"needs .*pip install 'deit-models\[export\]'"):
        deit_models.export(build("deit"), tmp_path / f"model{EXPORT_FORMATS[name].suffix}", format=name)
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"cannot write .*model\.pt2"):
        deit_models.export(build("deit"), tmp_path / "file" / "model.pt2", format="torch-export")


def test_model_built_by_hand_is_exported_but_not_with_preprocessing(tmp_path: Path) -> None:
    model = DeiT(DeiTConfig(img_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=3))
    done = deit_models.export(model, tmp_path / "m.pt2", format="torch-export")
    assert read_metadata(done.path)["class_names"] == ["class 0", "class 1", "class 2"]
    with pytest.raises(ConfigError, match="its normalisation is unknown"):
        deit_models.export(model, tmp_path / "m.pt2", format="torch-export", preprocessing=True)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_file_with_preprocessing_takes_pixels_of_other_channel_counts(channels: int, tmp_path: Path) -> None:
    model = deit_models.create_model("deit_micro_patch4_32", in_chans=channels, num_classes=5, depth=1).eval()
    path = tmp_path / "m.pt2"
    deit_models.export(model, path, format="torch-export", preprocessing=True)
    levels = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8)
    transform = deit_models.transform_for(model)
    with torch.inference_mode():
        expected = model(transform.to_input(levels))
    torch.testing.assert_close(open_exported(path)(levels), expected, atol=1e-4, rtol=0)
    assert len(read_metadata(path)["preprocessing"]["mean"]) == channels
