"""A file of outcomes is written in parts that survive a kill, and gives the figures of one uninterrupted pass."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from deit_models.errors import ConfigError, DataError
from deit_models.scoring import evaluation
from deit_models.scoring.outcomes import Evaluation, in_blocks

evaluate = partial(evaluation.evaluate, device="cpu", workers=0)


def killed_after(count: int) -> Any:
    """A `watch` that fails before batch number `count`, as if the process had been killed."""

    def watch(batches: Any, _: int) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number == count:
                raise KeyboardInterrupt
            yield batch

    return watch


def figures(result: Evaluation) -> dict[str, float]:
    """All figures that there are, by name."""
    known = asdict(result)
    return {name: figure for name, figure in (known | known.pop("heads")).items() if figure is not None}


@pytest.mark.parametrize("images", [tiny.Pictures(41, broken=(3, 40)), tiny.Several(41, broken=(3, 40))])
@pytest.mark.parametrize("distilled", [False, True], ids=["one head", "two heads"])
def test_run_that_is_killed_four_times_gives_the_figures_of_one_pass(
    images: tiny.Pictures, distilled: bool, tmp_path: Path
) -> None:
    model, output, sizes = tiny.model(distilled=distilled), tmp_path / "rows.npz", iter([3, 1, 7, 2])
    assert model.origin is not None
    if images.multi_label:
        model.origin = replace(model.origin, problem_type="multi_label_classification")
    whole = evaluate(model, images, corrupt_limit=0.1)
    images.read.clear()
    for size in sizes:
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, images, output=output, resume=True, batch_size=size, watch=killed_after(8 // size + 1))
    found = evaluate(model, images, output=output, resume=True, corrupt_limit=0.1)
    assert len(images.read) < 41 * 2, "blocks that were complete were scored once"
    assert figures(found) == pytest.approx(figures(whole), rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npz"]
    with np.load(output) as rows:
        assert rows["images"].tolist() == [str(i) for i in range(41) if i not in (3, 40)]
        assert rows["index"].tolist() == [i for i in range(41) if i not in (3, 40)]
        labels = images.labels if images.multi_label is False else images.labels.bool()
        np.testing.assert_array_equal(rows["label"], labels[rows["index"]])
        assert {"predicted", "probability", "losses", "in_top5"} <= {*rows}
        assert ("scores" in rows, "right_distillation" in rows) == (images.multi_label, distilled)


def test_complete_file_is_read_and_nothing_is_scored(tmp_path: Path) -> None:
    model, images, output = tiny.model(), tiny.Pictures(20), tmp_path / "rows.npz"
    first = evaluate(model, images, output=output)
    images.read.clear()
    assert evaluate(model, images, output=output, resume=True) == first
    assert images.read == []
    evaluate(model, images, output=output, overwrite=True)
    assert sorted(images.read) == list(range(20))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": tiny.model(seed=1)}, "model: "),
        ({"data": tiny.Pictures(21)}, "images: 20 then, 21 now"),
        ({"data": tiny.Pictures(20, shift=1)}, "names: "),
        ({"precision": "bf16"}, "precision: 'float32' then, 'bf16' now"),
    ],
)
@pytest.mark.parametrize("complete", [False, True], ids=["in parts", "complete"])
def test_another_run_is_refused_by_the_name_of_what_differs(
    change: dict[str, Any], text: str, complete: bool, tmp_path: Path
) -> None:
    same = {"model": tiny.model(), "data": tiny.Pictures(20), "output": tmp_path / "rows.npz"}
    if complete:
        evaluate(**same)
    else:
        with pytest.raises(KeyboardInterrupt):
            evaluate(**same, batch_size=2, watch=killed_after(3))
    with pytest.raises(ConfigError, match=f"is of another run .{text}"):
        evaluate(**{**same, **change}, resume=True)
    with pytest.raises(ConfigError, match=r"exists; --resume .* goes on with it"):
        evaluate(**same)


def test_unreadable_images_of_all_runs_count_together(tmp_path: Path) -> None:
    images, output = tiny.Pictures(40, broken=(1, 2, 20, 21)), tmp_path / "rows.npz"
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny.model(), images, output=output, batch_size=4, watch=killed_after(4))
    with pytest.raises(DataError, match="at least 4 of the 40 images"):
        evaluate(tiny.model(), images, output=output, resume=True)
    assert evaluate(tiny.model(), images, output=output, resume=True, corrupt_limit=0.1).skipped == 4


@pytest.mark.parametrize(
    "options",
    [{"resume": True}, {"overwrite": True}, {"output": "rows.csv"}, dict(output="x.npz", resume=True, overwrite=True)],
)
def test_options_that_mean_nothing_are_refused_before_anything_is_read(options: dict[str, Any]) -> None:
    images = tiny.Pictures(2)
    with pytest.raises(ConfigError, match=r"name it with output|expected \.npz, one flag at most"):
        evaluate(tiny.model(), images, **options)
    assert images.read == []


def test_file_of_another_program_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", index=[0])
    with pytest.raises(DataError, match="is no file of outcomes that evaluate wrote"):
        evaluate(tiny.model(), tiny.Pictures(2), output=tmp_path / "rows.npz", resume=True)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12])
def test_batches_are_cut_where_blocks_begin_and_failures_keep_their_numbers(size: int) -> None:
    blocks = [range(4), range(8, 12), range(20, 23)]
    numbers = torch.tensor([number for block in blocks for number in block])
    failures = torch.where(numbers % 3 == 0, torch.arange(11), -1)
    columns = (numbers[:, None], numbers, failures)
    batches = zip(*(column.split(size) for column in columns), strict=True)
    for block, found in in_blocks(batches, blocks):
        images, labels, failed = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert images[:, 0].tolist() == labels.tolist() == list(block)
        assert failed.tolist() == [number if number % 3 == 0 else -1 for number in block]
