"""Figures of a run in the trackers' own clients, which store them on this disk. Skipped where a client is missing."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from small_sets import fill

import deit_models
from deit_models import ConfigError, MissingExtraError, TrainingError
from deit_models.trackers import TRACKERS_NAME, Trackers, chosen_trackers
from deit_models.training.run import Computing, TrainResult, train

pytestmark = pytest.mark.filterwarnings("ignore")  # of the clients

CLIENTS = ["tensorboard", "wandb", "mlflow", "trackio"]


@pytest.fixture(autouse=True, scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all clients; Trackio looks for it when it is imported."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.chdir(folder)
        yield folder


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param, reason=f"needs {request.param}", exc_type=ImportError)
    return request.param


def run(out: Path, report_to: Any, *, epochs: int = 4, **options: Any) -> TrainResult:
    recipe = tiny.recipe(epochs=epochs, save_every=3)
    data = {"train": tiny.Pictures(20), "val": tiny.Pictures(9), "workers": 0, "device": "cpu"}
    return train(tiny.model(), recipe=recipe, out=out, report_to=report_to, **data, **options)


def steps_of(client: str, out: Path, figure: str) -> list[tuple[int, float]]:
    """(step, value) of a figure, in the order it was sent, as the client's own store has it."""
    kept = json.loads((out / TRACKERS_NAME).read_text())[client]
    if client == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(out / "tensorboard"))
        board.Reload()
        return [(event.step, event.value) for event in board.Scalars(figure)]
    if client == "mlflow":
        import mlflow

        return [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(kept["id"], figure)]
    if client == "trackio":
        import trackio

        rows = trackio.SQLiteStorage.get_logs("deit-models", kept["id"])
        return [(row["step"], row[figure]) for row in rows if figure in row]
    found = []
    for record in wandb_records(out):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found += [(row["_step"], row[figure])] if figure in row else []
    return found


def wandb_records(out: Path) -> Iterator[Any]:
    """The records of all offline files of a run, in order: protobufs in LevelDB's log format."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its process writes on after a run is finished
    for path in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        data, place, parts = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
            parts, place = parts + data[place + 7 : place + 7 + size], place + 7 + size
            if kind in (1, 4):  # the last part of a record
                record = wandb_internal_pb2.Record()
                record.ParseFromString(parts)
                parts = b""
                yield record


def statuses_of(client: str, out: Path) -> list[str]:
    if client == "mlflow":
        import mlflow

        return [mlflow.get_run(json.loads((out / TRACKERS_NAME).read_text())["mlflow"]["id"]).info.status]
    return [
        "FAILED" if record.exit.exit_code else "FINISHED"
        for record in wandb_records(out)
        if record.WhichOneof("record_type") == "exit"
    ]


class StoppedError(Exception):
    pass


def stop(row: dict[str, Any]) -> None:
    if row["epoch"] == 1:
        raise StoppedError


def test_each_epoch_is_one_step_also_after_a_failure_that_lost_some(client: str, tmp_path: Path) -> None:
    """The state is saved after epoch 2 only: epochs 0 and 1 run twice, and are sent once."""
    out = tmp_path / "cars"
    with pytest.raises(StoppedError):
        run(out, client, on_epoch=stop)
    before = json.loads((out / TRACKERS_NAME).read_text())[client]
    if client in ("wandb", "mlflow"):
        assert statuses_of(client, out) == ["FAILED"]
    result = run(out, client)
    for figure in ("loss", "top1"):
        wanted = [(row["epoch"], pytest.approx(row[figure], rel=1e-6)) for row in result.log]
        assert steps_of(client, out, figure) == wanted
    if client in ("wandb", "mlflow"):
        assert statuses_of(client, out)[-1] == "FINISHED"
    assert json.loads((out / TRACKERS_NAME).read_text())[client].get("id") == before.get("id")
    run(out, client)  # ended already: nothing is sent twice
    assert [step for step, _ in steps_of(client, out, "loss")] == [0, 1, 2, 3]


def test_tracker_that_is_added_later_gets_the_earlier_epochs(client: str, tmp_path: Path) -> None:
    run(tmp_path / "run", (), epochs=3)
    result = run(tmp_path / "run", [client], epochs=5)
    wanted = [(row["epoch"], pytest.approx(row["loss"], rel=1e-6)) for row in result.log]
    assert steps_of(client, tmp_path / "run", "loss") == wanted
    assert len(wanted) == 5


def test_run_has_its_folder_s_name_its_settings_and_its_final_figures(client: str, tmp_path: Path) -> None:
    out = tmp_path / "birds"
    best = run(out, client).best_top1
    kept = json.loads((out / TRACKERS_NAME).read_text())[client]
    if client == "mlflow":
        import mlflow

        found = mlflow.get_run(kept["id"])
        assert found.info.run_name == "birds"
        assert found.data.params["epochs"] == "4"
        assert found.data.params["data"].startswith("20 images")
        assert found.data.metrics["final/best_top1"] == pytest.approx(best)
    elif client == "wandb":
        runs = [record.run for record in wandb_records(out) if record.WhichOneof("record_type") == "run"]
        configs = [record.config for record in wandb_records(out) if record.WhichOneof("record_type") == "config"]
        summaries = [record.summary for record in wandb_records(out) if record.WhichOneof("record_type") == "summary"]
        final = {entry.key or entry.nested_key[0]: entry.value_json for part in summaries for entry in part.update}
        assert runs[0].display_name == "birds"
        assert ("epochs", "4") in [(entry.key or entry.nested_key[0], entry.value_json) for entry in configs[0].update]
        assert json.loads(final["final/best_top1"]) == best
    elif client == "trackio":
        assert kept["id"].startswith("birds-")
        assert steps_of(client, out, "final/best_top1") == [(3, best)]
    else:
        assert steps_of(client, out, "final/best_top1") == [(3, pytest.approx(best))]


@pytest.mark.parametrize("mode", ["head", "full"])
def test_fine_tuning_reports_every_step_and_its_figures(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fill(tmp_path / "photos", "abc", images=5)
    recipe = {"epochs": 2, "batch_size": 4, "warmup_epochs": 0, "precision": "float32"}
    for _ in range(2):  # the second call resumes a finished run
        result = deit_models.finetune(
            tiny.model(), train=tmp_path / "photos", out=tmp_path / "run", mode=mode, device="cpu", workers=0,
            recipe=deit_models.recipes.recipe.recipe_named("finetune", **recipe), report_to="tensorboard",
        )  # fmt: skip
    tried = result.metrics["tried"] if mode == "head" else result.metrics["epochs"] * [None]
    assert [step for step, _ in steps_of("tensorboard", tmp_path / "run", "loss")] == list(range(len(tried)))
    final = steps_of("tensorboard", tmp_path / "run", "final/val/top1")
    assert final == [(len(tried) - 1, pytest.approx(result.metrics["val"]["top1"], rel=1e-6))]


# A run that the caller has begun


def test_running_run_of_the_caller_is_used_and_left_open(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    with mlflow.start_run() as mine:
        mlflow.log_param("epochs", "many")  # a value cannot be changed: theirs stays
        run(tmp_path / "run", "mlflow")
        assert mlflow.active_run().info.run_id == mine.info.run_id
    assert [step for step, _ in steps_of("mlflow", tmp_path / "run", "loss")] == [0, 1, 2, 3]
    assert mlflow.get_run(mine.info.run_id).data.params["epochs"] == "many"


def test_running_run_of_wandb_counts_on(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    mine = wandb.init(dir=str(tmp_path / "run"))
    for number in range(10):
        mine.log({"theirs": number})
    run(tmp_path / "run", "wandb")
    assert wandb.run is mine
    mine.finish()
    epochs = steps_of("wandb", tmp_path / "run", "epoch")
    assert [epoch for _, epoch in epochs] == [0, 1, 2, 3]
    assert [step for step, _ in epochs] == [10, 11, 12, 13]


# What is refused, and what is survived


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("wandbb", r"report_to='wandbb'; expected one of tensorboard, .*; nearest: wandb"),
        (["tensorboard", 3], r"report_to=3; expected one of"),
        (7, r"report_to=7; expected tensorboard, wandb, mlflow, trackio, or some of them"),
    ],
)
def test_unknown_tracker_is_refused(given: Any, text: str) -> None:
    if given != 7 and isinstance(given, list):
        pytest.importorskip("tensorboard")
    with pytest.raises(ConfigError, match=text):
        Computing(report_to=given)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_missing_client_is_named_before_anything_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"^{name} is not installed; pip install {name}$"):
        deit_models.finetune("no/model", train=tmp_path / "none", out=tmp_path / "out", report_to=name)
    assert not (tmp_path / "out").exists()


def test_each_tracker_is_used_once() -> None:
    pytest.importorskip("tensorboard")
    assert chosen_trackers(["tensorboard", "tensorboard"], tensorboard=True) == ("tensorboard",)
    assert chosen_trackers((), tensorboard=True) == ("tensorboard",)
    assert chosen_trackers(()) == ()


@pytest.mark.parametrize("text", ["{", "[]", '{"tensorboard": 3}', '{"tensorboard": {"next": "x"}}'])
def test_damaged_notes_are_refused(text: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / TRACKERS_NAME).write_text(text)
    with pytest.raises(TrainingError, match=rf"{TRACKERS_NAME} is damaged: "):
        Trackers(["tensorboard"], tmp_path, config={})


def test_store_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/store.db")
    assert mlflow.active_run() is None
    with pytest.raises(TrainingError, match=r"^mlflow begins no run: ") as caught:
        Trackers(["mlflow"], tmp_path / "run", config={})
    assert "\n" not in str(caught.value)


def test_steps_that_were_refused_are_sent_with_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MLflow refuses a name with such a sign."""
    mlflow = pytest.importorskip("mlflow")
    with Trackers(["mlflow"], tmp_path, config={}) as trackers:
        trackers.add({"loss": 1.0}, 0)
        trackers.add({"loss%": 2.0}, 1)
        assert "mlflow: step 1 is sent again with the next one" in caplog.text
    kept = json.loads((tmp_path / TRACKERS_NAME).read_text())["mlflow"]
    assert kept["next"] == 1
    assert mlflow.get_run(kept["id"]).info.status == "FINISHED"


def test_interrupted_run_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(KeyboardInterrupt), Trackers(["mlflow"], tmp_path, config={}):
        raise KeyboardInterrupt
    assert statuses_of("mlflow", tmp_path) == ["KILLED"]
