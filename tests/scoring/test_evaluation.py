"""Evaluation: every readable image once, the figures of a plain loop, the model left as it was; and dying workers."""

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import PIL.Image
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler

import deit_models
from deit_models.batches.inputs import eval_batches
from deit_models.batches.loading import DamageCount, explained_worker_failure, make_loader
from deit_models.data.records import ArrayRecords, ImageRecords
from deit_models.errors import ConfigError, DataError, TrainingError
from deit_models.images.transforms import EvalTransform
from deit_models.models.layers import ImageClassifier
from deit_models.scoring import evaluation
from deit_models.scoring.evaluation import (
    Heads,
    Match,
    in_the_models_order,
    match_classes,
    score,
    score_each,
)
from deit_models.scoring.outcomes import Evaluation, Tally

evaluate = partial(evaluation.evaluate, device="cpu")


def plain_loop(model: ImageClassifier, pictures: tiny.Pictures, indices: list[int]) -> tuple[float, float, float]:
    """Top-1, top-5 and loss, image by image."""
    images, right, right5, loss = pictures.tensors(model.origin.preprocessing), 0, 0, 0.0
    with torch.no_grad():
        for index in indices:
            cls, dist = model.forward_heads(images[index : index + 1])
            logits = (cls if dist is None else (cls + dist) / 2)[0].double()
            label = int(pictures.labels[index])
            above = int((logits > logits[label]).sum())
            right, right5 = right + (above < 1), right5 + (above < 5)
            loss -= float(logits.log_softmax(0)[label])
    count = len(indices)
    return 100 * right / count, 100 * right5 / count, loss / count


def sharp(**options: Any) -> ImageClassifier:
    """A model that is sure of its answers, so that rounding cannot change their order; in eval mode."""
    model = tiny.model(num_classes=7, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


@pytest.mark.parametrize("distilled", [False, True], ids=["one head", "two heads"])
@pytest.mark.parametrize(("batch_size", "workers"), [(256, 0), (7, 0), (1, 0), (10, 1)])
def test_figures_are_those_of_a_plain_loop(distilled: bool, batch_size: int, workers: int) -> None:
    model, pictures = sharp(distilled=distilled), tiny.Pictures(41, classes=7)
    result = evaluate(model, pictures, batch_size=batch_size, workers=workers)
    top1, top5, loss = plain_loop(model, pictures, list(range(41)))
    assert 0 < top1 < top5 < 100
    assert (result.images, result.skipped) == (41, 0)
    assert (result.top1, result.top5) == pytest.approx((top1, top5), rel=1e-12)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    if workers == 0:
        assert pictures.read == list(range(41))


def test_each_head_has_its_own_figure() -> None:
    model, pictures = sharp(distilled=True), tiny.Pictures(30, classes=7)
    with torch.no_grad():
        cls, dist = model.forward_heads(pictures.tensors(model.origin.preprocessing))
    expected = [100 * float((logits.argmax(1) == pictures.labels).double().mean()) for logits in (cls, dist)]
    result = evaluate(model, pictures, workers=0)
    assert result.heads == pytest.approx({"class": expected[0], "distillation": expected[1]})
    assert evaluate(sharp(), pictures, workers=0).heads == {}


def test_unreadable_images_are_skipped_and_counted() -> None:
    model = sharp()
    broken = tiny.Pictures(40, classes=7, broken=(0, 13, 39))
    readable = [index for index in range(40) if index not in broken.broken]
    result = evaluate(model, broken, batch_size=9, workers=0, corrupt_limit=0.1)
    top1, top5, loss = plain_loop(model, broken, readable)
    assert (result.images, result.skipped) == (37, 3)
    assert (result.top1, result.top5, result.loss) == pytest.approx((top1, top5, loss), rel=1e-5)


def test_too_many_unreadable_images_stop_it() -> None:
    broken = tiny.Pictures(400, broken=range(100, 110))
    with pytest.raises(
        DataError, match=r"at least 5 of the 400 images of noise .* limit of 1\.0%.* image 104"
    ) as caught:
        evaluate(tiny.model(), broken, batch_size=1, workers=0)
    assert "\n" not in str(caught.value)
    assert broken.read == [*range(105), 104]  # the last one again, for the reason
    # what counts is the share of all images, not of those seen so far
    assert evaluate(tiny.model(), tiny.Pictures(400, broken=range(4)), batch_size=1, workers=0).skipped == 4
    # two are no cause for alarm, however few images there are
    assert evaluate(tiny.model(), tiny.Pictures(4, broken=(1, 2)), workers=0).skipped == 2


def test_nothing_readable_gives_no_figures() -> None:
    result = evaluate(tiny.model(), tiny.Pictures(2, broken=(0, 1)), workers=0)
    assert result == Evaluation(top1=0.0, top5=0.0, loss=0.0, images=0, skipped=2, balanced_accuracy=0.0)


def test_top5_of_three_classes_is_everything() -> None:
    result = evaluate(tiny.model(), tiny.Pictures(12), workers=0)
    assert result.top5 == 100
    assert result.top1 < 100


def test_average_of_the_logits_counts_not_the_first_head() -> None:
    class TwoHeads(nn.Module):
        def forward(self, x: Tensor) -> Any:
            from deit_models.models.layers import HeadLogits

            sure = torch.tensor([[5.0, 0.0, 0.0]]).expand(len(x), 3)
            return HeadLogits(sure, sure.flip(1) * 2)

    pictures = tiny.Pictures(20)
    batches = eval_batches(pictures, EvalTransform(tiny.PREPROCESSING), tiny.ALONE, batch_size=8, workers=0)
    damage = DamageCount(pictures, 0.01)
    result = score(TwoHeads(), batches, tiny.ALONE, precision="float32", damage=damage).evaluation()
    share = [100 * float((pictures.labels == label).double().mean()) for label in range(3)]
    assert [result.top1, *result.heads.values()] == pytest.approx([share[2], share[0], share[2]])


def test_padding_counts_for_nothing() -> None:
    model, pictures = Heads(tiny.model()), tiny.Pictures(13, broken=(12,))
    results = []
    for rounds in (None, 3, 9):
        batches = eval_batches(pictures, EvalTransform(tiny.PREPROCESSING), tiny.ALONE, batch_size=5, workers=0)
        damage = DamageCount(pictures, 0.2)
        found = score_each({"": model}, batches, tiny.ALONE, precision="float32", damage=damage, rounds=rounds)
        results.append(found[""].evaluation())
        assert damage.failed == {12}
    assert results[0] == results[1] == results[2]
    assert results[0].images == 12


def test_counting_waits_for_no_device() -> None:
    # tensors of the device "meta" have no values: whatever would have to read one back fails
    logits, labels = torch.empty(6, 3, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    tally = Tally()
    for _ in range(2):
        tally.add([logits, logits], labels)
    with pytest.raises(NotImplementedError, match="meta"):
        tally.outcomes()


def test_several_models_are_scored_in_one_pass() -> None:
    pictures = tiny.Pictures(41, classes=7, broken=(3,))
    models = {"": sharp(distilled=True), "other_": sharp(seed=1)}
    each = {
        name: evaluate(model, pictures, batch_size=9, workers=0, corrupt_limit=0.1) for name, model in models.items()
    }
    pictures.read.clear()
    transform = EvalTransform(models[""].origin.preprocessing)
    batches = eval_batches(pictures, transform, tiny.ALONE, batch_size=9, workers=0)
    heads, damage = {name: Heads(model) for name, model in models.items()}, DamageCount(pictures, 0.1)
    found = score_each(heads, batches, tiny.ALONE, precision="float32", damage=damage)
    assert {name: outcomes.evaluation() for name, outcomes in found.items()} == each
    assert each[""] != each["other_"]
    assert pictures.read == list(range(41))


def test_pixels_travel_as_bytes() -> None:
    pictures, transform = tiny.Pictures(5), EvalTransform(tiny.PREPROCESSING)
    batches = eval_batches(pictures, transform, tiny.ALONE, batch_size=5, workers=1)
    ((values, _, _),) = batches.loader
    assert values.dtype == torch.uint8
    ((images, _, _),) = batches
    assert torch.equal(images, torch.stack([transform(pictures[index][0]) for index in range(5)]))


# ---- the model afterwards


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_mode_of_every_module_is_left_as_found(training: bool, fails: bool) -> None:
    model = tiny.model(drop_rate=0.5).train(training)
    model.blocks[0].train(not training)  # a part that its owner froze, or set free
    before = modes(model)
    if fails:
        with pytest.raises(DataError):
            evaluate(model, tiny.Pictures(9, broken=range(9)), workers=0)
    else:
        evaluate(model, tiny.Pictures(9), workers=0)
    assert modes(model) == before
    assert len(set(before.values())) == 2
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()  # no inference tensor is left in it


def test_dropout_is_off_whatever_the_mode() -> None:
    model, pictures = tiny.model(drop_rate=0.5, drop_path_rate=0.5), tiny.Pictures(20)
    first, second = (evaluate(model.train(training), pictures, workers=0) for training in (True, False))
    assert first == second


# ---- what is refused


def test_other_classes_than_the_model_are_refused() -> None:
    with pytest.raises(DataError, match="noise has 3 classes, the model has 5"):
        evaluate(tiny.model(num_classes=5), tiny.Pictures(9), workers=0)
    foreign = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(DataError, match="noise has 3 classes, the model 2"):
        evaluate(foreign, tiny.Pictures(9), workers=0, transform=EvalTransform(tiny.PREPROCESSING))


def test_model_that_does_not_know_its_input_needs_a_transform() -> None:
    foreign = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ConfigError, match="does not say how its input is normalised"):
        evaluate(foreign, tiny.Pictures(9), workers=0)
    assert evaluate(foreign, tiny.Pictures(9), workers=0, transform=EvalTransform(tiny.PREPROCESSING)).images == 9


# ---- workers that die


class Trouble(tiny.Pictures):
    """Calls something when image 5 is asked for."""

    def __init__(self, trouble: Callable[[], None]) -> None:
        super().__init__(12)
        self.trouble = trouble

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        if index == 5:
            self.trouble()
        return super().__getitem__(index)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_17_1>: No space left on device (28)")


def mistake() -> None:
    raise RuntimeError("a mistake of the user's data set, not of the shared memory")


def unreadable() -> None:
    raise DataError("photos/: image 5 and those after it cannot be read")


@pytest.mark.parametrize("trouble", [die, full])
def test_dead_worker_is_one_line_that_says_what_to_do(trouble: Callable[[], None]) -> None:
    with pytest.raises(TrainingError, match=r"/dev/shm, .*--shm-size.* fewer than 1 workers") as caught:
        evaluate(tiny.model(), Trouble(trouble), batch_size=2, workers=1)
    assert "\n" not in str(caught.value)


class Masked(Dataset[bool]):
    """Says whether the process that reads it holds back Ctrl-C."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> bool:
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals as POSIX has them")
@pytest.mark.parametrize("workers", [0, 1])
def test_workers_leave_ctrl_c_to_their_parent(workers: int) -> None:
    data, device = Masked(), torch.device("cpu")
    loader = make_loader(data, SequentialSampler(data), batch_size=1, workers=workers, device=device)
    assert torch.cat(list(loader)).tolist() == [workers == 1] * 2
    assert not data[0]


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_worker_that_hangs_up_is_dead_and_the_news_of_it_is_awaited(error: Exception) -> None:
    def news(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    before = signal.signal(signal.SIGALRM, news)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(TrainingError, match="fewer than 2 workers"), explained_worker_failure(2):
            raise error
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0, "the signal did not come while it was awaited"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(type(error)), explained_worker_failure(0):
        raise error


def test_other_errors_of_a_worker_are_not_taken_for_its_death() -> None:
    with pytest.raises(RuntimeError, match="a mistake of the user's data set") as caught:
        evaluate(tiny.model(), Trouble(mistake), batch_size=2, workers=1)
    assert not isinstance(caught.value, TrainingError)


def test_our_errors_come_from_a_worker_as_the_one_line_they_are() -> None:
    with pytest.raises(DataError) as caught:
        evaluate(tiny.model(), Trouble(unreadable), batch_size=2, workers=1)
    assert str(caught.value) == "photos/: image 5 and those after it cannot be read"


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
        "unable to open shared memory object </torch_7_8> in read-write mode: Too many open files (24)",
        "unable to mmap 602112 bytes from file </torch_7_8>: Cannot allocate memory (12)",
        "unable to write to file </torch_7_8>: No space left on device (28)",
        "received 0 items of ancdata",
    ],
)
def test_torchs_words_for_too_little_shared_memory_are_known(text: str) -> None:
    with pytest.raises(TrainingError, match="fewer than 4 workers"), explained_worker_failure(4):
        raise RuntimeError(text)


def test_errors_of_the_training_process_pass_unchanged() -> None:
    raised: list[Exception] = [
        RuntimeError("out of resource: shared memory, Required: 5, Hardware limit: 4"),
        TrainingError("the loss is no longer a number"),
        OSError("disk"),
        DataError("x"),
    ]

    def attempts() -> Iterator[Exception]:
        for error in raised:
            try:
                with explained_worker_failure(4):
                    raise error
            except (RuntimeError, OSError, DataError) as caught:
                yield caught

    assert list(attempts()) == raised


def test_classes_are_matched_by_name() -> None:
    model, pictures = tiny.model(), tiny.Pictures(12)
    model.origin = dataclasses.replace(model.origin, class_names=("cow", "ant", "bee"))
    levels, labels = pictures.levels.numpy(), pictures.labels.tolist()
    scores = []
    for names in (("cow", "ant", "bee"), ("ant", "bee", "cow")):
        numbers = [names.index(model.origin.class_names[label]) for label in labels]
        scores.append(evaluate(model, ArrayRecords("farm", levels, numbers, names), workers=0))
    assert scores[0] == scores[1]  # the same images, numbered otherwise
    strangers = ArrayRecords("zoo", levels, labels, ("cow", "ant", "gnu"))
    with pytest.raises(DataError, match=r"the model alone knows bee, the data alone has gnu; .*ignore_class_names"):
        evaluate(model, strangers, workers=0)
    assert evaluate(model, strangers, workers=0, ignore_class_names=True) == scores[0]


def test_a_multi_label_model_is_not_scored_by_one_class_an_image() -> None:
    model = tiny.model()
    model.origin = dataclasses.replace(model.origin, problem_type="multi_label_classification")
    with pytest.raises(ConfigError, match="evaluation needs one class"):
        evaluate(model, tiny.Pictures(4))


# Which label is which logit

PLAIN = "deit_micro_patch4_32"
CLASSES = ("ant", "bee", "cow")


class Named(ImageRecords):
    """Class names and one image for each."""

    def __init__(self, classes, name="photos"):
        self.name, self.classes = name, tuple(classes)

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        return PIL.Image.new("RGB", (1, 1), (index, 0, 0)), index


def imagenet_model(**origin):
    model = deit_models.create_model(PLAIN, num_classes=1000)
    model.origin = dataclasses.replace(model.origin, **{"dataset": "ImageNet-1k", **origin})
    return model


WORDNET_IDS = [f"n{number:08}" for number in range(1000)]


def test_imagenet_is_known_by_its_wordnet_ids_and_by_torchvisions_names():
    as_they_are = Match(tuple(range(1000)))
    assert match_classes(imagenet_model(), Named(WORDNET_IDS)) == as_they_are
    synonyms = [f"name {number}, other name" for number in range(1000)]
    assert match_classes(imagenet_model(), Named(synonyms, "imagenet")) == as_they_are
    # a checkpoint from the Hub, which calls its classes by words
    assert match_classes(imagenet_model(class_names=tuple(synonyms)), Named(WORDNET_IDS)) == as_they_are
    assert (
        match_classes(imagenet_model(class_names=tuple(synonyms[::-1])), Named(synonyms)).order
        == tuple(range(1000))[::-1]
    )


def test_imagenets_order_is_not_taken_for_granted():
    assert match_classes(imagenet_model(), Named(WORDNET_IDS[::-1])).order is None
    names = [f"name {number}" for number in range(1000)]
    match = match_classes(imagenet_model(), Named(names))
    assert match.order is None
    assert match.difference.startswith("the model alone knows tench, goldfish, great white shark and 997 more")
    # one that was trained on folders in another order
    trained = imagenet_model(class_names=tuple(WORDNET_IDS[::-1]))
    assert match_classes(trained, Named(WORDNET_IDS)).order == tuple(range(1000))[::-1]


def test_two_classes_of_one_name_cannot_be_matched():
    model = deit_models.create_model(PLAIN, num_classes=3)
    model.origin = dataclasses.replace(model.origin, class_names=("crane", "crane", "cow"))
    assert match_classes(model, Named(("crane", "cow", "ant"))).order is None


def test_labels_follow_names_and_numbers_only_where_the_model_has_no_names(caplog):
    model = deit_models.create_model(PLAIN, num_classes=3)
    records = Named(("cow", "ant", "bee"))
    assert in_the_models_order(model, records) is records
    assert caplog.messages == ["the model does not name its classes: taken to be in the order of photos"]
    model.origin = dataclasses.replace(model.origin, class_names=("ant", "bee", "cow"))
    matched = in_the_models_order(model, records)
    assert matched.classes == ("ant", "bee", "cow")
    assert [matched[i][1] for i in range(3)] == [2, 0, 1]
    assert in_the_models_order(model, matched) is matched
    model.origin = dataclasses.replace(model.origin, class_names=("ant", "bee", "gnu"))
    with pytest.raises(DataError, match="the model alone knows gnu, the data alone has cow"):
        in_the_models_order(model, records)
    assert in_the_models_order(model, records, ignore_class_names=True) is records
    with pytest.raises(DataError, match="photos has 2 classes, the model has 3"):
        in_the_models_order(model, Named(("ant", "owl")))


@pytest.mark.parametrize(
    ("classes", "logits"),
    [
        (("n01440764", "n15075141", "n02102040"), [0, 999, 217]),
        (("toilet tissue", "goldfish"), [999, 1]),
        (("Great_White_Shark", "english-springer"), [2, 217]),
        (("tench, Tinca tinca", "ear, spike, capitulum"), [0, 998]),
        (("0", "017", "999"), [0, 17, 999]),
    ],
)
def test_some_of_the_models_classes_are_matched_by_name_id_or_number(classes, logits, caplog):
    records = in_the_models_order(imagenet_model(), Named(classes))
    assert [records.label(i) for i in range(len(classes))] == logits
    assert [records[i][1] for i in range(len(classes))] == logits
    assert len(records.classes) == 1000
    assert f"photos: {len(classes)} of the model's 1000 classes, matched by" in caplog.text


@pytest.mark.parametrize(
    "classes",
    [
        ("n00000000", "n01440764"),
        ("tench", "cauliflower ear"),
        ("goldfish", "Goldfish"),
        ("1", "1000"),
        ("1", "01"),
        ("tench", "5"),
    ],
)
def test_classes_that_the_model_lacks_or_that_are_one_are_refused(classes):
    with pytest.raises(DataError, match="photos has 2 classes, the model has 1000"):
        in_the_models_order(imagenet_model(), Named(classes))


def test_wordnet_ids_are_those_of_imagenets_order_alone():
    other = imagenet_model(class_names=tuple(f"kind {number}" for number in range(1000)))
    with pytest.raises(DataError, match="photos has 2 classes"):
        in_the_models_order(other, Named(("n01440764", "n15075141")))


def test_numbered_folders_are_in_the_order_of_their_numbers(caplog):
    model = deit_models.create_model(PLAIN, num_classes=12)
    records = in_the_models_order(model, Named(sorted(map(str, range(12)))))
    assert [records.label(i) for i in range(4)] == [0, 1, 10, 11]
    assert "matched by number" in caplog.text
