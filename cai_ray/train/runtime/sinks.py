"""Where a stage's metrics can be watched beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A sink takes one row of numbers per step. Each works in a thread of its own, and its first failure (a server that is
away) ends it with one warning: training never waits for a dashboard, and never ends with it.

A stage is one run of its dashboard, in a project named as the run is. The run's id is the same for every attempt, so
that a stage that was killed goes on with its curves. Steps after the last checkpoint are then logged twice, with the
same numbers: TensorBoard's events are written anew, Weights & Biases drops what it has, MLflow shows both on one spot.
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
"""How long the end of a stage waits for what a server has not taken yet."""
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


class Sink(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Watched(NamedTuple):
    """A stage as its dashboards know it."""

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
        """What the numbers are of."""
        opened = files.read_json(self.run.path("run.json"))
        return {"stage": self.stage} | {key: opened[key] for key in ("constitution_sha", "config")}

    def replay(self, sink: Sink) -> None:
        for row in self.rows:
            sink.log(row["step"], numbers(row))


def check(names: Sequence[str]) -> None:
    """
    Raises:
        InputError: the package of a sink is not installed.
    """
    for name in names:
        if find_spec(_PACKAGES[name]) is None:
            raise InputError(
                f"sinks: {name} is not installed; pip install 'cai_ray[{name}]', or take it out of `sinks`"
            )


def numbers(row: Row) -> dict[str, float]:
    return {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}


class TensorBoard:
    """Events under RUN/<stage>/tensorboard; where that is remote, a local file that is copied there now and then."""

    def __init__(self, watched: Watched):
        # Not its SummaryWriter, whose queue and thread come to a file only in the end, or after two minutes.
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
    """The key, the server and the mode are wandb's own environment variables (WANDB_API_KEY, WANDB_MODE, …)."""

    def __init__(self, watched: Watched):
        import wandb

        self._run = wandb.init(
            project=watched.run.config.name,
            name=watched.name,
            id=watched.id,
            resume="allow",
            config=watched.texts,
            # The process is Ray's: its output is not ours to take, and nobody reads what wandb prints there.
            settings=wandb.Settings(console="off", silent=True),
        )
        if not self._run.resumed:
            watched.replay(self)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # waits for its process to have written all: Ray ends ours without the hooks of an exit


class MLflow:
    """The server is mlflow's own environment variable, MLFLOW_TRACKING_URI."""

    TAG = "cai_ray.id"

    def __init__(self, watched: Watched):
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


SINKS: dict[str, Callable[[Watched], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


class Feed:
    """Hands rows to one sink, in a thread."""

    def __init__(self, name: str, watched: Watched, warn: Callable[[str], None]):
        self._name, self._watched, self._warn = name, watched, warn
        self._rows: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"sink {name}", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        self._rows.put((row["step"], numbers(row)))

    def close(self, deadline: float) -> None:
        """Waits until all is handed over, at most to the deadline (of time.monotonic)."""
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
        except Exception as e:  # whatever a dashboard's client raises
            self._warn(_given_up(self._name, e))


def _given_up(name: str, error: Exception) -> str:
    why = (str(error).splitlines() or [""])[0][:200]
    return f"{name} is given up for this stage ({type(error).__name__}: {why}); it goes on without"


def open_all(watched: Watched, warn: Callable[[str], None]) -> list[Feed]:
    feeds = []
    for name in dict.fromkeys(watched.run.config.sinks):
        try:
            import_module(_PACKAGES[name])  # in two threads at once, packages with circles may fail
        except Exception as e:  # on this node it is not installed, or not whole
            warn(_given_up(name, e))
        else:
            feeds.append(Feed(name, watched, warn))
    return feeds


def close_all(feeds: Sequence[Feed]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    for feed in feeds:
        feed.close(deadline)
