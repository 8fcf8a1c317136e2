"""Where the rows of a run go beside ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

None of them reaches the network unless the user set it up so. What each one is told are rows and
settings: no path, no host, no user. A resumed run goes on with the same run of the tracker, whose
id lies in ``trackers.json``, and gives it no row twice. A tracker that fails is told of once and
left out; training goes on.
"""

import contextlib
import importlib.util
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tapct_fast.errors import InputError
from tapct_fast.io.atomic import read_json, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

IDS = "trackers.json"
_PROJECT = "tapct-fast"
_MOST_PARAMS = 100  # of one call to MLflow


class Start(NamedTuple):
    """Where the rows to come begin."""

    directory: Path  # the run's folder
    step: int  # steps done; rows of later steps come
    logged: int  # step of the last row that a killed run gave its trackers, at least ``step``
    settings: Mapping[str, Any]  # of the run, flat


class Tracker(Protocol):
    """A log of numbers over steps."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row; ``step`` is one of its keys."""

    def close(self) -> None:
        """Finish what was written."""


class TensorBoard:
    """Events in ``tensorboard/``."""

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a killed run wrote past its last checkpoint.
        folder = str(start.directory / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=start.step + 1)
        lines = [f"| {name} | {value} |" for name, value in start.settings.items()]
        text = "\n".join(["| setting | value |", "|---|---|", *lines])
        self._writer.add_text("settings", text, start.step)

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """Return what the library raises when it fails."""
        return (OSError,)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Finish what was written."""
        self._writer.close()


class Wandb:
    """A run in ``wandb/``: offline, unless the user's own settings, as WANDB_MODE, say else.

    Console, code, git, host, packages and the machine's numbers are not captured.
    """

    def __init__(self, start: Start) -> None:
        import wandb

        self._logged = start.logged
        chosen = wandb.setup().settings.model_fields_set  # by the user
        self._run = wandb.init(
            project=None if "project" in chosen else _PROJECT,
            mode=None if "mode" in chosen else "offline",
            id=_run_id(start.directory, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            config=dict(start.settings),
            dir=start.directory,
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                host="",
                program="",
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """Return what the library raises when it fails."""
        from wandb.errors import Error

        return (Error, OSError)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row, unless the run has it already: its history only grows."""
        if row["step"] > self._logged:
            self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Finish what was written."""
        self._run.finish()


class Mlflow:
    """A run in ``mlflow/``, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, start: Start) -> None:
        # Read by mlflow when it is imported. Without the first it reports its use to its makers,
        # without the second it refuses to keep runs in files.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # A server that is away: by default training would wait for 7 tries of up to 120 seconds.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.tracking import is_tracking_uri_set

        folder = (start.directory / "mlflow").absolute()
        is_set: bool = is_tracking_uri_set()  # type: ignore[no-untyped-call]
        uri = None if is_set else folder.as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self._logged = start.logged
        self._run = _run_id(start.directory, "mlflow", lambda: _mlflow_run(self._client))
        params = [Param(name, str(value)) for name, value in start.settings.items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run, params=params[first : first + _MOST_PARAMS])
        self._client.update_run(self._run, status="RUNNING")

    @staticmethod
    def errors() -> tuple[type[Exception], ...]:
        """Return what the library raises when it fails."""
        from mlflow.exceptions import MlflowException

        return (MlflowException, OSError)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row, unless the run has it already: it would keep both."""
        from mlflow.entities import Metric

        if row["step"] > self._logged:
            now = int(1000 * time.time())
            metrics = [
                Metric(name, value, now, row["step"]) for name, value in _numbers(row).items()
            ]
            self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        """Finish what was written."""
        self._client.set_terminated(self._run)


KINDS: Mapping[str, type[TensorBoard] | type[Wandb] | type[Mlflow]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def choose_trackers(names: Sequence[str] | None) -> list[str]:
    """Return the trackers of a run: those asked for; by default TensorBoard where it is installed.

    Raises:
        InputError: There is no such tracker, or its library is not installed.
    """
    if names is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    for name in names:
        if name not in KINDS:
            raise InputError(f"--track {name!r} is unknown; trackers: {', '.join(KINDS)}")
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"--track {name}: {name} is not installed; pip install 'tapct-fast[track]'"
            )
    return list(names)


class Trackers:
    """The open trackers of a run.

    Args:
        names: From ``choose_trackers``.
        start: Where the rows to come begin.
        notify: Told in one line of a tracker that fails.
    """

    def __init__(self, names: Sequence[str], start: Start, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._open: dict[str, Tracker] = {}
        for name in names:
            with self._without_it_on_failure(name):
                self._open[name] = KINDS[name](start)

    def write(self, row: Mapping[str, Any]) -> None:
        """Give one row to every tracker."""
        for name, tracker in list(self._open.items()):
            with self._without_it_on_failure(name):
                tracker.write(row)

    def close(self) -> None:
        """Finish every tracker."""
        for name, tracker in list(self._open.items()):
            with self._without_it_on_failure(name):
                tracker.close()

    @contextlib.contextmanager
    def _without_it_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except KINDS[name].errors() as error:
            self._open.pop(name, None)
            # Not what it says: messages of these libraries hold paths and addresses.
            kind = type(error).__name__
            self._notify(f"{name} failed ({kind}) and is left out; metrics.jsonl has every row")


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return what a row holds beside its step."""
    return {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}


def _run_id(directory: Path, name: str, make: Callable[[], str]) -> str:
    """Return the id under which a tracker knows this run; made once."""
    path = directory / IDS
    ids: dict[str, str] = read_json(path, "tracker ids") if path.exists() else {}
    if name not in ids:
        ids[name] = make()
        write_json(path, ids)
    return ids[name]


def _mlflow_run(client: "MlflowClient") -> str:
    experiment = client.get_experiment_by_name(_PROJECT)
    id_ = experiment.experiment_id if experiment else client.create_experiment(_PROJECT)
    return str(client.create_run(id_).info.run_id)
