"""Images set aside for validation: a share of every class, the same for the same seed, written down."""

import json
from collections import Counter

import pytest
from coloured import Counted, Unlabelled, save_folders

from deit_models.data.datasets import open_dataset, wrap
from deit_models.data.records import SubsetRecords
from deit_models.data.split import keep_split, labels_of, one_class, parts, stratified_split
from deit_models.errors import ConfigError, DataError, TrainingError


def test_every_class_gives_its_share_and_no_image_is_lost():
    labels = [0] * 50 + [1] * 20 + [2] * 5
    split = stratified_split(labels, fraction=0.2, seed=0)
    assert Counter(labels[index] for index in split.val) == {0: 10, 1: 4, 2: 1}
    assert sorted(split.train + split.val) == list(range(75))
    assert split.train == sorted(split.train)


def test_seed_decides_which():
    labels = [0, 1] * 50
    first, again, other = (stratified_split(labels, fraction=0.2, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.val != other.val


def test_other_classes_do_not_hang_on_where_a_class_stands():
    one = stratified_split([0] * 10 + [1] * 10, fraction=0.3, seed=0)
    assert len([index for index in one.val if index < 10]) == 3


@pytest.mark.parametrize(("count", "given"), [(1, 0), (3, 0), (4, 1), (5, 1), (8, 2)])
def test_small_class_keeps_what_it_has(count, given, caplog):
    split = stratified_split([0] * 20 + [1] * count, fraction=0.2, seed=0)
    assert sum(index >= 20 for index in split.val) == given
    assert ("1 of 2 classes have too few images" in caplog.text) == (given == 0)


def test_two_images_a_class_are_divided_where_there_is_nothing_else():
    split = stratified_split([0, 0, 1, 1, 2], fraction=0.2, seed=0)
    assert len(split.val) == 2
    assert set(split.val) & {0, 1}
    assert set(split.val) & {2, 3}


def test_large_share_leaves_one_to_train_with():
    assert len(stratified_split([0] * 4 + [1] * 4, fraction=0.99, seed=0).train) == 2


def test_twenty_thousand_classes():
    labels = [number // 5 for number in range(100_000)]
    split = stratified_split(labels, fraction=0.2, seed=0)
    assert Counter(labels[index] for index in split.val) == dict.fromkeys(range(20_000), 1)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_share_must_be_one(fraction):
    with pytest.raises(ConfigError, match="expected more than 0 and less than 1"):
        stratified_split([0, 0, 1, 1], fraction=fraction, seed=0)


def test_single_images_cannot_be_divided():
    with pytest.raises(DataError, match="no class has two images, so none can be set aside"):
        stratified_split([0, 1, 2], fraction=0.2, seed=0)
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        stratified_split([-1, -1, -1], fraction=0.2, seed=0)


def test_labels_are_known_without_reading_images():
    records = Counted(9)
    assert labels_of(records) == [0, 1, 2] * 3
    assert labels_of(wrap(records)) == [0, 1, 2] * 3
    assert records.read == []
    assert labels_of(wrap(Unlabelled(records))) == [0, 1, 2] * 3
    assert records.read == list(range(9))


def test_unreadable_images_of_unknown_label_stay_in_training():
    class Broken(Counted):
        def __getitem__(self, index):
            if index == 4:
                raise OSError("broken")
            return super().__getitem__(index)

    labels = labels_of(wrap(Unlabelled(Broken(12))))
    assert labels[4] == -1
    assert 4 in stratified_split(labels, fraction=0.3, seed=0).train


def test_parts_have_the_images_and_the_classes_of_the_whole():
    records = Counted(12)
    split = stratified_split(labels_of(records), fraction=0.25, seed=0)
    train, val = parts(records, split)
    assert train.classes == val.classes == records.classes
    assert [val.label(i) for i in range(3)] == [records.label(i) for i in split.val]
    assert [val[i][1] for i in range(3)] == [val.label(i) for i in range(3)]
    assert [train.describe(i) for i in range(9)] == [records.describe(i) for i in split.train]


def test_split_is_recorded_by_the_files_names(tmp_path):
    records = open_dataset(save_folders(tmp_path / "photos", ("ant", "夜の虫")), "train")
    split = stratified_split(labels_of(records), fraction=0.2, seed=3)
    keep_split(tmp_path / "out", records, split)
    data = json.loads((tmp_path / "out" / "split.json").read_text(encoding="utf-8"))
    assert (data["seed"], data["fraction"], len(data["train"]), len(data["val"])) == (3, 0.2, 10, 2)
    assert {name.split("/")[0] for name in data["val"]} == {"ant", "夜の虫"}
    assert all((tmp_path / "photos" / name).is_file() for name in data["train"] + data["val"])


def test_split_of_other_images_is_not_written_over(tmp_path):
    records = open_dataset(save_folders(tmp_path / "photos"), "train")
    split = stratified_split(labels_of(records), fraction=0.2, seed=0)
    keep_split(tmp_path / "out", records, split)
    keep_split(tmp_path / "out", records, split)
    other = stratified_split(labels_of(records), fraction=0.2, seed=1)
    before = (tmp_path / "out" / "split.json").read_bytes()
    with pytest.raises(TrainingError, match=r"split.json is the split of other images, or with another seed"):
        keep_split(tmp_path / "out", records, other)
    assert (tmp_path / "out" / "split.json").read_bytes() == before
    with pytest.raises(TrainingError, match="is the split of other images"):  # images that are gone
        keep_split(tmp_path / "out", SubsetRecords(records, range(1, len(records))), split)
    for damaged in ("[]", "{}", "no JSON"):
        (tmp_path / "out" / "split.json").write_text(damaged)
        with pytest.raises(TrainingError, match="is the split of other images"):
            keep_split(tmp_path / "out", records, split)
    (tmp_path / "out" / "split.json").write_bytes(b"\x89PNG")
    with pytest.raises(TrainingError, match=r"split\.json: not a text in utf-8"):
        keep_split(tmp_path / "out", records, split)


@pytest.mark.parametrize("fewer", [range(11), range(0, 12, 2), range(1, 12)])
def test_images_that_were_added_are_for_training(fewer, tmp_path, caplog):
    records = open_dataset(save_folders(tmp_path / "photos"), "train")
    first = SubsetRecords(records, fewer)
    split = keep_split(tmp_path, first, stratified_split(labels_of(first), fraction=0.4, seed=0))
    held = [first.key(index) for index in split.val]
    fresh = stratified_split(labels_of(records), fraction=0.4, seed=0)
    for _ in range(2):
        more = keep_split(tmp_path, records, fresh)
        assert [records.key(index) for index in more.val] == held
        assert sorted(more.train + more.val) == list(range(len(records)))
    assert caplog.messages == [
        f"{tmp_path / 'split.json'}: {len(records) - len(first)} images were added since; they are for training"
    ]
    assert keep_split(tmp_path, records, fresh, write=False) == more


def test_image_with_several_labels_counts_for_the_rarest() -> None:
    labels = [(0, 1), (0,), (0, 2), (1, 2), (), -1, (0, 1)]
    assert one_class(labels) == [1, 0, 2, 2, 3, -1, 1]
    assert one_class([2, 0, -1]) == [2, 0, -1]


def test_split_of_several_labels_takes_its_share_of_each() -> None:
    labels = [(number % 2, 2) if number % 4 else () for number in range(80)]
    split = stratified_split(labels, fraction=0.25, seed=0)
    assert split == stratified_split(labels, fraction=0.25, seed=0)
    held = Counter(labels[index] for index in split.val)
    whole = Counter(labels)
    assert held == {label: round(count / 4) for label, count in whole.items()}
