"""Class names: those of a model and of a data set, and which label is which logit."""

from dataclasses import replace

import PIL.Image
import pytest

import deit_models
from deit_models.data.classes import Match, in_the_models_order, match_classes
from deit_models.data.records import ImageRecords, SubsetRecords
from deit_models.errors import DataError

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
    model.origin = replace(model.origin, **{"dataset": "ImageNet-1k", **origin})
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
    model.origin = replace(model.origin, class_names=("crane", "crane", "cow"))
    assert match_classes(model, Named(("crane", "cow", "ant"))).order is None


def test_relabelled_images_keep_their_description_and_name():
    records = Named(CLASSES)
    other = SubsetRecords(records, range(3), classes=("bee", "cow", "ant"))  # ant becomes 2, bee 0, cow 1
    assert other.classes == ("bee", "cow", "ant")
    assert [other[i][1] for i in range(3)] == [2, 0, 1]
    assert [other[i][0].getpixel((0, 0))[0] for i in range(3)] == [0, 1, 2]
    assert (len(other), other.name, other.describe(1)) == (3, "photos", records.describe(1))


def test_labels_follow_names_and_numbers_only_where_the_model_has_no_names(caplog):
    model = deit_models.create_model(PLAIN, num_classes=3)
    records = Named(("cow", "ant", "bee"))
    assert in_the_models_order(model, records) is records
    assert caplog.messages == ["the model does not name its classes: taken to be in the order of photos"]
    model.origin = replace(model.origin, class_names=("ant", "bee", "cow"))
    matched = in_the_models_order(model, records)
    assert matched.classes == ("ant", "bee", "cow")
    assert [matched[i][1] for i in range(3)] == [2, 0, 1]
    assert in_the_models_order(model, matched) is matched
    model.origin = replace(model.origin, class_names=("ant", "bee", "gnu"))
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
