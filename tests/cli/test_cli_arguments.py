"""Parts that several commands share: data sets opened by many processes, options as keywords, progress bars."""

import io
import re

import pytest
from command_line import Terminal

import deit_models
from deit_models.cli import build_parser
from deit_models.cli.arguments import first_downloads, open_data, picked, progress_bar, say


class Together:
    """A process whose meetings with the others are noted."""

    def __init__(self, events):
        self.events = events

    def wait_for_all(self):
        self.events.append("wait")


@pytest.mark.parametrize(("rank", "events"), [("0", ["open True", "wait"]), ("1", ["wait", "open False"])])
def test_of_the_processes_of_a_machine_only_the_first_downloads(rank, events, data, monkeypatch):
    seen = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    with first_downloads(Together(seen), wanted=True) as downloads:
        seen.append(f"open {downloads}")
    assert seen == events
    args = build_parser().parse_args(["train", "cifar10", "--download", "--out", "run", "--val-data", str(data)])
    # a folder, for which the option is not meant and would be refused
    assert len(open_data(args, str(data), "val", Together(seen))) == 6
    assert seen == events


@pytest.mark.parametrize("rank", ["0", "1"])
def test_named_set_that_is_wanted_is_opened_between_the_processes(rank, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    args = build_parser().parse_args(["train", "imagenet", "--download", "--root", str(tmp_path), "--out", "run"])
    wanted = "cannot be downloaded without an account" if rank == "0" else f"imagenet is not in {tmp_path}"
    with pytest.raises(deit_models.DataError, match=re.escape(wanted)):
        open_data(args, "imagenet", "train", Together(waits))
    assert waits == ([] if rank == "0" else ["wait"])


@pytest.mark.parametrize(
    ("terminal", "wanted", "bar"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bar_appears_on_a_terminal_where_it_is_wanted(terminal, wanted, bar):
    stream = Terminal() if terminal else io.StringIO()
    assert list(progress_bar(iter("abc"), 3, unit="image", wanted=wanted, stream=stream)) == list("abc")
    assert ("3/3" in stream.getvalue()) == bar


def test_picked_options_are_keywords():
    args = build_parser().parse_args(["bench", "--batch-sizes", "4", "--seconds", "1"])
    assert picked(args, "batch_sizes", "seconds") == {"batch_sizes": [4], "seconds": 1.0}


@pytest.mark.parametrize(("rank", "printed"), [("0", "done\n"), ("1", "")])
def test_only_the_first_process_prints(rank, printed, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    say("done")
    assert capsys.readouterr().out == printed
