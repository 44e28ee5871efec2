"""A whole run: what it leaves in its folder, and what it refuses."""

import logging
import re
import time
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import tiny
import torch
from safetensors.torch import load_file
from small_sets import fill
from torch import nn

import deit_models
from deit_models.augmentation.samples import TrainSampler
from deit_models.data.records import ArrayRecords
from deit_models.distributed import has_bf16
from deit_models.errors import ConfigError, DataError, MissingExtraError, SaveError, TrainingError
from deit_models.models.layers import ImageClassifier
from deit_models.recipes.recipe import read_recipe
from deit_models.scoring.evaluation import evaluate
from deit_models.training.run import TrainResult, train
from deit_models.training.state import read_log


def run(out: Path, network: nn.Module | None = None, /, **options: Any) -> TrainResult:
    changes = {
        key: options.pop(key)
        for key in list(options)
        if key in tiny.PLAIN or key in ("eval_every", "seed", "accumulate", "best_of")
    }
    options = {"train": tiny.Pictures(20), "workers": 0, "device": "cpu", **options}
    return train(network or tiny.model(), recipe=tiny.recipe(**changes), out=out, **options)


# ---- how long it goes on


def standing_still(tmp_path: Path, **changes: Any) -> TrainResult:
    still = {"lr": 0.0, "warmup_lr": 0.0, "min_lr": 0.0, "epochs": 12}
    options = {
        "train": tiny.Pictures(8),
        "val": tiny.Pictures(9, seed=1),
        "out": tmp_path,
        "workers": 0,
        "device": "cpu",
    }
    return train(tiny.model(), recipe=tiny.recipe(**still, **changes), **options)


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    assert len(standing_still(tmp_path / "without").log) == 12
    first = standing_still(tmp_path / "with", patience=3)
    assert [row["epoch"] for row in first.log] == [0, 1, 2, 3]
    again = standing_still(tmp_path / "with", patience=3)
    assert again.log == first.log


def test_patience_counts_epochs_between_evaluations_too(tmp_path: Path) -> None:
    assert len(standing_still(tmp_path, patience=3, eval_every=2).log) == 6


def test_end_by_patience_is_saved(tmp_path: Path) -> None:
    first = standing_still(tmp_path, patience=3, save_every=10)
    assert tiny.state(tmp_path)["progress"]["epoch"] == 4
    assert standing_still(tmp_path, patience=3, save_every=10).log == first.log


def test_patience_needs_images_to_evaluate_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="patience=3 needs images to evaluate on"):
        train(tiny.model(), recipe=tiny.recipe(patience=3), train=tiny.Pictures(8), out=tmp_path / "run")


# ---- what it computes in


def test_precision_is_that_of_the_device_and_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    own = "bf16" if has_bf16(torch.device("cpu")) else "float32"
    result = run(tmp_path, precision="auto")
    assert [row["precision"] for row in result.log] == [own] * 3
    assert read_recipe(tmp_path / "recipe.toml").precision == own
    assert f"precision='auto' is {own} on cpu" in caplog.messages


@pytest.mark.parametrize(("before", "after"), [("bf16", "float32"), ("float32", "bf16"), ("fp16", "bf16")])
def test_run_goes_on_in_another_precision_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: str, after: str
) -> None:
    run(tmp_path, precision=before, epochs=2)
    result = run(tmp_path, precision=after, epochs=3, accumulate=2)
    assert [row["precision"] for row in result.log] == [before, before, after]
    (line,) = [text for text in caplog.messages if "goes on" in text]
    assert f"precision='{before}' (now '{after}')" in line
    assert "accumulate=1 (now 2)" in line


# ---- what it leaves


def test_folder_holds_recipe_log_state_and_models(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    model = tiny.model(distilled=True)
    result = run(tmp_path / "new" / "run", model, ema_decay=0.5, val=tiny.Pictures(9, seed=1), on_epoch=rows.append)
    out = tmp_path / "new" / "run"
    assert result.out == out
    files = {"recipe.toml", "log.jsonl", "last.pt", "report.html"}
    assert {path.name for path in out.iterdir()} == files | {"model", "best", "ema"}
    assert read_recipe(out / "recipe.toml") == tiny.recipe(ema_decay=0.5)
    assert rows == result.log == read_log(out / "log.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert (result.top1, result.best_top1) == (rows[-1]["top1"], max(row["top1"] for row in rows))
    last = rows[-1]
    assert {"lr", "loss", "seconds", "images_per_second", "unreadable", "val_loss", "top5"} < last.keys()
    assert {"class_top1", "distillation_top1", "ema_top1", "ema_class_top1"} < last.keys()
    assert (last["val_images"], last["val_unreadable"], last["unreadable"]) == (9, 0, 0)
    assert last["lr"] == pytest.approx(1e-5 + (0.01 - 1e-5) * 0.5 * (1 + torch.cos(torch.tensor(2.5 / 3 * torch.pi))))
    assert not model.training


def test_exported_models_load_with_names_and_accuracy(tmp_path: Path) -> None:
    val, model = tiny.Pictures(9, seed=1), tiny.model()
    result = run(tmp_path, model, ema_decay=0.5, val=val)
    images = torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    for name, top1 in (("model", "top1"), ("best", None), ("ema", "ema_top1")):
        loaded = deit_models.from_pretrained(tmp_path / name)
        assert loaded.origin.class_names == ("kind 0", "kind 1", "kind 2")
        assert loaded.origin.dataset == "noise"
        assert loaded.origin.top1 == (result.log[-1][top1] if top1 else result.best_top1)
        assert evaluate(loaded, val, workers=0, device="cpu").top1 == pytest.approx(loaded.origin.top1, abs=1e-3)
        if name == "model":
            torch.testing.assert_close(loaded(images), model(images))
        else:
            assert not torch.equal(loaded(images), model(images))


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_best_is_the_best_epoch_and_its_card_tells_its_accuracy(tmp_path: Path) -> None:
    model, weights = tiny.model(embed_dim=32), []
    # learning spoils the validation figure, or begins to: so epochs differ
    options = {"train": tiny.Pictures(48), "val": tiny.Pictures(48, shift=1), "epochs": 6, "seed": 3}
    result = run(tmp_path, model, **options, on_epoch=lambda _: weights.append(weights_of(model)))
    top1 = [row["top1"] for row in result.log]
    assert result.best_epoch == top1.index(max(top1))
    assert result.best_epoch != 5
    tiny.same_bits(load_file(tmp_path / "best" / "model.safetensors"), weights[result.best_epoch])
    tiny.same_bits(load_file(tmp_path / "model" / "model.safetensors"), weights[-1])
    for name, figure in (("best", max(top1)), ("model", top1[-1])):
        card = (tmp_path / name / "README.md").read_text()
        assert f"{figure} % top-1" in card
        assert "Weights: trained with deit-models\n- Trained on: noise\n" in card


def test_best_may_be_the_averages(tmp_path: Path) -> None:
    options = {"train": tiny.Pictures(48), "val": tiny.Pictures(48, shift=1), "epochs": 6, "seed": 3}
    result = run(tmp_path, tiny.model(embed_dim=32), **options, ema_decay=0.8, best_of="ema")
    plain, averaged = ([row[f"{prefix}top1"] for row in result.log] for prefix in ("", "ema_"))
    assert max(averaged) != max(plain)
    assert (result.best_epoch, result.best_top1) == (averaged.index(max(averaged)), max(averaged))
    loaded = deit_models.from_pretrained(tmp_path / "best")
    assert loaded.origin.top1 == max(averaged)
    assert evaluate(loaded, options["val"], workers=0, device="cpu").top1 == pytest.approx(max(averaged), abs=1e-3)


def test_card_of_best_follows_a_better_epoch(tmp_path: Path) -> None:
    pictures = tiny.Pictures(16)
    result = run(tmp_path, tiny.model(embed_dim=32), train=pictures, val=pictures, epochs=12)
    assert result.best_epoch > 0
    assert f"{result.best_top1} % top-1" in (tmp_path / "best" / "README.md").read_text()


def test_evaluation_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    result = run(tmp_path, val=tiny.Pictures(5), epochs=5, eval_every=2)
    assert [row["epoch"] for row in result.log if "top1" in row] == [1, 3, 4]
    assert result.best_epoch in (1, 3, 4)


def test_without_validation_there_are_no_figures_and_no_best(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert (result.top1, result.best_top1, result.best_epoch) == (None, None, None)
    assert not (tmp_path / "best").exists()
    assert deit_models.from_pretrained(tmp_path / "model").origin.top1 is None


def test_what_a_pretrained_start_said_of_itself_is_not_handed_on(tmp_path: Path) -> None:
    run(tmp_path / "first", val=tiny.Pictures(5))
    start = deit_models.from_pretrained(tmp_path / "first" / "model").train()
    assert start.origin.top1 is not None
    assert start.origin.source is not None
    run(tmp_path / "second", start)
    assert start.origin.top1 is None
    assert (start.origin.source, start.origin.sha256, start.origin.revision) == (None, None, None)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 192), nn.Linear(192, 3))
    model[3].weight = model[1].weight
    return model


def test_foreign_module_is_written_as_its_state_dict(tmp_path: Path) -> None:
    model = tied()
    result = run(tmp_path, model, preprocessing=tiny.PREPROCESSING, val=tiny.Pictures(9))
    assert result.top1 is not None
    for name in ("model", "best"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["model.safetensors"]
    written = load_file(tmp_path / "model" / "model.safetensors")
    tiny.same_bits(written, dict(model.state_dict()))
    tied().load_state_dict(written)


def test_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = run(tmp_path, val=tiny.Pictures(9))
    model, rows = tiny.model(seed=5), []
    again = run(tmp_path, model, val=tiny.Pictures(9), on_epoch=rows.append)
    assert rows == []
    assert again == first
    tiny.same_bits(dict(model.state_dict()), load_file(tmp_path / "model" / "model.safetensors"))
    (tmp_path / "log.jsonl").unlink()
    assert run(tmp_path, val=tiny.Pictures(9)).best_top1 == first.best_top1


def test_each_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    pictures, orders = tiny.Pictures(20), []

    def note(_: dict[str, Any]) -> None:
        orders.append(tuple(pictures.read))
        pictures.read.clear()

    run(tmp_path, train=pictures, seed=6, on_epoch=note)
    sampler, expected = TrainSampler(20, batch_size=8, seed=6), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected.append(tuple(index for index, _ in sampler))
    assert orders == expected
    assert len(set(orders)) == 3


def test_seed_decides_and_leaves_nothing_to_chance(tmp_path: Path) -> None:
    results = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number + 100)
        results.append(run(tmp_path / str(number), seed=seed, mixup=0.8, drop_path_rate=0.3).log[-1]["loss"])
    assert results[0] == results[1] != results[2]


# ---- TensorBoard


def test_tensorboard_has_each_epoch_once_also_after_an_interruption(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    class StoppedError(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(tmp_path, val=tiny.Pictures(9), tensorboard=True, on_epoch=stop)
    time.sleep(1.1)  # TensorBoard orders event files by the second in their names
    result = run(tmp_path, val=tiny.Pictures(9), tensorboard=True)
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    for name in ("loss", "lr", "top1", "val_loss"):
        assert [(event.step, event.value) for event in board.Scalars(name)] == [
            (row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in result.log
        ]


def test_tensorboard_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deit-models\[train\]'"):
        run(tmp_path, tensorboard=True)


# ---- damaged images


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_training_images_are_counted_and_named_once(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path, train=tiny.Pictures(24, broken=(3, 17)), epochs=2, workers=workers)
    assert [row["unreadable"] for row in result.log] == [2, 2]
    named = [record.message for record in caplog.records if "cannot be read" in record.message]
    assert sorted(named) == [f"skipped an image that cannot be read: image {index} of noise" for index in (17, 3)]


def test_unreadable_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(8):
        file = tmp_path / "data" / "train" / f"kind {number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (9, 9), (30 * number, 0, 99)).save(file)
    file.write_bytes(file.read_bytes()[:40])
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path / "out", tiny.model(num_classes=2), train=tmp_path / "data", epochs=2)
    assert result.log[-1]["unreadable"] == 1
    assert str(file) in caplog.text
    assert deit_models.from_pretrained(tmp_path / "out" / "model").origin.class_names == ("kind 0", "kind 1")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("broken", [range(0, 40, 4), range(40)])
def test_too_many_unreadable_images_stop_the_run(broken: range, workers: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        run(tmp_path, train=tiny.Pictures(40, broken=broken), workers=workers)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "last.pt").exists()


def test_limit_of_unreadable_images_is_an_option(tmp_path: Path) -> None:
    result = run(tmp_path, train=tiny.Pictures(40, broken=range(0, 40, 4)), corrupt_limit=0.25)
    assert result.log[-1]["unreadable"] == 10


# ---- what stops it, in one line


class Renamed(tiny.Pictures):
    def __init__(self, count: int, names: tuple[str, ...]) -> None:
        super().__init__(count, classes=len(names))
        self.classes = names


FOREIGN = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"val": Renamed(9, ("kind 0", "kind 1", "other"))}, DataError, "missing kind 2; not in training other"),
        ({"val": "nowhere/val"}, DataError, "nowhere/val: no such folder"),
        ({"train": tiny.Pictures(9, classes=4)}, DataError, "the training set has 4 classes, the model 3"),
        ({"img_size": 16}, ConfigError, "img_size=16, the model takes"),
        ({"distillation": "hard"}, TrainingError, "needs a teacher"),
        ({"teacher": FOREIGN}, TrainingError, "distillation='none'"),
        ({"device": "cuda:99"}, ConfigError, "process 0 has no GPU 99: there are"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    options: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    recipe = tiny.recipe(**{key: options[key] for key in ("img_size", "distillation") if key in options})
    given = {key: options[key] for key in ("train", "val", "teacher", "device") if key in options}
    with pytest.raises(error, match=text) as caught:
        train(tiny.model(), recipe=recipe, out=tmp_path / "out", **{"train": tiny.Pictures(9), "workers": 0, **given})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_model_built_by_hand_must_say_what_its_input_looks_like(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say how its input is normalised"):
        run(tmp_path, FOREIGN)
    model: ImageClassifier = tiny.model()
    model.origin = None
    run(tmp_path, model, preprocessing=tiny.PREPROCESSING, epochs=2)
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere/run"])
def test_folder_that_cannot_be_written_is_refused_before_training(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    rows: list[dict[str, Any]] = []
    with pytest.raises(SaveError, match=r"cannot write .*(file|proc)") as caught:
        run(tmp_path / place, on_epoch=rows.append)
    assert "\n" not in str(caught.value)
    assert rows == []


def test_divergence_names_the_last_good_state(tmp_path: Path) -> None:
    model = tiny.model()

    def spoil(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            with torch.no_grad():
                model.head.weight.fill_(torch.nan)

    with pytest.raises(TrainingError, match=r"no longer a number at step 1 of epoch 2 .learning rate") as caught:
        run(tmp_path, model, on_epoch=spoil)
    assert f"the last good weights, of epoch 1, are in {tmp_path / 'last.pt'}" in str(caught.value)
    saved = tiny.state(tmp_path)
    assert saved["progress"]["epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    with pytest.raises(TrainingError, match="epoch 0") as caught:
        run(tmp_path / "other", lr=1e30, warmup_epochs=0)
    assert "last good" not in str(caught.value)


# ---- other channel counts


class Bands(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images of a satellite, one of them damaged."""

    classes = ("field", "wood")

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        channels = 7 if index == 3 else self.channels
        return torch.rand(channels, tiny.SIZE, tiny.SIZE, generator=generator), index % 2


def network(channels: int) -> ImageClassifier:
    return deit_models.create_model(
        "deit_micro_patch4_32", in_chans=channels, num_classes=2, depth=1, embed_dim=24, num_heads=2
    )


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_data_set_of_tensors_with_the_models_channels_is_trained_on_and_scored(tmp_path: Path, channels: int) -> None:
    changes = {"augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "epochs": 1, "warmup_epochs": 0}
    options: dict[str, Any] = {"train": Bands(channels), "corrupt_limit": 0.5, "workers": 0, "device": "cpu"}
    train(network(channels), recipe=tiny.recipe(**changes), out=tmp_path, **options)
    with pytest.raises(DataError, match=f"Bands: images of {channels} channels are not kept in memory; pass cache='no"):
        train(network(channels), recipe=tiny.recipe(**changes), out=tmp_path / "ram", cache="ram", **options)
    loaded = deit_models.from_pretrained(tmp_path / "model")
    assert len(loaded.origin.preprocessing.mean) == channels
    score = evaluate(loaded, Bands(channels), workers=0, device="cpu", corrupt_limit=0.5)
    assert (score.images, score.skipped) == (11, 1)


def test_folder_is_read_as_greys_for_one_channel_and_refused_for_five(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", images=4)
    options: dict[str, Any] = {
        "train": data,
        "val": data,
        "workers": 0,
        "device": "cpu",
        "recipe": tiny.recipe(epochs=1, warmup_epochs=0),
    }
    for cache in ("auto", "none"):
        assert train(network(1), out=tmp_path / cache, cache=cache, **options).log[0]["val_images"] == 8
        with pytest.raises(ConfigError, match=r"the model takes 5 channels, and image files are read as 3 or 1"):
            train(network(5), out=tmp_path / f"five {cache}", cache=cache, **options)


# ---- what cannot be


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"workers": -1}, "workers=-1; expected a whole number from 0 to 1024, or None"),
        ({"workers": 10**20}, "workers=100000000000000000000; expected a whole number from 0 to 1024"),
        ({"workers": 1.5}, "workers=1.5; expected a whole number"),
        ({"workers": True}, "workers=True; expected a whole number"),
        ({"cache": "rma"}, "cache='rma'; expected one of auto, ram, none"),
        ({"shard": "dpp"}, "shard='dpp'; expected one of ddp, fsdp"),
        ({"corrupt_limit": 3}, "corrupt_limit=3; expected a fraction from 0 to 1"),
        ({"corrupt_limit": float("nan")}, "corrupt_limit=nan; expected a fraction"),
        ({"tensorboard": "runs/"}, "tensorboard='runs/'; expected one of True, False"),
        ({"on_epoch": "print"}, "on_epoch='print'; expected a function"),
        ({"watch": 3}, "watch=3; expected a function"),
        ({"device": "gpu"}, "device='gpu'; expected a name such as 'cpu', 'cuda' or 'cuda:1'"),
        ({"recipe": {"epochs": 3}}, "recipe={'epochs': 3}; expected a Recipe, the name of a preset or a TOML file"),
        ({"recipe": "deit_30e"}, "unknown recipe 'deit_30e'; nearest: "),
    ],
)
def test_wrong_argument_is_one_line_before_anything_is_read(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"recipe": tiny.recipe(), "device": "cpu", **options}
    with pytest.raises(ConfigError, match=re.escape(text)):
        train(tiny.model(), train=tmp_path / "nowhere", out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_recipe_is_given_as_a_record_a_name_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.cfg").write_text(tiny.recipe(epochs=2).to_toml(), encoding="utf-8")
    pictures = tiny.Pictures(8)
    options: dict[str, Any] = {"train": pictures, "out": tmp_path / "out", "workers": 0, "device": "cpu"}
    assert len(train(tiny.model(), recipe=tmp_path / "mine.cfg", **options).log) == 2
    (tmp_path / "mine.xml").write_text("<recipe/>", encoding="utf-8")
    for given in (tmp_path / "mine.xml", str(tmp_path / "mine.xml")):
        with pytest.raises(ConfigError, match=r"mine\.xml: not TOML"):
            train(tiny.model(), recipe=given, **options)


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 4, "accumulate": 4}])
def test_one_image_a_pass_needs_a_model_without_batchnorm(tmp_path: Path, changes: dict[str, int]) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * tiny.SIZE**2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    options: dict[str, Any] = {"preprocessing": tiny.PREPROCESSING, "epochs": 2}
    with pytest.raises(ConfigError, match=r"BatchNorm.*raise batch_size or lower accumulate"):
        run(tmp_path / "out", network, **changes, **options)
    assert len(run(tmp_path / "out", network, batch_size=2, **options).log) == 2
    assert len(run(tmp_path / "without", **changes, epochs=2).log) == 2


def test_second_run_in_the_same_folder_ends_the_first(tmp_path: Path) -> None:
    def start_another(row: dict[str, Any]) -> None:
        if row["epoch"] == 0:
            run(tmp_path, epochs=4)

    with pytest.raises(TrainingError, match=r"another run writes into"):
        run(tmp_path, epochs=4, on_epoch=start_another)
    assert [row["epoch"] for row in read_log(tmp_path / "log.jsonl")] == [0, 1, 2, 3]


# ---- uneven classes and several labels


def test_several_labels_are_learned_by_a_binary_loss_and_the_best_map_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    val = tiny.Several(12, seed=4)  # by top-1 the first epoch would be the best
    result = run(tmp_path, train=tiny.Several(24), val=val, label_smoothing=0.1, ema_decay=0.5)
    assert "several labels an image: the loss is binary, each label for itself, without smoothing" in caplog.messages
    assert any(text.startswith("24 images, 3 classes: largest kind") for text in caplog.messages)
    kept = read_recipe(tmp_path / "recipe.toml")
    assert (kept.loss, kept.label_smoothing) == ("bce", 0.0)
    assert result.best_map == max(row["map"] for row in result.log)
    assert result.log[result.best_epoch]["map"] == result.best_map
    assert (result.map, "balanced_accuracy" in result.log[-1]) == (result.log[-1]["map"], False)
    for name in ("best", "model", "ema"):
        loaded = deit_models.from_pretrained(tmp_path / name)
        assert (loaded.origin.problem_type, loaded.origin.top1) == ("multi_label_classification", None)
        assert len(loaded.origin.thresholds) == 3
        found = evaluate(loaded, val, workers=0, device="cpu")
        if name == "best":
            assert found.map == pytest.approx(result.best_map, abs=1e-3)
            assert found.macro_f1 >= result.log[result.best_epoch]["macro_f1"]  # without the thresholds
            assert f"{found.map:.2f} % mAP" in (tmp_path / name / "README.md").read_text(encoding="utf-8")
    finished = run(tmp_path, train=tiny.Several(24), val=val, label_smoothing=0.1, ema_decay=0.5)
    assert finished == result  # and the thresholds are there again
    assert deit_models.from_pretrained(tmp_path / "model").origin.thresholds is not None


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_several_labels_come_from_memory_as_from_files(cache: str, tmp_path: Path) -> None:
    paths = sorted(fill(tmp_path / "photos").rglob("*.png"))
    files = [(str(path), ["a", "b"] if number % 2 else []) for number, path in enumerate(paths)]
    options = {"train": files * 4, "val": files, "epochs": 2, "cache": cache, "mixup": 0.8}
    found = run(tmp_path / "run", tiny.model(num_classes=2), **options).log
    other = run(tmp_path / "other", tiny.model(num_classes=2), **{**options, "cache": "auto"}).log
    assert [row["loss"] for row in found] == [row["loss"] for row in other]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": tiny.recipe(distillation="hard"), "teacher": tiny.model()}, "distillation='hard' needs one class"),
        ({"val": tiny.Pictures(9)}, "images of noise have several labels, those of noise one class"),
    ],
)
def test_labels_that_do_not_fit_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"recipe": tiny.recipe(), "train": tiny.Several(9), "workers": 0, "device": "cpu", **options}
    with pytest.raises((ConfigError, DataError), match=re.escape(message)):
        train(tiny.model(), out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


class Uneven(tiny.Pictures):
    """Twenty dark pictures, and two light ones: brightness is the class."""

    def __init__(self, seed: int = 0, most: int = 20) -> None:
        super().__init__(most + 2, classes=2, seed=seed)
        labels = [0] * most + [1] * 2
        levels = self.levels.numpy() // 4 + 140 * (torch.tensor(labels).numpy() > 0)[:, None, None, None]
        ArrayRecords.__init__(self, "uneven", levels.astype("uint8"), labels, ("dark", "light"))


@pytest.mark.parametrize("way", ["class_weights", "sampling"])
def test_balanced_training_recognises_the_small_class_sooner(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(out: Path, **changes: Any) -> TrainResult:
        settings = tiny.recipe(epochs=8, warmup_epochs=0, lr=1e-3, seed=3, **changes)
        pictures = {"train": Uneven(), "val": Uneven(seed=1, most=2)}
        return train(tiny.model(num_classes=2), recipe=settings, out=out, workers=0, device="cpu", **pictures)

    plain, balanced = trained(tmp_path / "plain"), trained(tmp_path / "balanced", **{way: "balanced"})
    advice = "22 images, 2 classes: largest dark (20), smallest light (2); class_weights='balanced' or"
    assert sum(text.startswith(advice) for text in caplog.messages) == 1
    scores = [sum(row["balanced_accuracy"] for row in result.log) for result in (balanced, plain)]
    assert scores[0] > scores[1]
