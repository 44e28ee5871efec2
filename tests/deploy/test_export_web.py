"""Folders for transformers.js: their files, their numbers in node, and what is refused."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_models import TINY, build, needs
from torch import Tensor

import deit_models
from deit_models import AgreementError, ConfigError
from deit_models.deploy import export as exporting
from deit_models.deploy.export import Exported
from deit_models.deploy.network import TransformLayer
from deit_models.deploy.runtimes import open_exported, read_metadata
from deit_models.models.deit import DeiT, DeiTConfig
from deit_models.models.layers import ImageClassifier

FILES = ["config.json", "onnx/model.onnx", "onnx/model_quantized.onnx", "preprocessor_config.json"]
NODE = os.environ.get("TRANSFORMERS_JS", "")
"""A folder in which `npm install @huggingface/transformers` was run."""
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and Path(NODE, "node_modules", "@huggingface", "transformers").is_dir()),
    reason="needs node, and TRANSFORMERS_JS=the folder where @huggingface/transformers is installed",
)


def write(model: ImageClassifier, folder: Path, **options: Any) -> Exported:
    """A folder, whatever its quantised network is worth: that of random weights is worth little."""
    needs("onnx", "onnxscript", "onnxruntime")
    return deit_models.export(model, folder, format="transformers.js", **{"min_agreement": 0, **options})


def files_of(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def photographs(folder: Path, count: int = 4) -> list[Path]:
    """JPEG files of several sizes: smooth colours with sharp edges."""
    paths = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        coarse = torch.randint(0, 256, (7, 9, 3), generator=generator).to(torch.uint8).numpy()
        image = Image.fromarray(coarse).resize((180 + 61 * index, 300 - 37 * index), Image.Resampling.HAMMING)
        paths.append(folder / f"{index}.jpg")
        image.save(paths[-1], quality=95)
    return paths


# The files


@torch.inference_mode()
def test_folder_holds_a_checked_network_and_a_quantised_one_for_any_batch(tmp_path: Path) -> None:
    model, web = build("distilled"), tmp_path / "a" / "web"
    done = write(model, web, preprocessing=False)
    assert files_of(web) == FILES
    assert (done.path, done.format, done.images) == (web, "transformers.js", 64)
    assert done.size_bytes == sum((web / name).stat().st_size for name in FILES)
    assert done.quantised_bytes == (web / FILES[2]).stat().st_size < (web / FILES[1]).stat().st_size
    for count in (1, 5):
        x = torch.randn(count, 3, 64, 64)
        torch.testing.assert_close(open_exported(web / FILES[1])(x), model(x), atol=1e-4, rtol=0)
        found = open_exported(web / FILES[2])(x)
        assert found.shape == (count, 5)
        assert 0 < (found - model(x)).abs().max() < 0.3 * model(x).std(), "8 bits are near, and not the same"
    assert read(web, "config.json")["model_type"] == "deit"
    assert read(web, "preprocessor_config.json")["resample"] == 1, "in node, lanczos alone reads every pixel"


@torch.inference_mode()
def test_network_resizes_and_crops_by_itself(tmp_path: Path) -> None:
    model = build("deit")
    write(model, tmp_path / "web")
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    assert not any(read(tmp_path / "web", "preprocessor_config.json")[step] for step in steps)
    file = tmp_path / "web" / FILES[1]
    assert read_metadata(file)["pixels"] is True
    whole = torch.nn.Sequential(TransformLayer(model.origin.preprocessing), model)
    for size in ((90, 200), (51, 40), (64, 64)):
        x = torch.rand(2, 3, *size) * 255
        torch.testing.assert_close(open_exported(file)(x), whole(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", ["levit", *(pytest.param(s, marks=pytest.mark.slow) for s in TINY if s != "levit")])
@torch.inference_mode()
def test_every_family_is_served_under_a_type_that_is_known(shape: str, tmp_path: Path) -> None:
    model = build(shape)
    model.origin = replace(model.origin, class_names=("ant", "bee", "猫", 'a "b"', "&c"))
    done = write(model, tmp_path, tolerance=1e-3)
    assert done.max_abs_diff <= 1e-3
    config = read(tmp_path, "config.json")
    assert config["model_type"] in ("deit", "vit")
    assert config["id2label"] == {"0": "ant", "1": "bee", "2": "猫", "3": 'a "b"', "4": "&c"}
    assert open_exported(tmp_path / FILES[2])(torch.full((1, 3, 70, 90), 99.0)).isfinite().all()


def test_transform_that_no_network_computes_is_left_to_transformers_js(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("one block")
    spec = replace(model.origin.preprocessing, resize=None)
    model.origin = replace(model.origin, preprocessing=spec)
    with pytest.raises(ConfigError, match="a network cannot compute 'no resize, centre crop 64x64'"):
        write(model, tmp_path / "web", preprocessing=True)
    assert not (tmp_path / "web").exists()
    write(model, tmp_path / "web")
    assert "will resize by its own filters" in caplog.text
    assert read(tmp_path / "web", "preprocessor_config.json")["do_resize"] is False


def test_transform_that_transformers_js_lacks_is_computed_by_the_network_or_refused(tmp_path: Path) -> None:
    model = build("one block")
    spec = replace(model.origin.preprocessing, resize=(70, 64), fit="cover")
    model.origin = replace(model.origin, preprocessing=spec)
    with pytest.raises(ConfigError, match="transformers has no transform like 'resize to cover 70x64"):
        write(model, tmp_path / "web", preprocessing=False)
    assert not (tmp_path / "web").exists()
    assert write(model, tmp_path / "web").max_abs_diff <= 1e-4


def test_images_of_ours_judge_the_quantised_network(tmp_path: Path) -> None:
    model = deit_models.from_pretrained("deit_micro_distilled_patch4_32")
    done = write(model, tmp_path / "web", images=photographs(tmp_path), min_agreement=0.75)
    assert done.images == 4
    assert done.agreement >= 0.75


@pytest.mark.parametrize("problem", ["multi_label_classification", "one logit"])
def test_labels_that_are_no_alternatives_keep_their_problem_type_and_are_told(
    problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("one block")
    if problem == "one logit":
        deit_models.adapt_head(model, num_classes=1)
    else:
        model.origin = replace(model.origin, problem_type=problem)
    write(model, tmp_path, preprocessing=False)
    assert "takes a softmax" in caplog.text
    assert read(tmp_path, "config.json").get("problem_type") == (problem if problem != "one logit" else None)


# In node

SCRIPT = """
import { env, pipeline, AutoModelForImageClassification, AutoProcessor, RawImage } from '@huggingface/transformers';
const [parent, folder, dtype, ...paths] = process.argv.slice(1);
env.allowRemoteModels = false;
env.localModelPath = parent;
const classify = await pipeline('image-classification', folder, { dtype });
const labels = [];
for (const path of paths) labels.push(await classify(path));
const model = await AutoModelForImageClassification.from_pretrained(folder, { dtype });
const processor = await AutoProcessor.from_pretrained(folder);
const scores = [];
for (const path of paths) {
  const { logits } = await model(await processor(await RawImage.read(path)));
  scores.push(logits.sigmoid().tolist()[0]);
}
console.log(JSON.stringify({ labels, scores }));
"""


def in_node(web: Path, dtype: str, paths: list[Path]) -> dict[str, Any]:
    """Labels of the pipeline and sigmoids of the logits, by transformers.js without a network."""
    command = ["node", "--input-type=module", "-e", SCRIPT, "--", str(web.parent), web.name, dtype, *map(str, paths)]
    done = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the shipped model, `web`, and photographs beside it."""
    folder = tmp_path_factory.mktemp("shipped")
    write(deit_models.from_pretrained("deit_micro_distilled_patch4_32"), folder / "web")
    return folder


@needs_node
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.02), ("q8", 0.1)])
def test_pipeline_in_node_gives_our_labels_and_probabilities(dtype: str, tolerance: float, shipped: Path) -> None:
    paths = photographs(shipped)
    results = deit_models.Classifier("deit_micro_distilled_patch4_32")(paths, top_k=10)
    for theirs, ours in zip(in_node(shipped / "web", dtype, paths)["labels"], results, strict=True):
        expected = {found.label: found.probability for found in ours.predictions}
        scores = [row["score"] for row in theirs]
        assert scores == pytest.approx([expected[row["label"]] for row in theirs], abs=tolerance)
        if dtype == "fp32":
            assert [row["label"] for row in theirs] == [found.label for found in ours.predictions[:5]]


@needs_node
@pytest.mark.parametrize(
    "shape", ["levit", *(pytest.param(s, marks=pytest.mark.slow) for s in ("t2t_vit", "vit_resnas", "deit3"))]
)
def test_pipeline_in_node_takes_families_it_has_no_type_for(shape: str, tmp_path: Path) -> None:
    model = build(shape)
    write(model, tmp_path / "web", tolerance=1e-3)
    paths = photographs(tmp_path, 2)
    found = in_node(tmp_path / "web", "fp32", paths)["labels"]
    ours = deit_models.Classifier(model)(paths, top_k=5)
    assert [row[0]["label"] for row in found] == [f"LABEL_{result.predictions[0].index}" for result in ours]


@needs_node
def test_sigmoids_in_node_are_the_probabilities_of_several_labels(shipped: Path) -> None:
    model, paths = deit_models.from_pretrained("deit_micro_distilled_patch4_32"), photographs(shipped)
    model.origin = replace(model.origin, problem_type="multi_label_classification")
    results = deit_models.Classifier(model)(paths, top_k=10)
    for theirs, ours in zip(in_node(shipped / "web", "fp32", paths)["scores"], results, strict=True):
        expected = [found.probability for found in ours.predictions]
        assert [theirs[found.index] for found in ours.predictions] == pytest.approx(expected, abs=0.02)


# Refusals


def changed(**facts: Any) -> ImageClassifier:
    model = build("one block")
    model.origin = replace(model.origin, **facts)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: changed(problem_type="regression"), r"problem_type='regression'; transformers\.js gives"),
        (lambda: deit_models.create_model("deit_micro_patch4_32", in_chans=1), "in_chans=1"),
        (lambda: deit_models.create_model("deit_micro_patch4_32", num_classes=0), "num_classes=0"),
        (lambda: DeiT(DeiTConfig(img_size=16, embed_dim=16, depth=1, num_heads=2)), "has no origin"),
    ],
)
def test_model_that_the_pipeline_cannot_serve_is_refused(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        deit_models.export(model(), tmp_path / "web", format="transformers.js")
    assert list(tmp_path.iterdir()) == []


def test_quantised_network_that_disagrees_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    x = torch.randn(50, 3, 64, 64)
    with pytest.raises(AgreementError, match=r"agree on 50 images, min_agreement=1\.01 is asked for"):
        exporting._write_web(build("one block"), tmp_path, False, images=x, least=1.01)
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    model, file = build("one block"), tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="is a file; expected a folder to write to"):
        deit_models.export(model, file, format="transformers.js")
    with pytest.raises(ConfigError, match=r"images and min_agreement are for format='transformers\.js'"):
        deit_models.export(model, tmp_path / "m.pt2", images=[file])
    with pytest.raises(ConfigError, match=r"min_agreement=90; expected a share from 0 to 1"):
        deit_models.export(model, tmp_path / "web", format="transformers.js", min_agreement=90)
    with pytest.raises(ConfigError, match="images is empty"):
        write(model, tmp_path / "web", images=[], preprocessing=False)


# The transform as a layer

SPEC = {"crop": (24, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


@pytest.mark.parametrize(
    "facts",
    [
        {"resize": 36},
        {"resize": 37, "rounding": "down", "interpolation": "bilinear"},
        {"resize": (30, 40)},
        {"resize": (29, 32), "fit": "cover"},
    ],
)
@pytest.mark.parametrize("size", [(90, 131), (131, 90), (20, 31), (37, 37)])
def test_layer_gives_the_pixels_of_the_evaluation_transform(facts: dict[str, Any], size: tuple[int, int]) -> None:
    spec = deit_models.checkpoint.Preprocessing(**SPEC, **facts)
    coarse = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(0)) * 255
    levels = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0].to(torch.uint8)
    found = TransformLayer(spec)(levels[None].float())
    assert found.shape == (1, 3, 24, 32)
    expected = deit_models.images.transforms.EvalTransform(spec)(levels)
    difference: Tensor = (found[0] - expected).abs() * torch.tensor(spec.std).view(3, 1, 1) * 255
    assert difference.max() <= 2
    assert difference.mean() <= 0.5
