"""Experiment trackers: figures of a run, sent to TensorBoard, Weights & Biases, MLflow or Trackio by their own clients.

Where a tracker stores its runs, and under which project or experiment, is the client's own setting: WANDB_MODE,
WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, TRACKIO_DIR and so on.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from .config import is_finite, nearest
from .errors import CheckpointError, ConfigError, MissingExtraError, TrainingError, first_line, shown
from .files import read_json, write_json

logger = logging.getLogger(__name__)

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
TRACKERS_NAME = "trackers.json"
_Status = Literal["FINISHED", "FAILED", "KILLED"]


def chosen_trackers(report_to: str | Sequence[str], *, tensorboard: bool = False) -> tuple[str, ...]:
    """The trackers of an option `report_to`, each once; `tensorboard` adds that one.

    Raises: ConfigError: no such tracker. MissingExtraError: its client is not installed.
    """
    names = (report_to,) if isinstance(report_to, str) else report_to
    if not isinstance(names, (list, tuple)):
        raise ConfigError(f"report_to={shown(report_to)}; expected {', '.join(get_args(TrackerName))}, or some of them")
    chosen = tuple(dict.fromkeys([*names, "tensorboard"] if tensorboard else names))
    for name in chosen:
        if name not in get_args(TrackerName):
            known = get_args(TrackerName)
            raise ConfigError(f"report_to={shown(name)}; expected one of {', '.join(known)}{nearest(name, known)}")
        _client(name)
    return chosen


def _client(name: str) -> Any:
    """The client's module. Raises: MissingExtraError: it is not installed."""
    package = name
    try:
        if name == "wandb":
            import wandb as client
        elif name == "mlflow":
            import mlflow as client
        elif name == "trackio":
            import trackio as client
        else:
            package = "'deit-models[train]'"
            import torch.utils.tensorboard as client
    except ImportError as error:
        raise MissingExtraError(f"{name} is not installed; pip install {package}") from error
    return client


class _Adapter:
    """One run in one tracker. `kept` is what must be known to go on in it: `id` and `next`, the next step."""

    def __init__(self, out: Path, config: dict[str, Any], kept: dict[str, Any]) -> None:
        """Begin the run, or go on in it."""
        raise NotImplementedError

    def describe(self, config: dict[str, Any]) -> None:
        """Send the settings, where that is not done when the run begins."""

    def add(self, figures: dict[str, float], step: int) -> None:
        """Send the figures of a step."""
        raise NotImplementedError

    def end(self, figures: dict[str, float], step: int) -> None:
        """Send the final figures; `step` is the last one."""
        self.add(figures, step)

    def close(self, status: _Status) -> None:
        """End the run."""
        raise NotImplementedError


class _TensorBoard(_Adapter):
    def __init__(self, out: Path, config: dict[str, Any], kept: dict[str, Any]) -> None:
        self.board = _client("tensorboard").SummaryWriter(str(out / "tensorboard"), purge_step=kept["next"])
        if kept["next"] == 0:
            self.board.add_text("config", "\n".join(f"    {name} = {value}" for name, value in config.items()))

    def add(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()

    def close(self, _status: _Status) -> None:
        self.board.close()


class _Wandb(_Adapter):
    def __init__(self, out: Path, _config: dict[str, Any], kept: dict[str, Any]) -> None:
        wandb = _client("wandb")
        self.own = wandb.run is None  # else the caller's, who ends it
        self.run = wandb.run or wandb.init(name=out.name, id=kept.get("id"), resume="allow", dir=str(out))
        _adopt(kept, self.run.id)

    def describe(self, config: dict[str, Any]) -> None:
        self.run.config.update(config, allow_val_change=True)

    def add(self, figures: dict[str, float], step: int) -> None:
        # in the caller's run other steps may have been counted: only the row's `epoch` tells them
        self.run.log(figures, step=step if self.own else None)

    def end(self, figures: dict[str, float], _step: int) -> None:
        self.run.summary.update(figures)

    def close(self, status: _Status) -> None:
        if self.own:
            self.run.finish(exit_code=0 if status == "FINISHED" else 1)


class _MLflow(_Adapter):
    def __init__(self, out: Path, _config: dict[str, Any], kept: dict[str, Any]) -> None:
        self.mlflow = _client("mlflow")
        running = self.mlflow.active_run()
        self.own = running is None
        name = None if "id" in kept else out.name
        run = running or self.mlflow.start_run(run_id=kept.get("id"), run_name=name)
        self.id = run.info.run_id
        _adopt(kept, self.id)

    def describe(self, config: dict[str, Any]) -> None:
        known = self.mlflow.get_run(self.id).data.params  # a value cannot be changed
        self.mlflow.log_params({key: value for key, value in config.items() if key not in known})

    def add(self, figures: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(figures, step=step, run_id=self.id)

    def close(self, status: _Status) -> None:
        if self.own:
            self.mlflow.end_run(status)


class _Trackio(_Adapter):
    def __init__(self, out: Path, config: dict[str, Any], kept: dict[str, Any]) -> None:
        self.trackio = _client("trackio")
        # it continues by name, so that no other run may have it
        kept.setdefault("id", f"{out.name}-{secrets.token_hex(3)}")
        project = {"project": "deit-models", "name": kept["id"], "resume": "allow"}
        self.run = self.trackio.init(**project, config=config, embed=False)

    def add(self, figures: dict[str, float], step: int) -> None:
        self.run.log(figures, step=step)

    def close(self, _status: _Status) -> None:
        self.trackio.finish()


_ADAPTERS = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio}


def _adopt(kept: dict[str, Any], run: str) -> None:
    """Note the run that is written to; one that was not written to before has no steps."""
    if kept.get("id") != run:
        kept.update(id=run, next=0)
        kept.pop("final", None)


class Trackers:
    """Trackers of one run; as a context it opens nothing new, and ends their runs with the status of its block.

    A run that goes on continues in the same run of each tracker: which one, and the next step, are kept in
    `trackers.json` in the folder. No step is sent twice, and steps that a tracker lacks are sent late. A run that the
    caller has begun by `wandb.init` or `mlflow.start_run` is used, and stays open. A tracker that fails later on is
    logged and tried again with the next step: it does not end the work.

    Args:
        names: see `chosen_trackers`; empty: nothing is done.
        out: the folder; its name is the run's, event files of TensorBoard and Weights & Biases stand in it.
        config: settings of the run.

    Raises: TrainingError: a tracker begins no run, or `trackers.json` is damaged.
    """

    def __init__(self, names: Sequence[str], out: Path, *, config: Mapping[str, Any]) -> None:
        self._path, self._rows = out / TRACKERS_NAME, dict[int, dict[str, float]]()
        self._kept, self._open = self._read() if names else {}, dict[str, _Adapter]()
        for name in names:
            out.mkdir(parents=True, exist_ok=True)
            kept = self._kept.setdefault(name, {})
            kept.setdefault("next", 0)
            try:
                self._open[name] = _ADAPTERS[name](out, dict(config), kept)
                self._open[name].describe(dict(config))
            except Exception as error:
                self._close("FAILED")
                raise TrainingError(f"{name} begins no run: {first_line(error)}") from error
        self._write()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = {name: dict(kept) for name, kept in read_json(self._path).items()} if self._path.exists() else {}
            if any(type(kept.get("next")) is not int for kept in found.values()):
                raise ValueError("no next step")
        except (CheckpointError, ValueError, TypeError) as error:
            raise TrainingError(f"{self._path} is damaged: {first_line(error)}; remove it for new runs") from error
        return found

    def add(self, row: Mapping[str, Any], step: int) -> None:
        """Send the numbers of a row as one step. Raises: SaveError: no space or no permission."""
        self._rows[step] = {name: value for name, value in row.items() if is_finite(value)}
        for name, adapter in self._open.items():
            kept = self._kept[name]
            try:
                for number, figures in self._rows.items():
                    if number >= kept["next"]:
                        adapter.add(figures, number)
                        kept["next"] = number + 1
            except Exception as error:  # noqa: BLE001  # clients raise many types: the work goes on
                logger.warning("%s: step %d is sent again with the next one: %s", name, number, first_line(error))
        self._write()

    def end(self, figures: Mapping[str, Any]) -> None:
        """Send the final figures, under names that begin with final/. Raises: SaveError: no space or no permission."""
        final = {f"final/{name}": value for name, value in figures.items() if is_finite(value)}
        for name, adapter in self._open.items():
            kept = self._kept[name]
            if kept.get("final") != final:
                try:
                    adapter.end(final, max(kept["next"] - 1, 0))
                    kept["final"] = final
                except Exception as error:  # noqa: BLE001  # as above
                    logger.warning("%s: the final figures are not sent: %s", name, first_line(error))
        self._write()

    def _write(self) -> None:
        if self._open:
            write_json(self._path, self._kept)

    def _close(self, status: _Status) -> None:
        for name, adapter in self._open.items():
            try:
                adapter.close(status)
            except Exception as error:  # noqa: BLE001  # as above
                logger.warning("%s: the run is not closed: %s", name, first_line(error))
        self._open = {}

    def __enter__(self) -> Trackers:
        """These."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the runs: finished, failed, or, after Ctrl-C, killed."""
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._close("KILLED" if stopped else "FINISHED" if kind is None else "FAILED")
