"""Display of a training run: the line of an epoch and the bar of the next one."""

import io

import pytest
from command_line import Terminal

from deit_models.cli.long_runs import TrainingDisplay, epoch_line

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
    assert (f"{label}: " in stream.getvalue()) == bar


def test_bar_of_the_next_epoch_has_the_next_number(capsys):
    stream = Terminal()
    display = TrainingDisplay(12, finished=None, stream=stream)
    display.show_epoch(ROW)
    display.watch(iter("abc"), 3)
    display.close()
    assert capsys.readouterr().out == epoch_line(ROW, 12) + "\n"
    assert "epoch 11/12" in stream.getvalue()
