"""Files of features, which survive any kill; retrieval and votes by independent arithmetic."""

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_model

from deit_models import create_model, optimize
from deit_models.data.records import ArrayRecords
from deit_models.errors import ConfigError, DataError, ImageError
from deit_models.predict import Classifier
from deit_models.scoring.embeddings import evaluate_knn, knn_accuracy, load_features, nearest_neighbours, retrieval


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of seven pictures, one of which is damaged, and the name of another is no Unicode."""
    root, generator = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for label in ("ant", "bee", "cat"):
        (root / label).mkdir()
        for i in range(7):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    (root / "bee" / "3.png").write_bytes(b"no picture")
    os.rename(root / "cat" / "6.png", os.fsencode(root / "cat") + b"/\xff.png")
    return root


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(tiny_model(), batch_size=4)


# Files


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_file_holds_the_embedding_path_and_label_of_every_image_that_can_be_read(
    classifier: Classifier, classes: Path, tmp_path: Path, suffix: str, storage: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    done = classifier.embed_files(classes, tmp_path / f"x{suffix}", labelled=True, storage=storage)
    found = load_features(tmp_path / f"x{suffix}")
    assert (done.images, done.width, len(done.unreadable)) == (20, 16, 1)
    assert "3.png: not an image" in done.unreadable[0]
    assert (tuple(found.embeddings.shape), str(found.embeddings.dtype)) == ((20, 16), f"torch.{storage}")
    assert found.labels == ("ant",) * 7 + ("bee",) * 6 + ("cat",) * 7
    expected = [str(path) for path in sorted(classes.rglob("*.png")) if path.parts[-2:] != ("bee", "3.png")]
    assert list(found.paths) == [name.encode("utf-8", "backslashreplace").decode() for name in expected]
    plain = classifier.embed(expected)
    torch.testing.assert_close(found.embeddings, plain.to(found.embeddings.dtype))
    assert plain.std(dim=0).min() > 0, "rows that are alike would hide a mistaken order"
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


def test_numpy_and_pandas_read_the_files_without_this_package(
    classifier: Classifier, classes: Path, tmp_path: Path
) -> None:
    classifier.embed_files(classes, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        assert sorted(arrays) == ["about", "embeddings", "paths"], "a folder that is not said to be labelled has none"
        rows = arrays["embeddings"]
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    classifier.embed_files(classes, tmp_path / "x.parquet", labelled=True)
    table = pandas.read_parquet(tmp_path / "x.parquet")
    assert list(table.columns) == ["embedding", "path", "label"]
    assert (np.stack(table.embedding) == rows).all()


def test_model_without_a_head_is_embedded_and_does_not_classify(classes: Path, tmp_path: Path) -> None:
    whole, headless = Classifier(tiny_model()), Classifier(tiny_model(num_classes=0))
    headless.model.load_state_dict(whole.model.state_dict(), strict=False)
    assert headless.embed_files(classes, tmp_path / "x.npz").images == 20
    torch.testing.assert_close(load_features(tmp_path / "x.npz").embeddings, whole.embed(_readable(classes)))
    with pytest.raises(ConfigError, match="num_classes=0, no head and no classes"):
        headless(classes / "ant" / "1.png")


def _readable(classes: Path) -> list[Path]:
    return [path for path in sorted(classes.rglob("*.png")) if path.parts[-2:] != ("bee", "3.png")]


@pytest.mark.parametrize("name", ["levit_128s", "t2t_vit_7", "vit_resnas_tiny"])
def test_every_family_is_embedded(name: str) -> None:
    import deit_models

    model = deit_models.create_model(name, img_size=64 if name != "vit_resnas_tiny" else 224).eval()
    images = [Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20 + i).convert("RGB") for i in range(3)]
    with torch.no_grad():
        expected = model.embed(torch.stack([deit_models.transform_for(model)(image) for image in images]))
    torch.testing.assert_close(Classifier(model, batch_size=2).embed(images), expected, atol=1e-5, rtol=1e-4)


def test_embedding_one_image_or_none_gives_a_matrix(classifier: Classifier, classes: Path) -> None:
    assert classifier.embed(classes / "ant" / "0.png").shape == (1, 16)
    assert classifier.embed([]).shape == (0, 16)
    with pytest.raises(ImageError, match="not an image"):
        classifier.embed(classes / "bee" / "3.png")


def test_images_none_of_which_can_be_read_give_an_empty_file(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no")
    done = classifier.embed_files([tmp_path / "a.jpg"], tmp_path / "x.npz")
    assert (done.images, len(done.unreadable)) == (0, 1)
    assert load_features(tmp_path / "x.npz").embeddings.shape == (0, 16)


def test_other_files_are_no_features(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    (tmp_path / "y.npz").write_text("no")
    for name in ("x.npz", "y.npz", "z.npz"):
        with pytest.raises(DataError, match=f"{name} is no file of features"):
            load_features(tmp_path / name)


# Interruptions


def test_existing_file_is_neither_lost_nor_taken_for_another_run(
    classifier: Classifier, classes: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.npz"
    first = classifier.embed_files(classes, file)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"x\.npz exists; --resume .*--overwrite"):
        classifier.embed_files(classes, file)
    assert classifier.embed_files(classes, file, resume=True) == first, "nothing to do"
    changes = {
        "model": lambda: Classifier(tiny_model(seed=1)).embed_files(classes, file, resume=True),
        "storage": lambda: classifier.embed_files(classes, file, resume=True, storage="float16"),
        "images": lambda: classifier.embed_files(classes / "ant", file, resume=True),
        "names": lambda: classifier.embed_files(classes, file, resume=True, labelled=True),
        "preprocessing": lambda: Classifier(tiny_model(), fast_pixels=True).embed_files(classes, file, resume=True),
    }
    for name, change in changes.items():
        with pytest.raises(ConfigError, match=rf"x\.npz is of another run \({name}: .* then, .* now\)"):
            change()
    assert file.read_bytes() == before
    assert classifier.embed_files(classes / "ant", file, overwrite=True).images == 7


class KilledError(Exception):
    """Stands for a kill, at any time."""


def test_run_that_is_killed_after_any_batch_goes_on_and_embeds_no_finished_block_again(
    classifier: Classifier, classes: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.npz"
    classifier.embed_files(classes, whole)
    classifier.batch_size = 1  # 21 batches, and as many blocks: a block is a sixteenth of a short list
    for last in range(0, 21, 4):
        file, seen = tmp_path / f"{last}.npz", []

        def killing(batches, _, last=last, seen=seen):
            for number, batch in enumerate(batches):
                if number == last:
                    raise KilledError
                seen.append(batch.sources[0])
                yield batch

        with pytest.raises(KilledError):
            classifier.embed_files(classes, file, watch=killing)
        assert not file.exists()
        if last:
            with pytest.raises(ConfigError, match="exists; --resume"):
                classifier.embed_files(classes, file)

        def noting(batches, _, seen=seen):
            for batch in batches:
                seen.append(batch.sources[0])
                yield batch

        assert classifier.embed_files(classes, file, resume=True, watch=noting).images == 20
        assert len({*seen}) == 21
        assert len(seen) <= 22
        torch.testing.assert_close(load_features(file).embeddings, load_features(whole).embeddings)
        assert load_features(file).paths == load_features(whole).paths
        assert not list(tmp_path.glob("*.parts"))


# Retrieval, against arithmetic of another kind: loops over Python's numbers


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def ranking(rows: list[list[float]], query: int) -> list[int]:
    others = [i for i in range(len(rows)) if i != query]
    return sorted(others, key=lambda i: -cosine(rows[query], rows[i]))


def test_recall_and_map_equal_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(37, 5, generator=generator)
    labels = [draw.choice("abcd") if i else "alone" for draw in [random.Random(0)] for i in range(37)]
    found = retrieval(embeddings, labels, ks=(1, 2, 5, 99))
    rows, hits, precisions = embeddings.tolist(), {1: 0, 2: 0, 5: 0, 99: 0}, []
    for query in range(1, 37):
        right = [labels[i] == labels[query] for i in ranking(rows, query)]
        for k in hits:
            hits[k] += any(right[:k])
        places = [place for place, is_right in enumerate(right, start=1) if is_right]
        precisions.append(sum(n / place for n, place in enumerate(places, start=1)) / len(places))
    assert found.queries == 36, "an image alone in its class is not asked for"
    assert found.recall == pytest.approx({k: 100 * count / 36 for k, count in hits.items()})
    assert found.mean_average_precision == pytest.approx(100 * sum(precisions) / 36, abs=1e-4)
    assert 0 < found.recall[1] < found.recall[2] < found.recall[99] == 100


@pytest.mark.parametrize("with_queries", [False, True])
def test_neighbours_and_their_vote_equal_their_definitions(with_queries: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings, draw = torch.randn(60, 4, generator=generator), random.Random(1)
    labels = [draw.choice("abc") for _ in range(60)]
    stored = range(40) if with_queries else range(60)
    asked = range(40, 60) if with_queries else range(60)
    queries = embeddings[40:] if with_queries else None
    rows, right = embeddings.tolist(), 0
    similarity, numbers = nearest_neighbours(embeddings[: len(stored)], queries, k=7)
    for place, query in enumerate(asked):
        near = sorted((i for i in stored if i != query), key=lambda i: -cosine(rows[query], rows[i]))[:7]
        assert numbers[place].tolist() == near
        assert similarity[place].tolist() == pytest.approx([cosine(rows[query], rows[i]) for i in near], abs=1e-5)
        votes = {label: 0.0 for label in "abc"}
        for i in near:
            votes[labels[i]] += math.exp(cosine(rows[query], rows[i]) / 0.5)
        right += max(votes, key=votes.get) == labels[query]
    known, wanted = labels[: len(stored)], labels[40:] if with_queries else ()
    found = knn_accuracy(embeddings[: len(stored)], known, queries, wanted, k=7, temperature=0.5)
    assert found == pytest.approx(100 * right / len(asked))
    assert 0 < right < len(asked)


def test_many_images_are_compared_in_chunks_with_the_same_figures() -> None:
    generator = torch.Generator().manual_seed(2)
    embeddings, labels = torch.randn(3000, 6, generator=generator), torch.arange(3000) % 40
    rows = embeddings.double().numpy()  # 9 million similarities; a chunk holds 4 million
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    matrix = rows @ rows.T
    np.fill_diagonal(matrix, -2)
    order = (-matrix).argsort(axis=1)[:, :-1]
    assert (nearest_neighbours(embeddings, k=3)[1].numpy() == order[:, :3]).mean() > 0.999
    hits = labels.numpy()[order] == labels.numpy()[:, None]
    found = retrieval(embeddings, labels, ks=(1, 10))
    assert [found.recall[1], found.recall[10]] == pytest.approx([100 * hits[:, :k].any(1).mean() for k in (1, 10)])
    precision = (hits.cumsum(1) / np.arange(1, 3000) * hits).sum(1) / hits.sum(1)
    assert found.mean_average_precision == pytest.approx(100 * precision.mean(), abs=1e-3)


def test_votes_of_many_queries_are_counted_in_parts() -> None:
    generator = torch.Generator().manual_seed(3)
    embeddings, queries = torch.randn(50, 6, generator=generator), torch.randn(2500, 6, generator=generator)
    labels, wanted = torch.arange(50) % 7, torch.arange(2500) % 7
    parts = [
        knn_accuracy(embeddings, labels, queries[i : i + 500], wanted[i : i + 500], k=5) for i in range(0, 2500, 500)
    ]
    assert knn_accuracy(embeddings, labels, queries, wanted, k=5) == pytest.approx(sum(parts) / 5)


def test_vote_is_that_of_scikit_learn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = torch.Generator().manual_seed(4)
    embeddings, labels = torch.randn(400, 8, generator=generator), torch.arange(400) % 6
    theirs = neighbors.KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(embeddings[:300].numpy(), labels[:300].numpy())
    expected = 100 * theirs.score(embeddings[300:].numpy(), labels[300:].numpy())
    assert knn_accuracy(embeddings[:300], labels[:300], embeddings[300:], labels[300:]) == pytest.approx(expected)
    assert 0 < expected < 100


def test_model_and_two_sets_give_the_accuracy_of_their_features(classifier: Classifier, classes: Path) -> None:
    """Of the training images one is damaged; a class of theirs is not among those that are asked for."""
    draw = np.random.default_rng(5)
    pixels, labels = draw.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), draw.integers(0, 2, 40).tolist()
    pixels[::2] = 0  # as the damaged image would be
    found = evaluate_knn(
        classifier.model, classes, ArrayRecords("noise", pixels, labels, ("cat", "ant")), k=3, batch_size=8, workers=0
    )
    files = _readable(classes)
    known, asked = (classifier.embed([*images]) for images in (files, pixels))
    names = [path.parent.name for path in files]
    expected = knn_accuracy(known, names, asked, [("cat", "ant")[label] for label in labels], k=3)
    assert (found.images, found.top1) == (40, pytest.approx(expected))
    assert 0 < expected < 100
    for labels, name, kind, text in (
        ([0, 0], "dog", DataError, "lack classes of noise: dog"),
        ([(0,), ()], "ant", ConfigError, "several labels"),
    ):
        with pytest.raises(kind, match=text):
            evaluate_knn(classifier.model, classes, ArrayRecords("noise", pixels[:2], labels, (name,)), workers=0)


def test_copies_of_one_image_are_found_before_all_others() -> None:
    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    _, numbers = nearest_neighbours(rows.half(), k=1)
    assert numbers.flatten().tolist() == [*range(8, 16), *range(8)]
    assert retrieval(rows, [*range(8)] * 2).recall[1] == 100
    assert knn_accuracy(rows, torch.arange(8).repeat(2), k=1) == 100


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda rows: retrieval(rows, "ab"), "2 labels of 4 embeddings"),
        (lambda rows: retrieval(rows, "aabb", ks=(0,)), r"ks=\(0,\)"),
        (lambda rows: retrieval(rows, "abcd"), "no two of one class"),
        (lambda rows: knn_accuracy(rows, "aabb", temperature=0), "temperature=0"),
        (lambda rows: knn_accuracy(rows, "aabb", rows), "4 labels of 8 embeddings"),
        (lambda rows: nearest_neighbours(rows, k=0), "k=0, 4 embeddings"),
        (lambda rows: nearest_neighbours(rows[:1]), "k=10, 1 embeddings"),
        (lambda rows: nearest_neighbours(rows, rows[0]), r"shapes \(4, 3\) and \(3,\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(call: Callable[[torch.Tensor], object], text: str) -> None:
    with pytest.raises((ConfigError, DataError), match=text):
        call(torch.ones(4, 3))


def test_settings_stand_in_the_file(classifier: Classifier, classes: Path, tmp_path: Path) -> None:
    classifier.embed_files(classes, tmp_path / "x.npz")
    about = load_features(tmp_path / "x.npz").about
    assert (about["images"], about["width"], about["storage"], len(about["unreadable"])) == (21, 16, "float32", 1)
    assert json.dumps(dict(about))


def test_optimised_model_has_no_embeddings_and_says_so() -> None:
    classify = Classifier(optimize(tiny_model("deit_micro_patch4_32"), sample=1, backend="eager", precision="float32"))
    with pytest.raises(ConfigError, match="has no embed"):
        classify.embed(np.zeros((32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["deit_micro_distilled_patch4_32", "levit_128s", "vit_res_micro_patch4_32"])
def test_no_image_gives_as_many_columns_as_one(name: str) -> None:
    classify = Classifier(create_model(name))
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    assert classify.embed([]).shape == (0, classify.embed(image).shape[1])
