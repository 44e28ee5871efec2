"""mode="head": each image read and sent through the backbone exactly once, kept on disk, the head fitted to the end."""

import json

import pytest
import torch
from coloured import Counted, Mixed, Unlabelled, atom, recipe, save_folders
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

import deit_models
from deit_models.data.datasets import open_dataset, wrap
from deit_models.distributed import Process
from deit_models.errors import ConfigError, DataError, TrainingError
from deit_models.finetuning.probe import STRENGTHS, Features, extract_features, fit_heads, judge, refit_heads
from deit_models.images.transforms import transform_for
from deit_models.models.transformer import PatchEmbed
from deit_models.scoring.metrics import count_classes
from deit_models.training.run import Computing

ALONE = Process(0, 1, torch.device("cpu"))


def extract(model, records, folder, *, process=ALONE, precision="float32", **computing):
    computing = Computing(**{"workers": 0, **computing})
    return extract_features(model, records, folder, process=process, precision=precision, computing=computing)


@pytest.fixture
def passes():
    """Counts the images through the backbone of any model, also of one that is rebuilt on the way."""
    seen = []

    def count(module, inputs):
        if isinstance(module, PatchEmbed):
            seen.append(len(inputs[0]))

    handle = register_module_forward_pre_hook(count)
    yield seen
    handle.remove()


# Once


@pytest.mark.parametrize("distilled", [False, True])
def test_each_image_is_read_and_sent_through_the_backbone_exactly_once(tmp_path, passes, distilled):
    train, test = Counted(90), Counted(30, seed=500)
    deit_models.finetune(
        atom(distilled=distilled), train=train, test=test, out=tmp_path / "out", mode="head", recipe=recipe(), workers=0
    )
    assert sorted(train.read) == list(range(90))
    assert sorted(test.read) == list(range(30))
    assert sum(passes) == 120


def test_that_holds_with_given_validation_images_and_with_labels_that_come_with_the_images(tmp_path, passes):
    train, val = Counted(60), Counted(30, seed=500)
    deit_models.finetune(
        atom(), train=Unlabelled(train), val=Unlabelled(val), out=tmp_path / "out", mode="head", workers=0
    )
    assert sorted(train.read) == list(range(60))
    assert sorted(val.read) == list(range(30))
    assert sum(passes) == 90


def test_second_call_reads_nothing_and_gives_the_same_model(tmp_path, passes):
    records, weights = Counted(60), []
    for _ in range(2):
        result = deit_models.finetune(
            atom(), train=records, out=tmp_path / "out", mode="head", recipe=recipe(), workers=0
        )
        weights.append(result.model.head.weight.detach().clone())
    assert len(records.read) == sum(passes) == 60
    assert torch.equal(*weights)


def test_interrupted_extraction_goes_on_with_the_images_that_are_left(tmp_path):
    records = Counted(2150)

    def interrupted(batches, _total):
        for number, batch in enumerate(batches):
            if number == 32 + 1:  # in the middle of the third shard
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        extract(atom(), records, tmp_path / "features", watch=interrupted)
    assert sorted(path.name for path in (tmp_path / "features").glob("*.safetensors")) == [
        "000000000.safetensors", "000001024.safetensors",
    ]  # fmt: skip
    records.read.clear()
    found = extract(atom(), records, tmp_path / "features")
    assert sorted(records.read) == list(range(2048, 2150))
    whole = extract(atom(), Counted(2150), tmp_path / "whole")
    assert torch.equal(found.inputs["head"], whole.inputs["head"])
    assert torch.equal(found.labels, whole.labels)


def test_damaged_shard_is_made_again(tmp_path, caplog):
    first = extract(atom(), Counted(20), tmp_path / "features")
    (tmp_path / "features" / "000000000.safetensors").write_bytes(b"not a shard")
    again = extract(atom(), Counted(20), tmp_path / "features")
    assert torch.equal(first.inputs["head"], again.inputs["head"])
    assert "its images are read again" in caplog.text


@pytest.mark.parametrize(("before", "after"), [("bf16", "float32"), ("float32", "bf16"), ("fp16", "float32")])
def test_features_go_on_in_another_precision_and_say_so(tmp_path, caplog, before, after):
    first = extract(atom(), Counted(20), tmp_path / "features", precision=before)
    again = extract(atom(), Counted(20), tmp_path / "features", precision=after)
    assert torch.equal(first.inputs["head"], again.inputs["head"])
    assert f"goes on in {after}; the features in it are in {before}" in caplog.text


def test_features_of_other_images_or_of_another_model_are_refused(tmp_path):
    photos = open_dataset(save_folders(tmp_path / "photos"), "train")
    extract(atom(), photos, tmp_path / "features")
    extract(atom(num_classes=3), photos, tmp_path / "features")  # the heads do not matter
    with pytest.raises(TrainingError, match="holds the features of other images, or of another model"):
        extract(atom(seed=1), photos, tmp_path / "features")
    (tmp_path / "photos/ant/00.png").write_bytes((tmp_path / "photos/bee/01.png").read_bytes() + b"\0")
    with pytest.raises(TrainingError, match="holds the features of other images"):
        extract(atom(), photos, tmp_path / "features")


# What is kept


@pytest.mark.parametrize("distilled", [False, True])
def test_features_are_what_the_heads_read(tmp_path, distilled):
    model, records = atom(distilled=distilled), Counted(10)
    found = extract(model, records, tmp_path / "features")
    assert model.training  # as it was
    model.eval()
    transform = transform_for(model)
    tokens = model.forward_features(torch.stack([transform(records[i][0]) for i in range(10)]))
    for place, (name, rows) in enumerate(found.inputs.items()):
        assert name == ("head", "head_dist")[place]
        assert torch.allclose(rows, tokens[:, place], atol=1e-6)
    assert len(found.inputs) == 1 + distilled
    assert found.labels.tolist() == [records.label(i) for i in range(10)]


def test_number_of_workers_changes_nothing(tmp_path):
    records = open_dataset(save_folders(tmp_path / "photos"), "train")
    alone = extract(atom(), records, tmp_path / "alone")
    helped = extract(atom(), records, tmp_path / "helped", workers=2)
    assert torch.equal(alone.inputs["head"], helped.inputs["head"])


def test_head_that_is_not_linear_is_refused(tmp_path):
    model = atom(num_classes=3)
    model.head = torch.nn.Sequential(model.head, torch.nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"head of DeiT is not one linear layer .* use mode='last-0' or 'full'"):
        extract(model, Counted(10), tmp_path / "features")


# The fit


def noise(count, classes=4, width=6, heads=("head",), seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    rows = {name: 3 + centres[labels] + 1.5 * torch.randn(count, width, generator=generator) for name in heads}
    return Features(rows, labels)


def test_fit_is_multinomial_logistic_regression_solved_to_convergence():
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, val = noise(300), noise(100, seed=1)
    fit = fit_heads(train, val, num_classes=4, device=ALONE.device)
    rows = train.inputs["head"]
    mean, std = rows.mean(0), rows.std(0, correction=0)
    theirs = linear_model.LogisticRegression(C=1 / (300 * fit.penalty), tol=1e-8, max_iter=10_000)
    theirs.fit(((rows - mean) / std).numpy(), train.labels.numpy())
    expected = torch.tensor(theirs.predict_proba(((val.inputs["head"] - mean) / std).numpy()))
    weight, bias = fit.weights["head"]
    ours = F.linear(val.inputs["head"], weight, bias).softmax(dim=1)
    assert (ours - expected).abs().max() < 2e-3


def test_last_fit_is_that_regression_on_all_images_with_the_chosen_penalty():
    linear_model = pytest.importorskip("sklearn.linear_model")
    every = noise(400)
    train, val = every.of(range(320)), every.of(range(320, 400))
    fit = fit_heads(train, val, num_classes=4, device=ALONE.device)
    again = refit_heads(fit, every, device=ALONE.device)
    assert (again.penalty, again.tried) == (fit.penalty, fit.tried)
    rows = every.inputs["head"]
    mean, std = rows.mean(0), rows.std(0, correction=0)
    theirs = linear_model.LogisticRegression(C=1 / (400 * fit.penalty), tol=1e-8, max_iter=10_000)
    theirs.fit(((rows - mean) / std).numpy(), every.labels.numpy())
    expected = torch.tensor(theirs.predict_proba(((rows - mean) / std).numpy()))
    found = [F.linear(rows, *by.weights["head"]).softmax(dim=1) for by in (again, fit)]
    assert (found[0] - expected).abs().max() < 2e-3 < (found[1] - expected).abs().max()


def test_last_fit_leaves_out_unreadable_images_and_the_number_of_threads_as_it_was():
    every, threads = noise(100), torch.get_num_threads()
    fit = fit_heads(every.of(range(80)), every.of(range(80, 100)), num_classes=4, device=ALONE.device)
    expected = refit_heads(fit, every.of(range(2, 100)), device=ALONE.device)
    every.labels[:2] = -1
    every.inputs["head"][0] = float("nan")
    found = refit_heads(fit, every, device=ALONE.device)
    assert torch.equal(found.weights["head"][0], expected.weights["head"][0])
    assert torch.get_num_threads() == threads


def test_penalty_is_the_one_with_the_best_validation_accuracy():
    train, val = noise(60), noise(400, seed=1)
    fit = fit_heads(train, val, num_classes=4, device=ALONE.device)
    assert [row["penalty"] for row in fit.tried] == list(STRENGTHS[: len(fit.tried)])
    best = max(fit.tried, key=lambda row: (row["top1"], -row["loss"]))
    assert fit.penalty == best["penalty"]
    assert 1 < len(fit.tried)
    assert judge(fit, val, device=ALONE.device).evaluation().top1 == pytest.approx(best["top1"], abs=1e-3)


def test_each_head_is_fitted_by_itself_and_judged_by_their_mean():
    both, val = noise(300, heads=("head", "head_dist")), noise(100, seed=1, heads=("head", "head_dist"))
    fit = fit_heads(both, val, num_classes=4, device=ALONE.device)
    for name in both.inputs:
        alone = Features({name: both.inputs[name]}, both.labels)
        single = fit_heads(alone, Features({name: val.inputs[name]}, val.labels), num_classes=4, device=ALONE.device)
        if single.penalty == fit.penalty:
            assert torch.allclose(single.weights[name][0], fit.weights[name][0], atol=1e-4)
    logits = [F.linear(val.inputs[name], *fit.weights[name]) for name in both.inputs]
    right = 100 * float((sum(logits).argmax(1) == val.labels).double().mean())
    assert judge(fit, val, device=ALONE.device).evaluation().top1 == pytest.approx(right)


def test_fit_in_small_pieces_is_the_same():
    train, val = noise(100), noise(50, seed=1)
    whole = fit_heads(train, val, num_classes=4, device=ALONE.device)
    pieces = fit_heads(train, val, num_classes=4, device=ALONE.device, cells=28)  # seven images at a time
    assert pieces.penalty == whole.penalty
    assert torch.allclose(pieces.weights["head"][0], whole.weights["head"][0], atol=1e-3)


def test_unvarying_features_do_no_harm():
    train, val = noise(100), noise(50, seed=1)
    for part in (train, val):
        part.inputs["head"][:, 2] = 7.0
    fit = fit_heads(train, val, num_classes=4, device=ALONE.device)
    assert all(torch.isfinite(tensor).all() for pair in fit.weights.values() for tensor in pair)


def test_features_that_are_no_numbers_and_missing_images_are_refused():
    train, val = noise(20), noise(10, seed=1)
    with pytest.raises(DataError, match="20 readable images for training, 0 for validation"):
        fit_heads(train, val.of([]), num_classes=4, device=ALONE.device)
    train.inputs["head"][3, 3] = float("nan")
    with pytest.raises(TrainingError, match="no head can be fitted"):
        fit_heads(train, val, num_classes=4, device=ALONE.device)


def test_accuracy_is_that_of_the_conventional_frozen_loop(tmp_path):
    train, val, test = (Counted(count, seed=seed, shift=28) for count, seed in ((150, 0), (150, 1000), (300, 2000)))
    head = deit_models.finetune(
        atom(), train=train, val=val, test=test, out=tmp_path / "head", mode="head", recipe=recipe(), workers=0
    )
    plain = {"crop": "none", "hflip": 0.0, "color_jitter": 0.0, "label_smoothing": 0.0, "layer_decay": 1.0}
    loop = deit_models.finetune(
        atom(),
        train=train,
        val=val,
        test=test,
        out=tmp_path / "loop",
        mode="last-0",
        recipe=recipe(epochs=25, batch_size=30, lr=0.01, weight_decay=0.0, **plain),
        workers=0,
    )
    ours, theirs = head.metrics["test"]["top1"], loop.metrics["test"]["top1"]
    assert 60 < theirs < 98  # neither hopeless nor trivial
    assert abs(ours - theirs) < 6  # two standard errors of 300 images are 4 to 5 points


@pytest.mark.parametrize("distilled", [False, True])
def test_model_is_fitted_to_images_set_aside_too_and_the_figures_are_from_before(tmp_path, distilled):
    records = Counted(150, shift=28)
    options = {"mode": "head", "recipe": recipe(), "workers": 0, "val_fraction": 0.3, "split_seed": 3}
    result = deit_models.finetune(atom(distilled=distilled), train=records, out=tmp_path / "out", **options)
    split = json.loads((tmp_path / "out" / "split.json").read_text(encoding="utf-8"))
    train, val = (list(map(int, split[part])) for part in ("train", "val"))
    every = extract(result.model, records, tmp_path / "again")
    before = fit_heads(every.of(train), every.of(val), num_classes=3, device=ALONE.device)
    after = refit_heads(before, every, device=ALONE.device)
    for name, (weight, bias) in after.weights.items():
        head = getattr(result.model, name)
        assert torch.allclose(head.weight, weight, atol=1e-4)
        assert torch.allclose(head.bias, bias, atol=1e-4)
        assert not torch.allclose(head.weight, before.weights[name][0], atol=1e-3)
    measured = judge(before, every.of(val), device=ALONE.device).evaluation()
    assert result.metrics["val"]["loss"] == pytest.approx(measured.loss, abs=1e-5)
    assert judge(after, every.of(val), device=ALONE.device).evaluation().loss != pytest.approx(measured.loss, abs=1e-3)
    assert (result.metrics["train_images"], result.metrics["fitted_images"]) == (len(train), 150)
    card = (tmp_path / "out" / "best" / "README.md").read_text(encoding="utf-8")
    assert "The head was then fitted again, with that penalty, to all 150 images" in card


def test_given_validation_images_are_not_fitted_to(tmp_path, caplog):
    train, val = Counted(60, shift=28), Counted(30, seed=500, shift=28)
    caplog.set_level("INFO")
    result = deit_models.finetune(
        atom(), train=train, val=val, out=tmp_path / "out", mode="head", recipe=recipe(), workers=0
    )
    assert (result.metrics["train_images"], result.metrics["fitted_images"]) == (60, 60)
    assert "fitted again" not in caplog.text + (tmp_path / "out" / "best" / "README.md").read_text(encoding="utf-8")
    measured = deit_models.evaluate(result.model, val, workers=0)
    assert result.metrics["val"]["loss"] == pytest.approx(measured.loss, abs=1e-4)


def test_several_processes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="mode='head' takes one process"):
        extract(atom(), Counted(30), tmp_path / "features", process=Process(0, 2, torch.device("cpu")))
    assert not (tmp_path / "features").exists()


def test_metrics_tell_what_was_tried(tmp_path):
    deit_models.finetune(atom(), train=Counted(60), out=tmp_path, mode="head", recipe=recipe(), workers=0)
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["penalty"] in [row["penalty"] for row in metrics["tried"]]
    assert metrics["val"]["images"] == 12
    assert metrics["train_images"] == 48


# Uneven classes and several labels


def sklearn_logits(features: torch.Tensor, labels: torch.Tensor, penalty: float, rows: torch.Tensor) -> torch.Tensor:
    """Logits of scikit-learn's logistic regression with balanced classes, on standardised features."""
    linear = pytest.importorskip("sklearn.linear_model")
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    options = {"class_weight": "balanced", "C": 1 / (penalty * len(labels)), "tol": 1e-8, "max_iter": 10_000}
    fit = linear.LogisticRegression(**options).fit(((features - mean) / std).numpy(), labels.numpy())
    return torch.tensor(fit.decision_function(((rows - mean) / std).numpy()))


def test_balanced_head_is_scikit_learns() -> None:
    train, val = noise(200, classes=3, seed=0), noise(60, classes=3, seed=1)
    uneven = train.of([index for index in range(200) if train.labels[index] or index % 10 == 0])
    counts = count_classes(Counted(3), uneven.labels.tolist(), balanced=True)
    fit = fit_heads(uneven, val, num_classes=3, device=torch.device("cpu"), weights=counts.weights(binary=False))
    weight, bias = fit.weights["head"]
    found = F.linear(val.inputs["head"], weight, bias)
    expected = sklearn_logits(uneven.inputs["head"], uneven.labels, fit.penalty, val.inputs["head"])
    apart = (found - found.mean(dim=1, keepdim=True)).double() - (expected - expected.mean(dim=1, keepdim=True))
    assert apart.abs().max() < 0.02
    assert {*fit.tried[0]} == {"penalty", "balanced_accuracy", "loss"}


def test_labels_of_several_are_fitted_each_by_itself() -> None:
    train, val = (noise(200, classes=3, seed=seed) for seed in (0, 1))
    train, val = (Features(each.inputs, many_hot(each.labels)) for each in (train, val))
    device = torch.device("cpu")
    counts = count_classes(Mixed(3), train.plain_labels(), balanced=True)
    fit = fit_heads(train, val, num_classes=4, device=device, weights=counts.weights(binary=True))
    found = F.linear(val.inputs["head"], *fit.weights["head"]).double()
    for number in range(3):
        expected = sklearn_logits(train.inputs["head"], train.labels[:, number], fit.penalty, val.inputs["head"])
        assert (found[:, number] - expected).abs().max() < 0.02
    assert (found[:, 3] < -1).all()  # no image has the last label
    assert {*fit.tried[0]} == {"penalty", "map", "loss"}
    unread = Features(train.inputs, torch.cat([torch.full((1, 4), -1.0), train.labels[1:]]))
    assert len(unread.readable().labels) == 199
    assert unread.plain_labels()[0] == -1


def many_hot(labels: torch.Tensor) -> torch.Tensor:
    """Each class and, of class 2, class 0 too; (N, 4)."""
    rows = F.one_hot(labels, 4).float()
    rows[labels == 2, 0] = 1
    return rows


def test_corrected_labels_are_learned_from_the_features_that_are_there(tmp_path, passes) -> None:
    paths = sorted(save_folders(tmp_path / "photos").rglob("*.png"))
    before = [(str(path), "bug") for path in paths[:-6]] + [(str(path), "cow") for path in paths[-6:]]
    after = [(str(path), "cow" if path.parent.name == "cow" else "bug") for path in reversed(paths)][::-1]
    after[0] = (after[0][0], "cow")
    for pairs in (before, after):
        found = extract(atom(num_classes=2), wrap(pairs), tmp_path / "features")
    assert len(passes) == 1
    assert found.labels.tolist() == [label == "cow" for _, label in after]
