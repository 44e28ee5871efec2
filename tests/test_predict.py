"""Classifying one image, a list, a folder; broken files; what is written out."""

import os
import signal
import weakref
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from tracing import modules_run

import deit_models
from deit_models import predict
from deit_models.batches.loading import file_batches
from deit_models.errors import ConfigError, DeitModelsError, ImageError
from deit_models.images.transforms import transform_for
from deit_models.models.deit import DeiT
from deit_models.models.layers import ImageClassifier
from deit_models.predict import Classifier, ImageResult, attention_maps, batches_ahead, find_images

NAMES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "lorry")


def tiny_model(**overrides: object) -> DeiT:
    torch.manual_seed(0)
    model = deit_models.create_model("deit_micro_patch4_32", depth=1, embed_dim=16, num_heads=2, **overrides)
    nn.init.normal_(model.head.weight)  # logits far enough apart that the order of classes is no accident
    if model.num_classes == len(NAMES):
        model.origin = replace(model.origin, class_names=NAMES)
    return model


@pytest.fixture
def classifier() -> Classifier:
    return Classifier(tiny_model(), batch_size=8)


def picture(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def save_pictures(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{i:03}.png" for i in range(count)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    return paths


def expected(classifier: Classifier, seed: int) -> torch.Tensor:
    """Probabilities the plain way, one image at a time."""
    with torch.no_grad():
        return classifier.model(classifier.transform(picture(seed))[None]).softmax(-1)[0]


def assert_is_picture(result: ImageResult, classifier: Classifier, seed: int) -> None:
    probabilities = expected(classifier, seed)
    assert [p.index for p in result.predictions] == probabilities.argsort(descending=True)[
        : len(result.predictions)
    ].tolist()
    for prediction in result.predictions:
        assert prediction.probability == pytest.approx(float(probabilities[prediction.index]), abs=1e-5)


# What goes in, and in which order it comes out


def test_one_image_gives_one_result_with_labelled_probabilities(classifier: Classifier) -> None:
    result = classifier(picture(0), top_k=3)
    assert isinstance(result, ImageResult)
    assert (result.source, result.error, len(result.predictions)) == ("image", None, 3)
    assert_is_picture(result, classifier, 0)
    assert all(p.label == NAMES[p.index] for p in result.predictions)


def test_a_list_gives_a_list_in_the_same_order_over_several_batches(classifier: Classifier) -> None:
    results = classifier([picture(seed) for seed in range(19)])
    assert [result.source for result in results] == [f"image {i}" for i in range(19)]
    for seed, result in enumerate(results):
        assert_is_picture(result, classifier, seed)


def test_every_form_of_an_image_gives_the_same_result(classifier: Classifier, tmp_path: Path) -> None:
    (path,) = save_pictures(tmp_path, 1)
    array = np.asarray(picture(0))
    tensor = torch.tensor(array).permute(2, 0, 1)
    forms = [path, str(path), path.read_bytes(), picture(0), array, tensor, tensor / 255]
    results = classifier(forms)
    assert len({tuple((p.index, round(p.probability, 5)) for p in result.predictions) for result in results}) == 1
    assert [result.source for result in results[:3]] == [str(path), str(path), "image 2"]


def test_a_three_dimensional_tensor_is_one_image_and_a_four_dimensional_one_several(classifier: Classifier) -> None:
    array = np.stack([np.asarray(picture(seed)) for seed in range(3)])
    tensor = torch.tensor(array).permute(0, 3, 1, 2)
    assert isinstance(classifier(tensor[0]), ImageResult)
    assert isinstance(classifier(array[0]), ImageResult)
    for several in (tensor, array):
        for seed, result in enumerate(classifier(several)):
            assert_is_picture(result, classifier, seed)


def test_an_empty_list_gives_an_empty_list(classifier: Classifier) -> None:
    assert classifier([]) == []


def test_probabilities_of_all_classes_sum_to_one_and_fall(classifier: Classifier) -> None:
    probabilities = [p.probability for p in classifier(picture(0), top_k=10).predictions]
    assert sum(probabilities) == pytest.approx(1, abs=1e-6)
    assert probabilities == sorted(probabilities, reverse=True)


def test_top_k_above_the_number_of_classes_gives_all_of_them(classifier: Classifier) -> None:
    assert len(classifier(picture(0), top_k=1000).predictions) == 10


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_refused(classifier: Classifier, top_k: int) -> None:
    with pytest.raises(ConfigError, match=f"top_k={top_k}; expected 1 to 10"):
        classifier(picture(0), top_k=top_k)
    with pytest.raises(ConfigError, match=f"top_k={top_k}"):
        classifier.classify_files([], top_k=top_k)


def test_an_undecodable_image_is_named(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("milk, eggs")
    with pytest.raises(ImageError, match=r"notes\.jpg: not an image"):
        classifier([picture(0), tmp_path / "notes.jpg"])
    with pytest.raises(ImageError, match=r"^image 1: shape \(2, 2\)"):
        classifier([picture(0), torch.zeros(2, 2)])


def test_a_half_precision_model_gives_float32_probabilities() -> None:
    classifier = Classifier(tiny_model(), dtype=torch.bfloat16)
    assert next(classifier.model.parameters()).dtype == torch.bfloat16
    assert sum(p.probability for p in classifier(picture(0), top_k=10).predictions) == pytest.approx(1, abs=1e-6)


def test_results_cannot_be_changed(classifier: Classifier) -> None:
    with pytest.raises(FrozenInstanceError):
        classifier(picture(0)).source = "other"


# Which model, which labels


def test_a_given_model_is_used_itself_and_in_eval_mode() -> None:
    model = tiny_model(distilled=True).train()
    classifier = Classifier(model)
    assert classifier.model is model
    assert not model.training
    assert classifier(picture(0)).error is None


def test_a_name_goes_through_from_pretrained(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "mine")
    plain = Classifier(tmp_path / "mine")
    assert plain.labels == NAMES
    assert next(plain.model.parameters()).device.type == predict._best_device()
    assert len(Classifier(str(tmp_path / "mine"), num_classes=4).labels) == 4
    half = Classifier(tmp_path / "mine", device="cpu", dtype=torch.float16).model
    assert {(parameter.dtype, parameter.device.type) for parameter in half.parameters()} == {(torch.float16, "cpu")}
    assert Classifier(device="cpu").model.origin.name == predict.DEFAULT_MODEL


@pytest.mark.parametrize(("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_the_gpu_if_there_is_one(cuda: bool, mps: bool, device: str) -> None:
    assert predict._best_device(cuda=cuda, mps=mps) == device


def test_load_options_for_a_loaded_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="revision: only for a model given by name"):
        Classifier(tiny_model(), revision="v2")


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=0"):
        Classifier(tiny_model(), batch_size=0)


def test_given_labels_come_before_those_of_the_checkpoint() -> None:
    labels = [f"my {i}" for i in range(10)]
    assert Classifier(tiny_model(), labels=labels).labels == tuple(labels)


def test_a_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 labels given, 10 expected"):
        Classifier(tiny_model(), labels=["a", "b"])


def test_imagenet_names_only_for_a_thousand_classes_of_imagenet() -> None:
    model = tiny_model(num_classes=1000)
    assert Classifier(model).labels[:2] == ("class 0", "class 1")
    model.origin = replace(model.origin, dataset="ImageNet-1k")
    labels = Classifier(model).labels
    assert (labels[0], labels[281], len(labels)) == ("tench", "tabby", 1000)
    fewer = tiny_model(num_classes=7)
    fewer.origin = replace(fewer.origin, dataset="ImageNet-1k", class_names=None)
    assert Classifier(fewer).labels == tuple(f"class {i}" for i in range(7))


def test_one_image_passes_few_modules(classifier: Classifier, tmp_path: Path) -> None:
    (path,) = save_pictures(tmp_path, 1)
    classifier(path)  # everything is imported
    found = modules_run(lambda: classifier(path))
    assert {"predict", "images.decoding", "images.transforms", "models.deit"} <= found
    assert len(found) <= 6


# Files


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_folder_with_three_broken_files_of_fifty_gives_47_results_and_3_failures(
    classifier: Classifier, tmp_path: Path, workers: int | None
) -> None:
    paths = save_pictures(tmp_path, 50)
    paths[0].write_bytes(b"")
    paths[20].write_bytes(paths[20].read_bytes()[:100])
    paths[49].write_text("not a picture")
    results = list(classifier.classify_files(find_images(tmp_path), workers=workers))
    assert [result.source for result in results] == [str(path) for path in paths]
    failed = [result for result in results if result.error is not None]
    assert [Path(result.source).name for result in failed] == ["000.png", "020.png", "049.png"]
    assert all(result.source in result.error and result.predictions == () for result in failed)
    assert len(results) - len(failed) == 47
    for seed in (1, 19, 21, 48):
        assert_is_picture(results[seed], classifier, seed)


def test_a_batch_of_broken_files_alone_is_survived(classifier: Classifier, tmp_path: Path) -> None:
    paths = save_pictures(tmp_path, 9)
    for path in paths[:8]:
        path.write_bytes(b"")
    assert [result.error is None for result in classifier.classify_files(paths)] == [False] * 8 + [True]


def test_no_files_give_no_results(classifier: Classifier) -> None:
    assert list(classifier.classify_files([])) == []


def test_files_are_drawn_and_decoded_as_results_are_taken(classifier: Classifier, tmp_path: Path) -> None:
    (path,) = save_pictures(tmp_path, 1)
    drawn = 0

    def endless() -> Iterator[Path]:
        nonlocal drawn
        while True:
            drawn += 1
            yield path

    results = classifier.classify_files(endless())
    assert drawn == 0
    assert [next(results).source for _ in range(20)] == [str(path)] * 20
    assert drawn <= 20 + 2 * classifier.batch_size
    results.close()


def test_a_negative_number_of_workers_is_refused(classifier: Classifier) -> None:
    with pytest.raises(ConfigError, match="workers=-1; expected a whole number from 0 to 1024"):
        classifier.classify_files([], workers=-1)


class DeadlyPath(os.PathLike):
    """Ends the process that opens it, as the system does to a worker without shared memory."""

    def __fspath__(self) -> str:
        if parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return "deadly.png"


def test_a_worker_killed_by_the_system_is_explained(classifier: Classifier) -> None:
    with pytest.raises(DeitModelsError, match=r"shared memory \(in Docker: --shm-size=1g\).*workers=0"):
        list(classifier.classify_files([DeadlyPath()] * 4, workers=1))


class FullMemory:
    """A path whose file finds no shared memory in the process that decodes it."""

    def __fspath__(self) -> str:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")


def test_too_little_shared_memory_is_explained(classifier: Classifier) -> None:
    with pytest.raises(DeitModelsError, match=r"--shm-size=1g.*fewer than 3 workers.*</torch_1>"):
        list(classifier.classify_files([FullMemory()] * 4, workers=3))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen as Linux does it")
def test_more_workers_than_cores_warn_nobody(classifier: Classifier, tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert len(list(classifier.classify_files(save_pictures(tmp_path, 3), workers=2))) == 3
    finally:
        os.sched_setaffinity(0, before)


def test_another_failure_of_the_model_is_not_blamed_on_shared_memory(classifier: Classifier, tmp_path: Path) -> None:
    paths = save_pictures(tmp_path, 1)
    classifier.model.head = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        list(classifier.classify_files(paths, workers=1))
    assert not isinstance(caught.value, DeitModelsError)


class SmallMemory(nn.Module):
    """A model on a device that has room for a few images at once."""

    def __init__(self, model: nn.Module, room: int) -> None:
        super().__init__()
        self.model, self.room, self.sizes = model, room, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")
        return self.model(images)


def test_batches_that_do_not_fit_into_memory_are_halved_once_and_for_all(
    classifier: Classifier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = save_pictures(tmp_path, 19)
    paths[2].write_bytes(b"")
    plain = list(classifier.classify_files(paths))
    small = classifier.model = SmallMemory(classifier.model, room=3)
    results = list(classifier.classify_files(paths))
    assert [(r.source, [p.index for p in r.predictions]) for r in results] == [
        (r.source, [p.index for p in r.predictions]) for r in plain
    ]
    assert small.sizes == [7, 3, 3, 1, 3, 3, 2, 3]
    assert classifier.batch_size == 3
    assert [record.message for record in caplog.records] == ["7 images at once do not fit into memory; going on with 3"]
    assert classifier([picture(0), picture(1)])[1].predictions == results[1].predictions


def test_no_image_of_a_list_is_lost_where_batches_are_halved(classifier: Classifier) -> None:
    pictures = [picture(seed) for seed in range(19)]
    plain = classifier(pictures)
    classifier.model = SmallMemory(classifier.model, room=3)
    found = classifier(pictures)
    assert [(r.source, r.predictions[0].index) for r in found] == [(r.source, r.predictions[0].index) for r in plain]


def test_memory_is_given_back_before_a_smaller_batch_is_tried(classifier: Classifier) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    freed: list[bool] = []

    class Greedy(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            freed.extend(reference() is None for reference in held[-1:])
            activations = images * 2
            held.append(weakref.ref(activations))
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return activations.flatten(1)[:, :10]

    classifier.model = Greedy()
    assert len(classifier([picture(seed) for seed in range(5)])) == 5
    assert freed[0], "the batch that did not fit is still in memory"


def test_an_image_that_does_not_fit_by_itself_is_one_clear_error(classifier: Classifier, tmp_path: Path) -> None:
    classifier.model = SmallMemory(classifier.model, room=0)
    with pytest.raises(DeitModelsError, match=r"not even one image fits.*or the CPU \(CUDA out of memory"):
        list(classifier.classify_files(save_pictures(tmp_path, 5)))


@pytest.mark.parametrize(
    ("device", "events"),
    [
        ("cpu", ["run", "read", "run", "read", "run", "read"]),
        ("cuda", ["run", "run", "read", "run", "read", "read"]),
    ],
)
def test_a_gpu_has_the_next_batch_before_the_last_is_read(
    classifier: Classifier, tmp_path: Path, device: str, events: list[str]
) -> None:
    paths, seen, sources = save_pictures(tmp_path, 20), [], []
    classifier.model.register_forward_hook(lambda *_: seen.append("run"))
    decode = classifier.transform.levels
    batches = file_batches(paths, decode, batch_size=7, workers=0, device=torch.device("cpu"))
    for result in classifier._classify(batches, 1, ahead=batches_ahead(torch.device(device))):
        if len(sources) % 7 == 0:
            seen.append("read")
        sources.append(result.source)
    assert sources == [str(path) for path in paths]
    assert seen == events


def test_fast_pixels_reach_the_decoding(tmp_path: Path) -> None:
    picture(0).resize((640, 640)).save(tmp_path / "large.jpg", quality=95)
    plain, fast = Classifier(tiny_model()), Classifier(tiny_model(), fast_pixels=True)
    levels = [c.transform.levels(tmp_path / "large.jpg").int() for c in (plain, fast)]
    assert 0 < (levels[0] - levels[1]).abs().max() <= 8
    (result,) = fast.classify_files([tmp_path / "large.jpg"])
    assert result.predictions == fast(tmp_path / "large.jpg").predictions
    assert result.predictions != plain(tmp_path / "large.jpg").predictions


# Finding them


def test_images_are_found_by_suffix_in_any_case_sorted_and_below(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.JPG", "a.png", "b/two.JpEg", "b/c/één.webp", "notes.txt", ".hidden.png", "b/._z.jpg", "noext"):
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a.png", "b/c/één.webp", "b/two.JpEg", "z.JPG"]
    assert [path.name for path in find_images(str(tmp_path), recursive=False)] == ["a.png", "z.JPG"]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="gone: no such folder"):
        find_images(tmp_path / "gone")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (path,) = save_pictures(tmp_path, 1)
    with pytest.raises(ImageError, match=r"000\.png: is not a folder"):
        find_images(path)


@pytest.mark.parametrize("recursive", [True, False])
def test_a_folder_without_images_is_refused_with_what_was_looked_for(tmp_path: Path, recursive: bool) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError, match=r"no image .*in it.*looked for .*\.jpg .*\.png"):
        find_images(tmp_path, recursive=recursive)


# Attention maps


def test_attention_maps_sum_to_one_and_leave_the_model_as_it_was() -> None:
    model = tiny_model(drop_rate=0.5).train()
    model.norm.eval()
    x = transform_for(model)(picture(0))[None]
    with torch.no_grad():
        maps = deit_models.attention_maps(model, x)
    assert maps.shape == (1, 1, 2, 65, 65)
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 1, 2, 65))
    assert not maps.requires_grad
    assert torch.equal(maps, attention_maps(model, x)), "dropout was on"
    assert (model.training, model.head.training, model.norm.training) == (True, True, False)
    maps += 1  # a map can be worked on in place


def test_a_family_without_attention_maps_is_refused() -> None:
    class Plain(ImageClassifier):
        pass

    with pytest.raises(ConfigError, match="Plain has no attention maps"):
        attention_maps(Plain(None), torch.zeros(1, 3, 8, 8))


def test_a_failing_forward_leaves_the_training_mode() -> None:
    model = tiny_model().train()
    with pytest.raises(ConfigError):
        attention_maps(model, torch.zeros(1, 3, 8, 8))
    assert model.training


# Other shapes and channel counts


@pytest.mark.parametrize("fast", [False, True])
def test_strip_is_one_failure_of_a_folder(tmp_path: Path, fast: bool) -> None:
    paths = save_pictures(tmp_path, 3)
    PIL.Image.new("L", (1, 2_000_000)).save(paths[1])
    found = list(Classifier(tiny_model(), fast_pixels=fast).classify_files(paths))
    assert [result.error is None for result in found] == [True, False, True]
    assert "001.png: 1x2000000 pixels, which become" in found[1].error


def test_one_channel_is_classified_from_any_image(tmp_path: Path) -> None:
    classifier = Classifier(tiny_model(in_chans=1))
    grey = picture(0).convert("L")
    grey.save(tmp_path / "grey.png")
    forms = [grey, grey.convert("RGB"), np.asarray(grey), torch.from_numpy(np.array(grey))[None], tmp_path / "grey.png"]
    found = [classifier(form).predictions for form in forms]
    assert found == [found[0]] * 5
    assert next(classifier.classify_files([tmp_path / "grey.png"])).predictions == found[0]


def test_other_channel_counts_are_classified_from_arrays_and_tensors(tmp_path: Path) -> None:
    classifier = Classifier(tiny_model(in_chans=4))
    levels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 4), dtype=np.uint8)
    found = classifier(levels)
    assert [result.predictions for result in found] == [
        result.predictions for result in classifier(torch.from_numpy(levels).permute(0, 3, 1, 2))
    ]
    with pytest.raises(ConfigError, match="the model takes 4 channels, and image files are read as 3 or 1"):
        list(classifier.classify_files(save_pictures(tmp_path, 2)))
    with pytest.raises(ImageError, match=r"image 1: shape \(32, 32, 3\) is not an image; .* C = 4"):
        classifier([levels[0], levels[1, ..., :3]])
