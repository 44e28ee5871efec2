"""finetune: what learns, what comes out, what goes on after an interruption, and what bad input gets."""

import csv
import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from coloured import CLASSES, Counted, Mixed, atom, pixels, recipe, save_folders
from tracing import modules_run

import deit_models
from deit_models.data.datasets import DATASETS, wrap
from deit_models.errors import ConfigError, DataError, TrainingError
from deit_models.finetuning.finetune import PRESET_OF, recipe_for
from deit_models.recipes.presets import PRESETS
from deit_models.recipes.recipe import read_recipe


def finetune(out, *, model=None, mode="full", settings=None, **options):
    model = atom() if model is None else model
    return deit_models.finetune(
        model, out=out, mode=mode, recipe=recipe(**(settings or {})), workers=0, device="cpu", **options
    )


@pytest.fixture
def photos(tmp_path):
    return save_folders(tmp_path / "photos")


MODES = ["head", "full"]


# What learns


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    ("mode", "trained"),
    [
        ("full", ("",)),
        ("last-1", ("blocks.1", "norm", "head")),
        ("last-0", ("norm", "head")),
        ("head", ("head",)),
    ],
)
def test_mode_decides_which_parameters_change(tmp_path, photos, mode, trained, distilled):
    model = atom(distilled=distilled)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = finetune(tmp_path / "out", model=model, train=photos, mode=mode, settings={"lr": 0.01})
    for version in (result.model, deit_models.from_pretrained(tmp_path / "out" / "model")):
        for name, tensor in version.state_dict().items():
            same = tensor.shape == before[name].shape and torch.equal(tensor, before[name])
            assert same != name.startswith(trained), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_both_heads_of_a_distilled_model_learn_the_labels_without_a_teacher(tmp_path):
    result = finetune(
        tmp_path / "out",
        model=atom(distilled=True),
        train=Counted(60),
        val=Counted(30, seed=500),
        settings={"epochs": 12, "lr": 0.01, "label_heads": "class"},
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert min(rows[-1]["class_top1"], rows[-1]["distillation_top1"], result.metrics["val"]["top1"]) > 90
    assert read_recipe(tmp_path / "out" / "recipe.toml").label_heads == "both"


def test_teacher_speaks_to_the_distillation_head(tmp_path):
    teacher = deit_models.adapt_head(atom(seed=5), class_names=[f"kind {i}" for i in range(3)]).eval()
    with torch.no_grad():
        teacher.head.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))  # it says 1 to everything
    finetune(
        tmp_path / "out",
        model=atom(distilled=True),
        train=Counted(60),
        teacher=teacher,
        settings={"epochs": 8, "lr": 0.01, "distillation": "hard"},
    )
    last = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()][-1]
    assert last["distillation_top1"] == pytest.approx(100 / 3, abs=0.1)
    assert last["class_top1"] > 80


def test_size_and_warm_start_are_passed_on(tmp_path, photos):
    start = atom(num_classes=2)
    deit_models.adapt_head(start, class_names=("bee", "wasp"))
    with torch.no_grad():
        start.head.weight.fill_(0.125)
    settings = {"img_size": 32, "lr": 0.0, "warmup_lr": 0.0, "min_lr": 0.0}
    result = finetune(tmp_path / "out", model=start, train=photos, warm_start=True, settings=settings)
    assert result.model.config.img_size == 32
    assert [bool((row == 0.125).all()) for row in result.model.head.weight] == [False, True, False]


def test_model_may_be_a_folder(tmp_path, photos):
    atom().save_pretrained(tmp_path / "start")
    result = finetune(tmp_path / "out", model=tmp_path / "start", train=photos, mode="head")
    assert result.metrics["val"]["top1"] == 100


def test_head_mode_runs_functions_of_few_modules(photos, tmp_path):
    act = partial(deit_models.finetune, train=photos, mode="head", recipe=recipe(), workers=0, device="cpu")
    act(atom(), out=tmp_path / "before")  # everything is imported
    model = atom()
    passed = modules_run(lambda: act(model, out=tmp_path / "out"))
    assert {"finetuning.finetune", "finetuning.probe", "finetuning.report", "models.deit"} <= passed
    assert not passed & {"training.engine", "training.learner", "training.losses", "training.teacher", "hub.load"}
    # ten for the data, six that write three layouts, four of fine-tuning, three each of the model and of scoring
    passed = {name for name in passed if not name.startswith("show.")}  # the report, when all is done
    assert len(passed) <= 32, sorted(passed)


# Settings


def test_every_named_data_set_has_a_preset():
    assert set(PRESET_OF) == set(DATASETS)
    assert set(PRESET_OF.values()) | {"finetune"} <= set(PRESETS)


def test_facts_of_the_authors_answer():
    chosen = recipe_for(
        "cifar100", deit_models.create_model("deit_tiny_patch16_224", device="meta"), images=50_000, teacher=False
    )
    assert (chosen.optimizer, chosen.lr, chosen.batch_size, chosen.weight_decay) == ("nesterov", 0.01, 768, 1e-4)
    assert (chosen.peak_lr, chosen.epochs, chosen.erase, chosen.drop_path_rate) == (0.01, 1000, 0, 0)
    assert (chosen.augment, chosen.mixup, chosen.cutmix, chosen.repeats) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0, 3)
    assert chosen.crop == "random_resized"


def test_small_inputs_are_padded_and_cut_out():
    small = atom(img_size=32)
    assert recipe_for("cifar10", small, images=50_000, teacher=False).crop == "pad"
    assert recipe_for("cifar10", small, images=50_000, teacher=False, crop="simple").crop == "simple"
    assert recipe_for("cifar10", small, images=50_000, teacher=False, img_size=224).crop == "random_resized"


def test_coarser_classes_have_the_preset_of_their_set():
    for data, preset in (("inaturalist-2018:genus", "finetune_inaturalist"), ("my photos", "finetune")):
        assert recipe_for(data, atom(), images=50, teacher=False).preset == preset


@pytest.mark.parametrize(("images", "epochs"), [(50, 150), (640, 150), (3200, 30), (1920, 50), (10**6, 30)])
def test_few_images_get_more_epochs(images, epochs):
    assert recipe_for("photos", atom(), images=images, teacher=False).epochs == epochs


def test_short_run_has_a_short_warm_up():
    assert recipe_for("photos", atom(), images=50, teacher=False, epochs=2).warmup_epochs == 1
    assert recipe_for("photos", atom(), images=50, teacher=False, epochs=1).warmup_epochs == 0
    assert recipe_for("photos", atom(), images=50, teacher=False).warmup_epochs == 3


def test_teacher_turns_distillation_on():
    for distilled, where in ((True, "token"), (False, "class")):
        chosen = recipe_for("photos", atom(distilled=distilled), images=50, teacher=True)
        assert (chosen.distillation, chosen.distill_on) == ("hard", where)


# What comes out


@pytest.fixture(scope="module", params=MODES)
def finished(request, tmp_path_factory):
    """A finished run with pictures: (folder, result)."""
    pytest.importorskip("matplotlib", reason="the pictures need the extra [plot]")
    folder = tmp_path_factory.mktemp(request.param)
    train = save_folders(folder / "photos", ("ant", "bee|wasp", "夜の蛾"), 8)
    test = save_folders(folder / "test", ("ant", "bee|wasp", "夜の蛾"), 4, seed=100)
    out = folder / "out"
    return out, finetune(out, train=train, test=test, mode=request.param, plot=True)


def test_folder_holds_models_recipe_figures_and_pictures(finished):
    out, _ = finished
    names = {path.name for path in out.iterdir()}
    assert {"best", "model", "timm", "transformers", "recipe.toml", "metrics.json", "split.json"} <= names
    assert {"per_class_val.csv", "per_class_test.csv", "curves.png", "confusion.png", "mistakes.png"} <= names
    assert not [path for path in out.rglob("*.tmp")]
    for name in ("curves", "confusion", "mistakes"):
        with PIL.Image.open(out / f"{name}.png") as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("L").getcolors(256)) > 8  # something is drawn


def test_best_and_last_checkpoint_give_the_same_logits_everywhere(finished):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    out, result = finished
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name in ("best", "model"):
        ours = deit_models.from_pretrained(out / name)
        expected = ours(x)
        if name == "best":
            assert torch.equal(result.model(x), expected)
        with torch.no_grad():
            from_timm = timm.create_model(f"local-dir:{out / 'timm' / name}", pretrained=True).eval()
            assert (from_timm(x) - expected).abs().max() < 1e-4
            theirs = transformers.AutoModelForImageClassification.from_pretrained(out / "transformers" / name)
            assert (theirs(x).logits - expected).abs().max() < 1e-4
        labels = tuple(theirs.config.id2label[number] for number in range(3))
        assert labels == ours.origin.class_names == ("ant", "bee|wasp", "夜の蛾")
        assert tuple(from_timm.pretrained_cfg["label_names"]) == labels


def test_pipeline_of_transformers_answers_as_our_classifier(finished):
    transformers = pytest.importorskip("transformers")
    out, _ = finished
    photo = out.parent / "test" / "ant" / "00.png"
    theirs = transformers.pipeline("image-classification", str(out / "transformers" / "best"))(str(photo), top_k=3)
    ours = deit_models.Classifier(out / "best")(photo, top_k=3).predictions
    assert [row["label"] for row in theirs] == [prediction.label for prediction in ours]
    assert [row["score"] for row in theirs] == pytest.approx([prediction.probability for prediction in ours], abs=1e-3)


def test_metrics_are_those_of_the_saved_model(finished):
    out, result = finished
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == result.metrics
    measured = deit_models.evaluate(deit_models.from_pretrained(out / "best"), out.parent / "test", workers=0)
    assert metrics["test"]["top1"] == pytest.approx(measured.top1, abs=1e-3)
    assert metrics["test"]["loss"] == pytest.approx(measured.loss, abs=1e-3)
    assert (metrics["train_images"], metrics["val"]["images"], metrics["test"]["images"]) == (18, 6, 12)
    assert metrics["split"] == {"seed": 0, "fraction": 0.2}


def test_accuracy_by_class_adds_up(finished):
    out, result = finished
    with (out / "per_class_test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["ant", "bee|wasp", "夜の蛾"]
    assert [row["images"] for row in rows] == ["4"] * 3
    correct = sum(int(row["correct"]) for row in rows)
    assert result.metrics["test"]["top1"] == pytest.approx(100 * correct / 12, abs=1e-3)
    mean = sum(float(row["accuracy"]) for row in rows) / 3
    assert result.metrics["test"]["balanced_accuracy"] == pytest.approx(mean, abs=0.02)


@pytest.mark.parametrize("where", ["best", "timm/best", "transformers/best"])
def test_card_tells_data_settings_and_figures(finished, where):
    out, result = finished
    card = (out / where / "README.md").read_text(encoding="utf-8")
    assert "## Fine-tuning" in card
    assert "photos, 3 classes: 18 images for training, 6 for validation (set aside by class with seed 0" in card
    assert f"{result.metrics['test']['top1']:.2f} % top-1" in card
    assert ("L2 penalty" in card) == (result.metrics["mode"] == "head")
    assert str(out) not in card
    assert "started from | deit_micro_patch4_32" in card


def test_story_is_kept_when_the_model_is_loaded_and_saved_again(finished, tmp_path):
    out, _ = finished
    deit_models.from_pretrained(out / "best").save_pretrained(tmp_path / "again")
    assert "## Fine-tuning" in (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    deit_models.from_pretrained(out / "best", num_classes=2).save_pretrained(tmp_path / "other")
    assert "## Fine-tuning" not in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")


def test_last_weights_are_not_described_as_the_best(finished):
    out, result = finished
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert ("These are the last weights" in card) == (result.metrics["mode"] == "full")


def test_own_validation_folder_is_used_and_nothing_set_aside(tmp_path):
    save_folders(tmp_path / "photos" / "train")
    save_folders(tmp_path / "photos" / "val", count=2, seed=50)
    result = finetune(tmp_path / "out", train=tmp_path / "photos", mode="head")
    assert (result.metrics["train_images"], result.metrics["val"]["images"]) == (18, 6)
    assert result.metrics["split"] is None
    assert not (tmp_path / "out" / "split.json").exists()


def test_training_ends_when_nothing_gets_better(tmp_path, photos):
    settings = {"epochs": 50, "patience": 3, "lr": 0.0, "warmup_lr": 0.0, "min_lr": 0.0}
    result = finetune(tmp_path / "out", train=photos, settings=settings)
    assert result.metrics["epochs"] == 4
    assert result.metrics["best_epoch"] == 0
    again = finetune(tmp_path / "out", train=photos, settings=settings)
    assert again.metrics["epochs"] == 4


# Interruptions


@pytest.mark.parametrize("mode", ["full", "last-1"])
def test_interrupted_training_goes_on_to_the_same_weights(tmp_path, photos, mode):
    def interrupt(row):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    options = {"train": photos, "mode": mode, "settings": {"epochs": 3}}
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path / "broken", on_epoch=interrupt, **options)
    seen = []
    went_on = finetune(tmp_path / "broken", on_epoch=seen.append, **options)
    whole = finetune(tmp_path / "whole", **options)
    assert [row["epoch"] for row in seen] == [2]
    first, second = (deit_models.from_pretrained(tmp_path / run / "model").state_dict() for run in ("broken", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for key in ("val", "train_images", "best_epoch", "split"):
        assert went_on.metrics[key] == whole.metrics[key]


def test_folder_of_another_run_is_refused(tmp_path, photos):
    finetune(tmp_path / "out", train=photos)
    with pytest.raises(TrainingError, match=r"split\.json is the split of other images, or with another seed"):
        finetune(tmp_path / "out", train=photos, split_seed=1)
    with pytest.raises(TrainingError, match=r"was saved with trained=None \(now 'blocks.1"):
        finetune(tmp_path / "out", train=photos, mode="last-1")
    with pytest.raises(TrainingError, match="was saved with lr="):
        finetune(tmp_path / "out", train=photos, settings={"lr": 0.5})


# Bad input


@pytest.mark.parametrize("mode", MODES)
def test_corrupt_image_is_named_counted_and_passed_over(tmp_path, photos, mode, caplog):
    (photos / "bee" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    result = finetune(tmp_path / "out", train=photos, mode=mode, split_seed=1)
    assert str(photos / "bee" / "03.png") in caplog.text
    figures = result.metrics["val"]
    assert figures["images"] + figures["unreadable"] + result.metrics["train_images"] == 18


@pytest.mark.parametrize("mode", MODES)
def test_too_many_corrupt_images_end_the_run(tmp_path, photos, mode):
    for number in range(5):
        (photos / "bee" / f"{number:02}.png").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read, more than the limit of"):
        finetune(tmp_path / "out", train=photos, mode=mode)


def test_class_that_is_in_validation_alone_is_named(tmp_path, photos):
    save_folders(tmp_path / "val", (*CLASSES, "dodo"))
    with pytest.raises(DataError, match="not the 3 classes of the training set: not in training dodo"):
        finetune(tmp_path / "out", train=photos, val=tmp_path / "val")
    with pytest.raises(DataError, match="not in training dodo"):
        finetune(tmp_path / "out", train=photos, test=tmp_path / "val")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", MODES)
def test_class_with_one_image_is_learnt_and_not_validated(tmp_path, photos, mode, caplog):
    (photos / "dodo").mkdir()
    PIL.Image.fromarray(pixels(0, seed=7)).save(photos / "dodo" / "only.png")
    result = finetune(tmp_path / "out", train=photos, mode=mode)
    assert result.model.origin.class_names == (*CLASSES, "dodo")
    assert "1 of 4 classes have too few images to set one aside" in caplog.text
    assert "\ndodo,0,0,," in (tmp_path / "out" / "per_class_val.csv").read_text()
    split = json.loads((tmp_path / "out" / "split.json").read_text())
    assert "dodo/only.png" in split["train"]


@pytest.mark.parametrize("mode", MODES)
def test_grey_cmyk_alpha_palette_and_16_bit_images_are_images(tmp_path, photos, mode):
    for kind, suffix in (("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("1", "bmp")):
        for label, name in enumerate(CLASSES):
            PIL.Image.fromarray(pixels(label, seed=70)).convert(kind).save(photos / name / f"as_{kind}.{suffix}")
    grey = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    PIL.Image.fromarray(grey).save(photos / "ant" / "deep.png")
    result = finetune(tmp_path / "out", train=photos, mode=mode)
    assert result.metrics["val"]["unreadable"] == 0
    assert result.metrics["train_images"] + result.metrics["val"]["images"] == 18 + 18 + 1


@pytest.mark.parametrize("mode", MODES)
def test_windows_and_non_ascii_names(tmp_path, mode):
    pytest.importorskip("matplotlib", reason="the pictures need the extra [plot]")
    names = ("Ameisen & Käfer", r"C:\Bienen", "Лизун,\tтип", "夜の蛾 $x_1$")
    photos = save_folders(tmp_path / "Eigene Bilder" / "Фото (2)", names, 5)
    (photos / names[0] / "Thumbs.db").write_bytes(b"no image")
    (photos / "desktop.ini").write_text("[ViewState]")
    (photos / names[1] / "00.png").rename(photos / names[1] / "IMG 0001 (Kopie).PNG")
    result = finetune(tmp_path / "out folder", train=photos, mode=mode, plot=True)
    assert set(deit_models.from_pretrained(tmp_path / "out folder" / "best").origin.class_names) == set(names)
    split = json.loads((tmp_path / "out folder" / "split.json").read_text(encoding="utf-8"))
    assert all((photos / name).is_file() for name in split["train"] + split["val"])
    with (tmp_path / "out folder" / "per_class_val.csv").open(encoding="utf-8", newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} == set(names)
    assert result.metrics["val"]["images"] == 4


def test_class_folder_that_is_not_utf8_is_refused(tmp_path, photos):
    try:
        Path(photos / b"caf\xe9".decode(errors="surrogateescape")).mkdir()
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    with pytest.raises(DataError, match=re.escape(r"class folder b'caf\xe9' is not named in UTF-8; rename it")):
        finetune(tmp_path / "out", train=photos)


def test_empty_folder_and_empty_class_are_named(tmp_path, photos):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing: no class folders; expected one folder of images for each class"):
        finetune(tmp_path / "out", train=tmp_path / "nothing")
    (photos / "dodo").mkdir()  # without any file it would be passed over, with a warning
    (photos / "dodo" / "notes.txt").write_text("extinct")
    with pytest.raises(DataError, match="no images in class folder dodo"):
        finetune(tmp_path / "out", train=photos)
    with pytest.raises(DataError, match="no such folder"):
        finetune(tmp_path / "out", train=tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "head-only"}, "mode='head-only'; expected 'full', 'head', 'attention', or 'last-N'"),
        ({"mode": "last-2x"}, "expected 'full', 'head', 'attention', or 'last-N'"),
        ({"mode": "last-3"}, "mode='last-3': the model has 2 blocks; 'full' trains everything"),
        ({"mode": "head", "teacher": torch.nn.Identity()}, "mode='head' learns from the labels alone"),
        ({"model": torch.nn.Linear(3, 3)}, "a Linear is no model of this package; deit_models.train takes any module"),
        ({"val_fraction": 1.5}, "val_fraction=1.5; expected more than 0 and less than 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, photos, options, message):
    with pytest.raises(ConfigError, match=message):
        finetune(tmp_path / "out", train=photos, **options)
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib_is_said_before_anything_is_done(tmp_path, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(deit_models.MissingExtraError, match=r"pip install 'deit-models\[plot\]'"):
        finetune(tmp_path / "out", train=photos, plot=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_twenty_thousand_classes(tmp_path, mode):
    records = Many(24_000, 20_000)
    settings = {"epochs": 1, "batch_size": 128, "img_size": 16}
    result = finetune(
        tmp_path / "out", train=records, val=Many(20_000, 20_000), mode=mode, plot=True, settings=settings
    )
    assert result.model.num_classes == 20_000
    assert len((tmp_path / "out" / "per_class_val.csv").read_text().splitlines()) == 20_001
    assert deit_models.from_pretrained(tmp_path / "out" / "best").origin.class_names == records.classes


class Many(Counted):
    """One image for all classes, which is quick to make."""

    def __init__(self, count, classes):
        super().__init__(2)
        self.classes = tuple(f"species {number}" for number in range(classes))
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return PIL.Image.fromarray(self._images[index % 2]), self.label(index)

    def label(self, index):
        return index % len(self.classes)


# Several labels an image


@pytest.fixture
def mixed(tmp_path):
    sets = {"train": Mixed(120), "val": Mixed(60, seed=1), "test": Mixed(60, seed=2)}
    settings = {"epochs": 8, "lr": 0.01}
    return {
        mode: finetune(tmp_path / mode, model=atom(distilled=True), mode=mode, settings=settings, **sets)
        for mode in MODES
    }


def test_several_labels_are_learned_and_their_thresholds_travel(mixed, tmp_path):
    transformers = pytest.importorskip("transformers")
    for mode, result in mixed.items():
        figures = result.metrics["test"]
        assert figures["map"] > 85, mode
        assert "balanced_accuracy" not in figures
        origin = result.model.origin
        assert (origin.problem_type, origin.top1) == ("multi_label_classification", None)
        assert origin.thresholds[3] == 0.5  # of a label that no image has
        out = tmp_path / mode
        scored = deit_models.evaluate(deit_models.from_pretrained(out / "timm" / "best"), Mixed(60, seed=2), workers=0)
        assert scored.macro_f1 == pytest.approx(figures["macro_f1"], abs=0.01)
        with (out / "per_class_test.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["class"] for row in rows] == ["red", "green", "blue", "grey"]
        assert [float(row["threshold"]) for row in rows] == pytest.approx(origin.thresholds, rel=1e-4)
        assert (rows[3]["average_precision"], rows[3]["images"]) == ("", "0")
        card = (out / "best" / "README.md").read_text(encoding="utf-8")
        assert f"{figures['map']:.2f} % mAP" in card
        assert "They chose the threshold of each label" in card
        # transformers gives the same probabilities, and keeps the thresholds
        image = Mixed(60, seed=2)[0][0]
        theirs = transformers.pipeline("image-classification", str(out / "transformers" / "best"))
        assert theirs.model.config.problem_type == "multi_label_classification"
        assert theirs.model.config.thresholds == pytest.approx(origin.thresholds)
        expected = {row["label"]: row["score"] for row in theirs(image, function_to_apply="sigmoid", top_k=4)}
        again = deit_models.from_pretrained(out / "transformers" / "best")
        found = deit_models.Classifier(again)(image, top_k=4)
        assert {one.label: one.probability for one in found.predictions} == pytest.approx(expected, abs=1e-4)
        limits = dict(zip(again.origin.class_names, again.origin.thresholds, strict=True))
        assert found.labels == tuple(one.label for one in found.predictions if one.probability >= limits[one.label])
        assert len(deit_models.Classifier(again)(image, top_k=1).predictions) == 1
        assert deit_models.Classifier(again)(image, top_k=1).labels == found.labels


def test_pictures_of_several_labels_are_curves_alone(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    for mode in MODES:
        finetune(tmp_path / mode, mode=mode, train=Mixed(40), plot=True)
        assert {path.name for path in (tmp_path / mode).glob("*.png")} == {"curves.png"}
        assert (
            f"several labels an image have no confusion matrix; see per_class_*.csv in {tmp_path / mode}" in caplog.text
        )


def test_labels_of_another_kind_are_refused_before_anything_is_written(tmp_path):
    single = wrap(Counted(9, classes=4), Mixed(1).classes)
    for options, text in (
        ({"val": single}, "images of mixed have several labels, those of counted one class"),
        ({"settings": {"sampling": "balanced"}, "mode": "head"}, "without sampling='balanced'"),
        ({"settings": {"distillation": "soft"}, "teacher": atom(num_classes=4)}, "needs one class for each image"),
    ):
        with pytest.raises((ConfigError, DataError), match=re.escape(text)):
            finetune(tmp_path / "out", train=Mixed(30), **options)
    several = deit_models.finetune(atom(), train=Mixed(30), out=tmp_path / "a", mode="head", recipe=recipe(), workers=0)
    with pytest.raises(ConfigError, match="evaluation needs one class"):
        deit_models.evaluate(several.model, Counted(9, classes=4), ignore_class_names=True, workers=0)
    with pytest.raises(ConfigError, match="one class for each image, evaluation needs several labels"):
        deit_models.evaluate(atom(num_classes=4), Mixed(9), workers=0)


def test_multi_label_model_can_be_trained_further_and_re_made_for_one_class(tmp_path):
    first = deit_models.finetune(atom(), train=Mixed(40), out=tmp_path / "a", mode="head", recipe=recipe(), workers=0)
    second = finetune(tmp_path / "b", model=tmp_path / "a" / "best", train=Mixed(40, seed=3))
    assert second.model.origin.multi_label
    deit_models.adapt_head(first.model, img_size=32)
    assert first.model.origin.thresholds is not None
    third = finetune(tmp_path / "c", model=first.model, train=Counted(30))
    assert (third.model.origin.problem_type, third.model.origin.thresholds) == (None, None)


@pytest.mark.parametrize("mode", MODES)
def test_class_weights_are_noted_in_the_card(tmp_path, mode, caplog):
    finetune(tmp_path / "out", mode=mode, train=Counted(30), settings={"class_weights": "balanced"})
    assert "class_weights balanced" in (tmp_path / "out" / "best" / "README.md").read_text(encoding="utf-8")
    assert "may help" not in caplog.text
