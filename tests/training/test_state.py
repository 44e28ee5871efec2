"""Files of a run: it goes on after any interruption to the same weights, or refuses in one line; its log and curves."""

import json
import os
import random
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from deit_models import create_model
from deit_models.batches.loading import Watch, plain_watch
from deit_models.errors import SaveError, TrainingError
from deit_models.models.layers import ImageClassifier
from deit_models.training.learner import Learner
from deit_models.training.run import TrainResult, train
from deit_models.training.state import LOG_NAME, Progress, RunLog, load_state, read_log, save_state
from deit_models.training.teacher import Teacher

RUN = {"model": "m", "data": "d"}


class StoppedError(Exception):
    """Comes between two epochs."""


def distilled(*, seed: int) -> ImageClassifier:
    return tiny.model(distilled=True, seed=seed)


def lively(
    out: Path,
    *,
    workers: int = 0,
    stop_after: int | None = None,
    build: Callable[..., ImageClassifier] = distilled,
    watch: Watch = plain_watch,
    pictures: type[tiny.Pictures] = tiny.Pictures,
    **changes: Any,
) -> TrainResult:
    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == stop_after:
            raise StoppedError

    return train(
        # whoever goes on knows nothing of the first start: other weights, other random numbers
        build(seed=77 if out.exists() else 0),
        recipe=tiny.recipe(tiny.LIVELY, **{"epochs": 4, "warmup_epochs": 1, "seed": 9, **changes}),
        train=pictures(24, broken=(5,)),
        val=pictures(9, seed=1),
        out=out,
        workers=workers,
        device="cpu",
        watch=watch,
        on_epoch=stop,
    )


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in rows]


def same_run(first: Path, second: Path) -> None:
    """State, exported weights and log are equal, bit for bit, but for the clock."""
    tiny.same_bits(tiny.state(first), tiny.state(second))
    for name in ("model", "best", "ema"):
        tiny.same_bits(*(load_file(out / name / "model.safetensors") for out in (first, second)))
    logs = [without_clock(read_log(out / "log.jsonl")) for out in (first, second)]
    assert logs[0] == logs[1]
    assert [row["epoch"] for row in logs[0]] == list(range(len(logs[0])))
    assert not [*first.rglob("*.tmp"), *second.rglob("*.tmp")]


def levit(*, seed: int) -> ImageClassifier:
    """A model with BatchNorm, whose statistics and counters belong to the state."""
    torch.manual_seed(seed)
    options = {"embed_dim": (16, 16), "depth": (1, 1), "num_heads": (2, 2), "key_dim": 8}
    return create_model("levit_128s", img_size=32, num_classes=3, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"  # not made yet
    lively(out)
    return out


def test_everything_that_is_random_or_kept_is_on(uninterrupted: Path, tmp_path: Path) -> None:
    """Bit equality below would be worth little if a part of the recipe did nothing."""
    saved = tiny.state(uninterrupted)
    assert saved["progress"]["epoch"] == 4
    # states of earlier releases have these names
    assert saved.keys() == {"format", "recipe", "parts", "run", "progress", "scaler", "model", "ema_model", "optimizer"}
    assert saved["format"] == 1
    assert saved["run"].keys() == {"model", "data"}
    assert saved["progress"].keys() == {"epoch", "best_top1", "best_epoch", "unreadable", "thresholds"}
    assert max(difference for _, difference in tiny.differences(saved["model"], saved["ema_model"])) > 1e-4
    lively(tmp_path / "usual", epochs=2)
    usual = tiny.state(tmp_path / "usual")["model"]
    for name, change in {"mixup": 0.0, "drop_path_rate": 0.0, "erase": 0.0, "hflip": 0.0, "augment": "none"}.items():
        lively(tmp_path / name, epochs=2, **{name: change, **({"cutmix": 0.0} if name == "mixup" else {})})
        weights = tiny.state(tmp_path / name)["model"]
        assert max(difference for _, difference in tiny.differences(weights, usual)) > 1e-6, name


@pytest.mark.parametrize("pictures", [tiny.Pictures, tiny.Several])
def test_balanced_run_goes_on_as_if_it_had_not_stopped(pictures: type[tiny.Pictures], tmp_path: Path) -> None:
    balance = {"pictures": pictures, "class_weights": "balanced", "sampling": "balanced", "epochs": 3}
    lively(tmp_path / "alone", **balance)
    for epoch in range(3):
        with pytest.raises(StoppedError):
            lively(tmp_path / "run", stop_after=epoch, workers=epoch % 2, **balance)
    lively(tmp_path / "run", **balance)
    same_run(tmp_path / "alone", tmp_path / "run")
    with pytest.raises(TrainingError, match=r"sampling='balanced' \(now 'all'\)"):
        lively(tmp_path / "run", **{**balance, "sampling": "all"})


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_bit(workers: int, uninterrupted: Path, tmp_path: Path) -> None:
    lively(tmp_path / "run", workers=workers)
    same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("workers", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 0)], ids=str)
def test_interrupted_after_every_epoch_it_ends_the_same(
    workers: tuple[int, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    for epoch, count in enumerate(workers):
        with pytest.raises(StoppedError):
            lively(tmp_path / "run", workers=count, stop_after=epoch)
        assert [row["epoch"] for row in read_log(tmp_path / "run" / "log.jsonl")] == list(range(epoch + 1))
    result = lively(tmp_path / "run")
    same_run(tmp_path / "run", uninterrupted)
    assert result.best_epoch is not None


# ---- kill -9


def test_batch_statistics_and_their_average_go_on_too(tmp_path: Path) -> None:
    lively(tmp_path / "alone", build=levit)
    with pytest.raises(StoppedError):
        lively(tmp_path / "run", build=levit, stop_after=1)
    lively(tmp_path / "run", build=levit)
    same_run(tmp_path / "alone", tmp_path / "run")
    saved = tiny.state(tmp_path / "run")
    for part in ("model", "ema_model"):
        variances = [value for name, value in saved[part].items() if name.endswith("running_var")]
        assert variances
        assert all((value != 1).all() for value in variances)


def test_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    struck = json.loads(tiny.start_worker("kills", tmp_path, 3, 15, 1))
    assert len(struck) == 3
    same_run(tmp_path / "killed", tmp_path / "alone")


@pytest.mark.slow
def test_run_killed_twenty_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    struck = json.loads(tiny.start_worker("kills", tmp_path, 20, 90, 2, limit_s=900))
    assert len(struck) == 20
    assert len(set(struck)) > 5, "the kills struck the same few epochs"
    same_run(tmp_path / "killed", tmp_path / "alone")
    assert tiny.state(tmp_path / "alone")["progress"]["epoch"] == 90


def test_kill_in_the_middle_of_the_bookkeeping_loses_nothing(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in tiny.start_worker("moments", tmp_path).splitlines()]
    assert len(lines) == 5
    left = {line["moment"]: line["left"] for line in lines}
    # the kills did strike there: what was half written lay about, and is gone
    assert [name[:8] for name in left["half a state"] + left["state not in place"]] == ["last.pt."] * 2
    assert [name[:18] for name in left["half a model"]] == ["model.safetensors."]
    for line in lines:
        same_run(tmp_path / line["moment"], tmp_path / "alone")


# ---- states that are refused


@pytest.fixture
def saved(uninterrupted: Path, tmp_path: Path) -> Path:
    shutil.copytree(uninterrupted, tmp_path / "copy")
    return tmp_path / "copy"


def test_state_of_another_recipe_is_refused_by_name(saved: Path) -> None:
    before = (saved / "last.pt").read_bytes()
    with pytest.raises(TrainingError, match=r"saved with lr=0.01 \(now 0.02\), mixup=0.8 \(now 0.5\); use those") as e:
        lively(saved, lr=0.02, mixup=0.5)
    assert "\n" not in str(e.value)
    assert str(saved / "last.pt") in str(e.value)
    assert (saved / "last.pt").read_bytes() == before
    assert len(read_log(saved / "log.jsonl")) == 4


def test_state_of_another_model_or_other_images_is_refused(saved: Path) -> None:
    options = {"recipe": tiny.recipe(tiny.LIVELY, epochs=4, seed=9), "out": saved, "workers": 0, "device": "cpu"}
    with pytest.raises(TrainingError, match=r"saved with model='DeiTConfig.*embed_dim=16.*embed_dim=32"):
        train(tiny.model(distilled=True, embed_dim=32), train=tiny.Pictures(24), **options)
    with pytest.raises(TrainingError, match=r"saved with data='24 images in 3 classes .* .now '23 images in 3 classes"):
        train(tiny.model(distilled=True), train=tiny.Pictures(23), **options)
    renamed = tiny.Pictures(24)
    renamed.classes = ("kind 1", "kind 0", "kind 2")
    with pytest.raises(TrainingError, match=r"saved with data='24 images in 3 classes \(.{8}\)' .now '24 images in 3 "):
        train(tiny.model(distilled=True), train=renamed, **options)


@pytest.mark.parametrize("now", ["other weights", "another network", "a function", "another size"])
def test_state_of_another_teacher_is_refused(now: str, tmp_path: Path) -> None:
    def teach(network: Any, img_size: tuple[int, int] | None = None) -> TrainResult:
        teacher = Teacher(network, student=tiny.PREPROCESSING, img_size=img_size)
        recipe = tiny.recipe(epochs=2, distillation="hard", distill_on="class")
        return train(tiny.model(), recipe=recipe, train=tiny.Pictures(8), out=tmp_path, teacher=teacher, device="cpu")

    def guess(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3]

    first = tiny.model(seed=1, dynamic_img_size=True)
    teach(first)
    network: Any = {"other weights": tiny.model(seed=2), "another network": tiny.model(depth=1), "a function": guess}
    with pytest.raises(TrainingError, match=r"saved with teacher='DeiT for any pixels .* \(now '.*use those"):
        teach(network.get(now, first), (16, 16) if now == "another size" else None)
    assert len(teach(tiny.model(seed=1, dynamic_img_size=True)).log) == 2


def test_what_does_not_touch_the_weights_may_change(saved: Path) -> None:
    assert lively(saved, eval_every=2, save_every=3, compile="off", accumulate=1).best_epoch is not None


def test_finished_run_goes_on_for_more_epochs(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(lively(saved, epochs=6).log) == 6
    assert "goes on; it was saved with epochs=4 (now 6)" in caplog.text
    assert "epochs = 6" in (saved / "recipe.toml").read_text()
    assert len(lively(saved, epochs=3).log) == 6  # they are done
    assert "epochs = 6" in (saved / "recipe.toml").read_text()
    with pytest.raises(TrainingError, match=r"saved with lr=0.01 \(now 0.02\); use those"):
        lively(saved, epochs=8, lr=0.02)


def test_run_that_was_cut_short_does_not_get_a_shorter_schedule(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        lively(tmp_path / "run", stop_after=1)
    with pytest.raises(TrainingError, match=r"saved with epochs=4 \(now 3\)"):
        lively(tmp_path / "run", epochs=3)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"accumulate": 2}, {"precision": "bf16", "workers": 1}])
def test_run_goes_on_on_another_machine(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(StoppedError):
        lively(tmp_path / "run", stop_after=2)
    assert len(lively(tmp_path / "run", **changes).log) == 4


def test_run_goes_on_with_images_that_were_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"out": tmp_path / "run", "workers": 0, "device": "cpu", "corrupt_limit": 0.1}
    train(tiny.model(), recipe=tiny.recipe(epochs=2), train=tiny.Pictures(24, broken=(5,)), **options)
    assert tiny.state(tmp_path / "run")["progress"]["unreadable"] == [5]
    train(tiny.model(), recipe=tiny.recipe(epochs=3), train=tiny.Pictures(26), **options)
    assert "saved with epochs=2 (now 3), data='24 images" in caplog.text
    assert tiny.state(tmp_path / "run")["progress"]["unreadable"] == []


def test_states_are_saved_every_so_often_and_at_the_end(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(StoppedError):
        lively(tmp_path / "early", save_every=3, stop_after=1)
    assert not (tmp_path / "early" / "last.pt").exists()
    with pytest.raises(StoppedError):
        lively(out, save_every=2, stop_after=2)
    assert tiny.state(out)["progress"]["epoch"] == 2
    assert len(read_log(out / "log.jsonl")) == 3
    lively(out, save_every=3)  # goes on after the second epoch
    assert tiny.state(out)["progress"]["epoch"] == 4
    for part in ("model", "ema_model", "optimizer"):
        tiny.same_bits(tiny.state(out)[part], tiny.state(uninterrupted)[part])
    assert without_clock(read_log(out / "log.jsonl")) == without_clock(read_log(uninterrupted / "log.jsonl"))


def test_state_without_a_number_of_parts_goes_on_whole(saved: Path) -> None:
    content = tiny.state(saved)
    assert content.pop("parts") == 1
    torch.save(content, saved / "last.pt")
    assert len(lively(saved).log) == 4


def learner(**changes: Any) -> Learner:
    return tiny.learner(tiny.model(), tiny.recipe(**changes))


def damaged(good: bytes) -> Iterator[bytes]:
    dice = random.Random(0)
    for length in (0, 1, 4, 100, 5000, len(good) // 2, len(good) - 22, len(good) - 1):
        yield good[:length]
    for length in (1, 5, 50, 500) * 5:
        yield dice.randbytes(length)
    for _ in range(10):
        yield b"\x80\x02" + dice.randbytes(40)  # the beginning of a pickle
    for _ in range(10):
        flipped = bytearray(good)
        for _ in range(5):
            flipped[dice.randrange(len(flipped))] ^= 1 + dice.randrange(255)
        yield bytes(flipped)


def test_damaged_states_are_refused_in_one_line(tmp_path: Path) -> None:
    save_state(tmp_path, learner(), Progress(1), run=RUN)
    path, target = tmp_path / "last.pt", learner()
    before = {name: tensor.clone() for name, tensor in target.bare.state_dict().items()}
    for number, data in enumerate(damaged(path.read_bytes())):
        path.write_bytes(data)
        with pytest.raises(TrainingError, match="damaged or not a state of this package") as caught:
            load_state(tmp_path, target, run=RUN)
        assert str(path) in str(caught.value), number
        assert "\n" not in str(caught.value), number
    tiny.same_bits(dict(target.bare.state_dict()), before)


def test_one_changed_bit_of_a_weight_is_noticed(tmp_path: Path) -> None:
    save_state(tmp_path, learner(), Progress(1), run=RUN)
    path = tmp_path / "last.pt"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda item: item.file_size))
    data[data.index(largest[:64]) + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(TrainingError, match="checksum"):
        load_state(tmp_path, learner(), run=RUN)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"format": 99}, "format 99, this version reads 1"),
        ({}, "damaged or not a state"),
        ([1, 2], "holds one list"),
        (torch.zeros(3), "holds one Tensor"),
        ({"format": 1, "recipe": "no TOML", "run": {}}, "not TOML"),
    ],
)
def test_files_of_others_are_refused(content: Any, text: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match=text):
        load_state(tmp_path, learner(), run=RUN)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"format": 1, "recipe": Trap()}, tmp_path / "last.pt")
    with pytest.raises(TrainingError, match="damaged or not a state"):
        load_state(tmp_path, learner(), run=RUN)
    assert not (tmp_path / "trapped").exists()


def test_folder_in_the_place_of_the_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(TrainingError, match="Is a directory"):
        load_state(tmp_path, learner(), run=RUN)


def test_without_a_state_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert load_state(tmp_path / "nowhere", learner(), run=RUN) is None


# ---- disks that fail


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_the_previous_state(tmp_path: Path) -> None:
    first = learner()
    save_state(tmp_path, first, Progress(1, 50.0, 0), run=RUN)
    data = (tmp_path / "last.pt").read_bytes()
    for size in (0, 1000, len(data) - 10):
        with small_disk(size), pytest.raises(SaveError, match=r"cannot write .*last.pt: .*File too large") as caught:
            save_state(tmp_path, learner(), Progress(2), run=RUN)
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
        assert (tmp_path / "last.pt").read_bytes() == data
    second = learner()
    with torch.no_grad():
        second.bare.model.head.weight.zero_()
    assert load_state(tmp_path, second, run=RUN) == Progress(1, 50.0, 0)
    tiny.same_bits(dict(second.bare.state_dict()), dict(first.bare.state_dict()))


def test_run_that_met_a_full_disk_goes_on_when_there_is_space(uninterrupted: Path, tmp_path: Path) -> None:
    sizes = [(uninterrupted / name).stat().st_size for name in ("best/model.safetensors", "last.pt")]
    assert sizes[0] < sizes[1] // 2  # the disk has room for models, but not for a state
    epochs: list[int] = []

    with ExitStack() as disk:

        def fill_in_the_third(batches: Iterable[Any], _: int) -> Iterator[Any]:
            yield from batches
            epochs.append(len(epochs))
            if len(epochs) == 3:
                disk.enter_context(small_disk(sizes[1] // 2))

        with pytest.raises(SaveError, match=r"cannot write .*last.pt"):
            lively(tmp_path / "run", watch=fill_in_the_third)
    assert tiny.state(tmp_path / "run")["progress"]["epoch"] == 2
    lively(tmp_path / "run")
    same_run(tmp_path / "run", uninterrupted)


def test_loss_scale_of_fp16_is_kept(tmp_path: Path) -> None:
    first = learner(precision="fp16")
    first.scaler.scale(torch.ones(()))
    first.scaler.update(512.0)
    save_state(tmp_path, first, Progress(1), run=RUN)
    second = learner(precision="fp16")
    load_state(tmp_path, second, run=RUN)
    assert second.scaler.get_scale() == 512.0


# ---- the log and its curves


def test_unfinished_line_of_a_log_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n{"epo')
    assert read_log(path) == [{"epoch": 0}, {"epoch": 1}]
    log = RunLog(tmp_path, first_epoch=1, writes=True)
    log.add({"epoch": 1, "again": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"epoch": 0}, {"epoch": 1, "again": True}]
    RunLog(tmp_path, first_epoch=0, writes=False).add({"epoch": 0})
    assert len(read_log(path)) == 2  # only the first process writes
    assert read_log(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"epoch": 0}\n{"epo\n{"epoch": 2}\n', "line 2 is not a row of this log"),
        (b'{"epoch": 0}\n[1]\n', "line 2 is not a row of this log: no table"),
        (b'{"step": 0}\n', "line 1 is not a row of this log: no epoch"),
        (b'{"epoch": "0"}\n', "line 1 is not a row of this log: no epoch"),
        ('{"epoch": 0}\n'.encode("utf-16"), "not a text in utf-8"),
    ],
)
def test_damaged_log_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / LOG_NAME).write_bytes(content)
    with pytest.raises(TrainingError, match=rf"log\.jsonl.*{message}"):
        RunLog(tmp_path, first_epoch=3, writes=True)
    assert (tmp_path / LOG_NAME).read_bytes() == content


def test_full_disk_under_the_log_is_one_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, first_epoch=0, writes=True)
    log.path = Path("/dev/full")
    if not log.path.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(SaveError, match=r"cannot write /dev/full: .*No space left"):
        log.add({"epoch": 0})
