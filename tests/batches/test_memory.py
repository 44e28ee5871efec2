"""Images kept in memory: the same pixels, samples and runs as from files, however they are decoded and where cut."""

import logging
import multiprocessing
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import tiny
import torch
from torchvision.transforms.v2 import functional as TF

from deit_models.augmentation.augment import TrainTransform
from deit_models.augmentation.levels import Levels
from deit_models.augmentation.samples import TrainingSamples, TrainSampler, training_batches
from deit_models.batches.inputs import InputBatches
from deit_models.batches.loading import explained_worker_failure
from deit_models.batches.memory import free_memory, images_on, keep_in_memory
from deit_models.checkpoint import Preprocessing
from deit_models.data.datasets import open_dataset, wrap
from deit_models.data.records import ArrayRecords, CachedRecords, FileRecords, ImageRecords, SubsetRecords
from deit_models.errors import ConfigError, DataError
from deit_models.recipes.recipe import Recipe
from deit_models.training.run import train

CPU = torch.device("cpu")
CUT_ONLY = {"augment": "none", "color_jitter": 0.0, "erase": 0.5}
EVERYTHING = {"augment": "rand-m9-mstd0.5-inc1", "erase": 0.5}


def picture(number: int, size: tuple[int, int]) -> PIL.Image.Image:
    generator = torch.Generator().manual_seed(number)
    return TF.to_pil_image(torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of 10 x 8 pixels in class folders, saved without loss."""
    for number in range(12):
        file = tmp_path / "train" / f"kind {number % 3}" / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number, (8, 10)).save(file)
    return tmp_path


@pytest.fixture(params=["fork", "spawn"])
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def in_memory(size: tuple[int, int] = (8, 10), *, broken: tuple[int, ...] = ()) -> CachedRecords:
    records = ArrayRecords("noise", [], [number % 3 for number in range(12)], ["a", "b", "c"])
    images = torch.stack([TF.pil_to_tensor(picture(number, size)) for number in range(12)])
    labels = torch.tensor([number % 3 for number in range(12)])
    return CachedRecords(records, images, labels, {index: f"{index} is broken" for index in broken})


class Loose(ImageRecords):
    """The images of another set, read one by one."""

    def __init__(self, records: ImageRecords) -> None:
        self.name, self.classes, self.records = records.name, records.classes, records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        return self.records[index]


# What is kept


def test_decoded_set_has_the_pixels_labels_and_names_of_the_files(folder: Path, start_method: str) -> None:
    records = open_dataset(folder, "train")
    kept = keep_in_memory(records, "auto", workers=2)
    assert isinstance(kept, CachedRecords), start_method
    assert kept.images.is_shared()
    assert (kept.size, kept.classes, kept.name, len(kept)) == ((8, 10), records.classes, records.name, 12)
    for index in range(12):
        (theirs, label), (ours, kept_label) = records[index], kept[index]
        assert ours.tobytes() == theirs.tobytes()
        assert label == kept_label == kept.label(index) == int(kept.labels[index])
        assert (kept.key(index), kept.describe(index)) == (records.key(index), records.describe(index))
    assert kept[-1][1] == 2
    with pytest.raises(IndexError):
        kept[12]
    recipe = Recipe(crop="pad", **EVERYTHING)
    for ours, theirs in zip(batches_of(kept, recipe, workers=1), batches_of(records, recipe, workers=0), strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_each_file_is_read_once(folder: Path) -> None:
    kept = keep_in_memory(open_dataset(folder, "train"), "auto", workers=0)
    shutil.rmtree(folder / "train")
    assert [kept[index][1] for index in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert keep_in_memory(kept, "ram", workers=0) is kept


def test_what_is_kept_by_itself(folder: Path) -> None:
    files = open_dataset(folder, "train")
    bytes_needed = 12 * 3 * 8 * 10
    assert isinstance(keep_in_memory(SubsetRecords(files, [3, 4]), "auto", workers=0), CachedRecords)
    assert keep_in_memory(files, "none", workers=0) is files
    # a set that may draw at each reading, such as one of the user's, would stand still
    for foreign in (wrap(Loose(files)), wrap([(picture(0, (8, 8)), 0)] * 9, classes=["a", "b"]), tiny.Pictures(9)):
        assert keep_in_memory(foreign, "auto", workers=0) is foreign
        assert isinstance(keep_in_memory(foreign, "ram", workers=0), CachedRecords)
    enough, less = 4 * bytes_needed, 4 * bytes_needed - 1
    assert isinstance(keep_in_memory(files, "auto", workers=0, free=enough), CachedRecords)
    assert keep_in_memory(files, "auto", workers=0, free=enough, processes=2) is files
    assert keep_in_memory(files, "auto", workers=0, free=less) is files
    assert isinstance(keep_in_memory(files, "ram", workers=0, free=less), CachedRecords)


def repeated(file: Path, count: int, *, second: Path | None = None) -> FileRecords:
    """One file as many images of two classes, in the second place another one."""
    files = [file, second or file, *[file] * (count - 2)]
    return FileRecords("copies", "", map(str, files), [number % 2 for number in range(count)], ("a", "b"))


def test_choice_is_said_in_one_line_with_the_option_against_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep_in_memory(open_dataset(folder, "train"), "auto", workers=0)
    assert caplog.records == []  # three kilobytes
    PIL.Image.new("RGB", (512, 512)).save(folder / "large.png")
    records = repeated(folder / "large.png", 86)  # 68 MB
    keep_in_memory(records, "auto", workers=0, free=1 << 30)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "keeping the 86 images of" in record.getMessage()
    assert "--cache none" in record.getMessage()
    keep_in_memory(records, "ram", workers=0)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("odd", [0, 7, 11])
@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_several_sizes_are_not_kept_and_refused_by_name(folder: Path, odd: int, workers: int) -> None:
    file = folder / "train" / f"kind {odd % 3}" / f"{odd:02}.png"
    picture(0, (9, 10)).save(file)
    records = open_dataset(folder, "train")
    assert keep_in_memory(records, "auto", workers=workers) is records
    with pytest.raises(DataError, match=r"\.png is 10x[89] pixels, others 10x[89]; .*cache='none'") as caught:
        keep_in_memory(records, "ram", workers=workers)
    assert "\n" not in str(caught.value)


def test_odd_size_that_the_first_look_misses_is_found_while_decoding(folder: Path) -> None:
    odd = folder / "train" / "kind 1" / "01.png"
    picture(0, (9, 10)).save(odd)
    records = repeated(folder / "train" / "kind 0" / "00.png", 40, second=odd)  # every second or third is looked at
    assert keep_in_memory(records, "auto", workers=1) is records
    with pytest.raises(DataError, match=r"01\.png is 10x9 pixels, others 10x8"), explained_worker_failure(1):
        keep_in_memory(records, "ram", workers=1)


def test_what_cannot_be_kept_is_refused(folder: Path) -> None:
    records = open_dataset(folder, "train")
    with pytest.raises(ConfigError, match="cache='disk'; expected one of auto, ram, none"):
        keep_in_memory(records, "disk", workers=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the 12 images of .* take 0 MB decoded, and 0 MB are free; .*cache='none'"):
        keep_in_memory(records, "ram", workers=0, free=100)
    broken = tiny.Pictures(40, broken=range(40))
    with pytest.raises(DataError, match="noise: none of 16 images can be read"):
        keep_in_memory(broken, "ram", workers=0)


def test_free_memory_is_bounded_by_what_can_be_shared() -> None:
    assert 0 < free_memory(shared=True) <= free_memory() + (256 << 20)  # others use it meanwhile


# The samples that come of it


def seeded_levels(transform: TrainTransform, image: PIL.Image.Image, seed: int) -> Levels:
    """One sample as it always was: torch's generator seeded, then the transform."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    levels = transform(image)
    torch.set_rng_state(state)
    return levels


@pytest.mark.parametrize("crop", ["pad", "simple", "none", "random_resized"])
@pytest.mark.parametrize("changes", [CUT_ONLY, EVERYTHING, {"augment": "3-augment", "color_jitter": 0.3}])
@pytest.mark.parametrize("size", [(8, 10), (8, 8), (16, 24)])
def test_batches_from_memory_are_the_samples_one_by_one(
    crop: str, changes: dict[str, Any], size: tuple[int, int]
) -> None:
    records = in_memory()
    recipe = Recipe(crop=crop, crop_scale=0.3, interpolation="random", **changes)
    transform = TrainTransform(recipe, Preprocessing(resize=8, crop=(8, 10)), size)
    keys = [(number * 5 % 12, seed) for number, seed in enumerate(torch.randint(2**62, (60,)).tolist())]
    levels, labels, failed = TrainingSamples(records, transform).batch(keys)
    assert (
        len(levels.values.flatten(1).unique(dim=0)) > 20
    )  # 12 images and their mirror images, where nothing else is drawn
    for number, (index, seed) in enumerate(keys):
        one = seeded_levels(transform, picture(index, (8, 10)), seed)
        assert torch.equal(levels.values[number], one.values)
        assert torch.equal(levels.erase[number], one.erase)
    assert labels.tolist() == [index % 3 for index, _ in keys]
    assert failed.tolist() == [-1] * 60


def test_padding_wider_than_an_image_is_left_to_pillow() -> None:
    records = in_memory((4, 4))
    transform = TrainTransform(Recipe(crop="simple", **CUT_ONLY), Preprocessing(resize=4, crop=(4, 4)), (4, 4))
    assert not transform.cuts(4, 4)
    levels, _, _ = TrainingSamples(records, transform).batch([(3, 9)])
    assert torch.equal(levels.values[0], seeded_levels(transform, picture(3, (4, 4)), 9).values)


def test_own_sets_leave_the_global_generators_alone() -> None:
    transform = TrainTransform(Recipe(**CUT_ONLY), Preprocessing(resize=8, crop=(8, 8)), (8, 8))
    before = torch.get_rng_state(), random.getstate()
    TrainingSamples(in_memory(), transform)[3, 5]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_set_that_draws_is_seeded_as_before() -> None:
    class Drawing(Loose):
        def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
            return picture(int(torch.randint(100, ())) + random.randrange(100), (8, 10)), 0

    transform = TrainTransform(Recipe(**CUT_ONLY), Preprocessing(resize=8, crop=(8, 8)), (8, 8))
    samples = TrainingSamples(Drawing(in_memory()), transform)
    first, again, other = samples[0, 5][0], samples[0, 5][0], samples[0, 6][0]
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, other.values)


@pytest.mark.parametrize("changes", [CUT_ONLY, EVERYTHING])
def test_broken_images_are_replaced_and_reported_as_from_files(changes: dict[str, Any]) -> None:
    records = in_memory(broken=(3, 4, 11))
    transform = TrainTransform(Recipe(crop="pad", **changes), Preprocessing(resize=8, crop=(8, 10)), (8, 10))
    keys = [(index, index + 7) for index in range(12)]
    levels, labels, failed = TrainingSamples(records, transform).batch(keys)
    for number, key in enumerate(keys):
        one, label, index = TrainingSamples(Loose(records), transform)[key]
        assert torch.equal(levels.values[number], one.values)
        assert (int(labels[number]), int(failed[number])) == (label, index)
    assert failed.tolist() == [-1, -1, -1, 3, 4, -1, -1, -1, -1, -1, -1, 11]
    hopeless = in_memory(broken=tuple(range(2, 9)))
    with pytest.raises(DataError, match="image 2 of noise and the 5 images after it cannot be read; last: 7 is broken"):
        TrainingSamples(hopeless, transform).batch([(2, 0)])


def test_broken_files_are_noted_while_decoding(folder: Path) -> None:
    (folder / "train" / "kind 1" / "04.png").write_bytes(b"no image")
    kept = keep_in_memory(open_dataset(folder, "train"), "ram", workers=1)
    assert isinstance(kept, CachedRecords)
    assert list(kept.broken) == [5]
    assert "04.png" in kept.broken[5]
    assert kept.label(5) == 1


# On the device


def batches_of(
    records: ImageRecords, recipe: Recipe, *, workers: int, batch_size: int = 8, device: torch.device = CPU
) -> InputBatches:
    preprocessing = Preprocessing(resize=8, crop=(8, 10))
    transform = TrainTransform(recipe, preprocessing, (8, 10))
    sampler = TrainSampler(len(records), batch_size=batch_size, repeats=3, seed=4)
    return training_batches(records, transform, sampler, batch_size=batch_size, workers=workers, device=device)


@pytest.mark.parametrize("crop", ["pad", "simple", "none"])
def test_device_cuts_what_the_workers_cut(crop: str) -> None:
    recipe = Recipe(crop=crop, **CUT_ONLY)
    there = batches_of(in_memory(broken=(5,)), recipe, workers=3)
    assert there.loader.dataset.samples.planned
    assert there.loader.num_workers == 0
    for workers in (0, 2):
        for ours, theirs in zip(there, batches_of(Loose(in_memory(broken=(5,))), recipe, workers=workers), strict=True):
            assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("changes", [EVERYTHING, {"augment": "none", "color_jitter": 0.2}, {"crop": "random_resized"}])
def test_other_augmentation_stays_with_the_workers(changes: dict[str, Any]) -> None:
    batches = batches_of(in_memory(), Recipe(**{"crop": "pad", **changes}), workers=1)
    assert not batches.loader.dataset.samples.planned
    assert batches.loader.num_workers == 1


def test_set_too_large_for_the_device_stays_with_the_workers() -> None:
    kept = in_memory()
    assert images_on(kept, CPU) is kept.images
    assert images_on(kept, torch.device("mps")) is None  # whose free memory is not known


def test_cutting_waits_for_no_device() -> None:
    # tensors of the device "meta" have no values: whatever would have to read one back fails
    records, recipe = in_memory(), Recipe(crop="pad", **CUT_ONLY)
    transform = TrainTransform(recipe, Preprocessing(resize=8, crop=(8, 10)), (8, 10))
    plan = transform.plan((8, 10), [0, 1], [2, 3])
    assert transform.carry_out(records.images.to("meta"), plan).values.shape == (2, 3, 8, 10)


# Whole runs


@pytest.mark.parametrize("settings", [{**tiny.PLAIN, "crop": "pad", "hflip": 0.5, "erase": 0.5}, tiny.LIVELY])
def test_run_is_the_same_with_and_without_a_cache(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = {}
    for name, choice, workers in (("none", "none", 0), ("memory", "ram", 0), ("workers", "ram", 2)):
        done = train(
            tiny.model(),
            recipe=tiny.recipe({**settings, "epochs": 2}),
            train=tiny.Pictures(24, broken=(5,)),
            val=tiny.Pictures(9, seed=1, broken=(2,)),
            out=tmp_path / name,
            cache=choice,
            workers=workers,
            corrupt_limit=0.2,
            device="cpu",
        )
        rows[name] = [{**row, "seconds": 0, "images_per_second": 0} for row in done.log]
    assert rows["none"] == rows["memory"] == rows["workers"]
    tiny.same_bits(tiny.state(tmp_path / "none")["model"], tiny.state(tmp_path / "workers")["model"])


def test_images_are_read_once_in_a_run_that_keeps_them(tmp_path: Path) -> None:
    pictures, val = tiny.Pictures(20), tiny.Pictures(9, seed=1)
    recipe = tiny.recipe(epochs=3, ema_decay=0.5)
    train(tiny.model(), recipe=recipe, train=pictures, val=val, out=tmp_path, cache="ram", workers=0, device="cpu")
    assert pictures.read[16:] == list(range(20))  # after 16 looks at the size
    assert val.read[:9] == list(range(9))  # then the mistakes of the report
    assert len(set(val.read[9:])) == len(val.read[9:])


def test_evaluation_reads_each_image_once_for_all_versions_of_the_weights(tmp_path: Path) -> None:
    val = tiny.Pictures(9, seed=1)
    recipe = tiny.recipe(epochs=2, ema_decay=0.5)
    done = train(tiny.model(), recipe=recipe, train=tiny.Pictures(20), val=val, out=tmp_path, workers=0, device="cpu")
    assert val.read[:18] == list(range(9)) * 2  # then the mistakes of the report
    assert len(set(val.read[18:])) == len(val.read[18:])
    assert done.log[-1]["top1"] >= 0 <= done.log[-1]["ema_top1"]


def test_unknown_cache_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache='disk'; expected one of auto, ram, none"):
        train(
            tiny.model(), recipe=tiny.recipe(), train=tiny.Pictures(9), out=tmp_path / "out", cache="disk", device="cpu"
        )  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [True, False], ids=["cut there", "cut by workers"])
@pytest.mark.parametrize("erase", [0.0, 0.5])
def test_gpu_gets_the_batches_of_the_cpu_and_is_not_waited_for(kept: bool, erase: float) -> None:
    recipe = Recipe(crop="pad", **{**CUT_ONLY, "erase": erase})
    records = in_memory(broken=(5,)) if kept else Loose(in_memory(broken=(5,)))
    expected = list(batches_of(records, recipe, workers=0))
    batches = batches_of(records, recipe, workers=2, device=torch.device("cuda"))
    found = list(batches)  # warm: streams and pinned memory are there
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, twice, theirs in zip(found, again, expected, strict=True):
        assert ours[0].device.type == "cuda"
        assert ours[1].is_pinned()
        assert torch.equal(ours[0], twice[0])  # the noise too
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[2], theirs[2])
        if not erase:
            torch.testing.assert_close(ours[0].cpu(), theirs[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [CUT_ONLY, EVERYTHING])
@pytest.mark.parametrize("crop", ["pad", "simple"])
def test_greys_for_one_channel_are_those_of_the_files(changes: dict[str, Any], crop: str) -> None:
    records, spec = in_memory(), Preprocessing(resize=8, crop=(8, 10)).for_channels(1)
    transform = TrainTransform(Recipe(**{**changes, "crop": crop}), spec, (8, 10))
    keys = [(index, index + 7) for index in range(12)]
    levels = TrainingSamples(records, transform).batch(keys)[0]
    assert levels.values.shape == (12, 1, 8, 10)
    for number, key in enumerate(keys):
        assert torch.equal(levels.values[number], TrainingSamples(Loose(records), transform)[key][0].values)
