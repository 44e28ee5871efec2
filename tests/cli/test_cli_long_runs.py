"""Display of a training run: the line of an epoch, the live line of the next one, and where to look at the end."""

import io
import time
from argparse import Namespace

import pytest
from command_line import Terminal

from deit_models.cli.long_runs import TrainingDisplay, epoch_line, next_steps

ROW = {"epoch": 9, "loss": 1.23456, "lr": 0.000753, "images_per_second": 1234.5, "unreadable": 0}


def test_epoch_line_counts_from_one_and_leaves_out_what_was_not_measured():
    assert epoch_line(ROW, 100) == "epoch  10/100  loss 1.2346  lr 0.000753  1234 images/s"
    measured = {"top1": 50.0, "class_top1": 49.5, "distillation_top1": 40.25, "ema_top1": 33.333, "unreadable": 2}
    assert epoch_line(ROW | measured, 10) == (
        "epoch 10/10  loss 1.2346  top-1 50.00 %  class head 49.50 %  distillation head 40.25 %  averaged 33.33 %"
        "  lr 0.000753  1234 images/s  2 unreadable"
    )


@pytest.mark.parametrize(("finished", "label"), [(None, "training"), (0, "epoch 1/7"), (3, "epoch 4/7")])
@pytest.mark.parametrize(("terminal", "rank", "bar"), [(True, "0", True), (False, "0", False), (True, "1", False)])
def test_bar_of_an_epoch_appears_on_the_terminal_of_the_first_process(
    finished, label, terminal, rank, bar, monkeypatch
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    stream = Terminal() if terminal else io.StringIO()
    display = TrainingDisplay(7, finished=finished, stream=stream)
    assert list(display.watch(iter("abc"), 3)) == list("abc")
    display.close()
    assert (f"{label}  " in stream.getvalue()) == bar


def test_bar_of_the_next_epoch_has_the_next_number(capsys):
    stream = Terminal()
    display = TrainingDisplay(12, finished=None, stream=stream)
    display.show_epoch(ROW)
    display.watch(iter("abc"), 3)
    display.close()
    assert capsys.readouterr().out == epoch_line(ROW, 12) + "\n"
    assert "epoch 11/12" in stream.getvalue()


def test_live_line_tells_loss_best_accuracy_speed_and_the_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = Terminal()
    display = TrainingDisplay(4, finished=0, images=32, stream=stream)

    def epoch(number):
        batches = display.watch(iter("abcd"), 4)
        for step, _ in enumerate(batches):
            now[0] += 5
            batches.set_postfix(loss=1 / (step + 1 + number))
        display.show_epoch(ROW | {"epoch": number, "top1": 60.0 - 10 * number})

    epoch(0)
    # 32 images in 5 s; a quarter of an epoch took 5 s, and 3.75 epochs are left
    assert "epoch 1/4    0 %, loss 1.0000, 6 images/s, 01:15 left" in stream.getvalue()
    assert "best" not in stream.getvalue()
    now[0] += 20  # evaluation, which the next estimate has in it: 45 s for 1.25 epochs
    epoch(1)
    assert "loss 0.5000, best 60.00 %, 6 images/s, 01:39 left" in stream.getvalue()
    epoch(2)
    assert "loss 0.3333, best 60.00 %, 6 images/s, 00:50 left" in stream.getvalue(), "the best one stays"


def test_continued_run_tells_the_time_left_once_its_epoch_is_known():
    stream = Terminal()
    display = TrainingDisplay(12, finished=None, stream=stream)
    for _ in (first := display.watch(iter("ab"), 2)):
        first.set_postfix(loss=1.0)
    assert "loss 1.0000" in stream.getvalue()
    assert "left" not in stream.getvalue()
    display.show_epoch(ROW)
    for _ in (second := display.watch(iter("ab"), 2)):
        second.set_postfix(loss=1.0)
    assert " left" in stream.getvalue()


def arguments(out, **more):
    """What `next_steps` reads of a command line."""
    nothing = ("root", "image_folder", "image_column", "label_column", "label_separator", "push_to_hub")
    return Namespace(**{**dict.fromkeys(nothing), "out": out, "fresh": False, **more})


def test_next_steps_name_only_what_there_is(tmp_path):
    out = tmp_path / "my runs"
    assert next_steps(arguments(out), "photos") == "next:"
    (out / "model").mkdir(parents=True)
    assert next_steps(arguments(out), None).splitlines()[1:] == [
        f"  classify  deit-models predict --model '{out}/model' IMAGE"
    ]
    (out / "best").mkdir()
    (out / "curves.png").touch()
    look, classify, evaluate, publish = next_steps(arguments(out), "a b", publishes=True).splitlines()[1:]
    assert look == f"  look at   {out / 'curves.png'}"
    assert classify.endswith(f"'{out}/best' IMAGE")
    assert evaluate == f"  evaluate  deit-models evaluate '{out}/best' 'a b'"
    assert "--push-to-hub OWNER/NAME; " in publish
    (out / "report.html").touch()
    assert f"look at   {out / 'report.html'}" in next_steps(arguments(out), None)


def test_next_steps_leave_out_what_would_not_work(tmp_path):
    (tmp_path / "best").mkdir()
    for unlike in ({"root": tmp_path}, {"label_column": ["kind"]}, {"image_folder": tmp_path}):
        assert "evaluate" not in next_steps(arguments(tmp_path, **unlike), "table.csv")
    assert "publish" not in next_steps(arguments(tmp_path, push_to_hub="me/it"), None, publishes=True)
    assert "instead of --fresh" in next_steps(arguments(tmp_path, fresh=True), None, publishes=True)
