"""Dashboards for a stage's metrics beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A sink takes one row of numbers per step. Each works in a thread of its own. Its first failure, such as a server that is
down, ends it with one warning: training never waits for a dashboard and never fails with it.

A stage is one run of the dashboard, in a project named after our run. The id of the dashboard's run is the same for
every attempt, so a stage that was killed continues its curves. Steps after the last checkpoint are then logged twice,
with the same numbers: TensorBoard's events are written anew, Weights & Biases ignores steps it has, MLflow shows both
at the same place.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from pyarrow.fs import LocalFileSystem

from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.storage.filesystems import resolve
from cai_ray.storage.run import Run

Row = Mapping[str, Any]
"""Numbers by their names, and `step`."""
UPLOAD_S = 30
"""Seconds between copies to remote storage, which cannot append."""
PATIENCE_S = 60
"""Seconds that the end of a stage waits for a server to take the last rows."""
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


class Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class DashboardRun(NamedTuple):
    """A stage as a dashboard knows it: one run in a project."""

    run: Run
    stage: str
    id: str
    """The same for every attempt at the same stage with the same inputs."""
    rows: Sequence[Row] = ()
    """The steps of the attempts before: what a dashboard that has not seen them begins with."""

    @property
    def name(self) -> str:
        return f"{self.run.root.rstrip('/').rpartition('/')[2]}/{self.stage}"

    @property
    def texts(self) -> dict[str, Any]:
        """What describes the run there: stage, hash of the constitution, configuration."""
        opened = files.read_json(self.run.path("run.json"))
        return {"stage": self.stage} | {key: opened[key] for key in ("constitution_sha", "config")}

    def replay(self, sink: Sink) -> None:
        """Logs the steps of the attempts before."""
        for row in self.rows:
            sink.log(row["step"], numbers(row))


def check(names: Sequence[str]) -> None:
    """Checks that the packages of these sinks are installed.

    Raises:
        InputError: the package of a sink is not installed.
    """
    for name in names:
        if find_spec(_PACKAGES[name]) is None:
            raise InputError(
                f"sinks: {name} is not installed; pip install 'cai_ray[{name}]', or take it out of `sinks`"
            )


def numbers(row: Row) -> dict[str, float]:
    """The numbers of a row, without the step."""
    return {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}


class TensorBoard:
    """Events under RUN/<stage>/tensorboard; on remote storage, a local file that is copied there now and then."""

    def __init__(self, watched: DashboardRun):
        # Not tensorboardX's SummaryWriter, which writes to the file only at the end or after two minutes.
        from tensorboardX.event_file_writer import EventsWriter

        self._uri = watched.run.path(watched.stage, "tensorboard")
        files.delete(self._uri)  # of an attempt before, with steps that are done again
        fs, path = resolve(self._uri)
        self._remote = not isinstance(fs, LocalFileSystem)
        self._folder = tempfile.TemporaryDirectory() if self._remote else None
        self._local = self._folder.name if self._folder else path
        Path(self._local).mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(f"{self._local}/events")
        self._copied = time.monotonic()
        watched.replay(self)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()
        if self._remote and time.monotonic() - self._copied > UPLOAD_S:
            self._upload()

    def close(self) -> None:
        self._writer.close()
        if self._folder:
            self._upload()
            self._folder.cleanup()

    def _upload(self) -> None:
        files.upload_folder(self._local, self._uri)
        self._copied = time.monotonic()


class WeightsAndBiases:
    """Weights & Biases. Key, server and mode are its own environment variables (WANDB_API_KEY, WANDB_MODE, …)."""

    def __init__(self, watched: DashboardRun):
        import wandb

        self._run = wandb.init(
            project=watched.run.config.name,
            name=watched.name,
            id=watched.id,
            resume="allow",
            config=watched.texts,
            # The process belongs to Ray: wandb must not capture its output, and nobody reads what wandb prints.
            settings=wandb.Settings(console="off", silent=True),
        )
        if not self._run.resumed:
            watched.replay(self)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # waits until its process has written all: Ray ends ours without exit hooks


class MLflow:
    """MLflow. The server is its own environment variable, MLFLOW_TRACKING_URI."""

    TAG = "cai_ray.id"

    def __init__(self, watched: DashboardRun):
        from mlflow import MlflowClient

        client, name = MlflowClient(), watched.run.config.name
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name)
        before = client.search_runs([experiment], f"tags.`{self.TAG}` = '{watched.id}'", max_results=1)
        self._client = client
        if before:
            self._id = before[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            return
        texts = watched.texts
        tags = {self.TAG: watched.id, "stage": watched.stage, "constitution_sha": texts["constitution_sha"]}
        self._id = client.create_run(experiment, run_name=watched.name, tags=tags).info.run_id
        client.log_text(self._id, json.dumps(texts["config"], indent=1), "config.json")
        watched.replay(self)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(k, float(v), now, step) for k, v in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


SINKS: dict[str, Callable[[DashboardRun], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


class Feed:
    """Passes rows to one sink, in a thread of its own."""

    def __init__(self, name: str, watched: DashboardRun, warn: Callable[[str], None]):
        self._name, self._watched, self._warn = name, watched, warn
        self._rows: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"sink {name}", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        self._rows.put((row["step"], numbers(row)))

    def close(self, deadline: float) -> None:
        """Waits until the sink has taken all rows, at most to the deadline (of time.monotonic)."""
        self._rows.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"{self._name}: not all metrics could be sent in time; metrics.jsonl has them")

    def _work(self) -> None:
        try:
            sink = SINKS[self._name](self._watched)
            while (row := self._rows.get()) is not None:
                sink.log(*row)
            sink.close()
        except Exception as e:  # dashboards' clients raise anything
            self._warn(_given_up(self._name, e))


def _given_up(name: str, error: Exception) -> str:
    why = (str(error).splitlines() or [""])[0][:200]
    return f"{name} is given up for this stage ({type(error).__name__}: {why}); it goes on without"


def open_all(watched: DashboardRun, warn: Callable[[str], None]) -> list[Feed]:
    """Starts the configured sinks; `warn` takes one line for each that fails, now or later."""
    feeds = []
    for name in dict.fromkeys(watched.run.config.sinks):
        try:
            import_module(_PACKAGES[name])  # importing packages in two threads at once may fail
        except Exception as e:  # missing or damaged on this node
            warn(_given_up(name, e))
        else:
            feeds.append(Feed(name, watched, warn))
    return feeds


def close_all(feeds: Sequence[Feed]) -> None:
    """Ends the sinks, all of them within `PATIENCE_S` seconds."""
    deadline = time.monotonic() + PATIENCE_S
    for feed in feeds:
        feed.close(deadline)
