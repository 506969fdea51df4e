"""Where metrics go: metrics.jsonl always, dashboards beside it, which never hold up or end a stage."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cai_ray.cli import main
from cai_ray.config.run import RunConfig
from cai_ray.storage import files
from cai_ray.storage.run import Run
from cai_ray.train.runtime import metrics, sinks
from tests.events import scalars

SHA = "0123456789abcdef"
ROWS = [{"step": i, "sft/loss": 1 / i, "tokens/per_s": 100.0 * i} for i in (1, 2, 3, 4)]


@pytest.fixture(autouse=True)
def warnings() -> Iterator[list[str]]:
    metrics._warnings.clear()
    yield metrics._warnings
    metrics._warnings.clear()


def make_run(out: Path | str, *names: str) -> Run:
    config = {"name": "watched", "out": str(out), "model": "town", "constitution": "errand-town"}
    run = Run(RunConfig.model_validate(config | {"prompts": [{"path": "town:revise"}], "sinks": names}))
    opened = {"config": run.config.model_dump(mode="json"), "constitution_sha": SHA}
    files.write_json(run.path("run.json"), opened)
    return run


def train(run: Run, first: int = 1, last: int = 4, close: bool = True) -> metrics.Log:
    """What a loop does that was restored before step `first`."""
    log = metrics.Log(run, "sft", len(ROWS), ROWS[: first - 1])
    for row in ROWS[first - 1 : last]:
        log.add(row["step"], {k: v for k, v in row.items() if k != "step"})
    if close:
        log.close()
    return log


def written(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files.read_bytes(run.path("sft", "metrics.jsonl")).splitlines()]


def events(run: Run) -> list[dict[str, Any]]:
    return scalars(run.path("sft", "tensorboard"))


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline, metrics._warnings
        time.sleep(0.02)


def same(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> bool:
    return [r.keys() for r in found] == [r.keys() for r in rows] and all(
        f[k] == pytest.approx(r[k]) for f, r in zip(found, rows, strict=True) for k in r
    )


def test_tensorboard_is_the_default_and_metrics_jsonl_is_always_there(tmp_path: Path) -> None:
    assert RunConfig.model_fields["sinks"].default == ("tensorboard",)
    run = make_run(tmp_path / "run")
    train(run)
    assert written(run) == ROWS
    assert not files.exists(run.path("sft", "tensorboard"))


def test_events_grow_while_a_stage_trains(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "tensorboard")
    log = train(run, last=2, close=False)
    eventually(lambda: same(events(run), ROWS[:2]))
    log.close()
    assert same(events(run), ROWS[:2])


def test_events_grow_on_remote_storage_too(far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "UPLOAD_S", 0)
    run = make_run(far, "tensorboard")
    log = train(run, last=2, close=False)
    eventually(lambda: same(events(run), ROWS[:2]))
    log.add(3, {k: v for k, v in ROWS[2].items() if k != "step"})
    log.close()
    assert same(events(run), ROWS[:3])
    assert written(run) == ROWS[:3]


def test_a_resumed_stage_has_each_step_once(tmp_path: Path) -> None:
    """The checkpoint was made after step 2; step 3 had been done, too."""
    run = make_run(tmp_path / "run", "tensorboard")
    train(run, last=3, close=False)
    eventually(lambda: same(events(run), ROWS[:3]))
    (file,) = Path(run.path("sft", "tensorboard")).iterdir()
    file.rename(file.with_name("events.out.tfevents.1.another-node"))
    train(run, first=3)
    assert written(run) == ROWS
    assert same(events(run), ROWS)


class Away:
    """A dashboard whose server goes away after the first row."""

    package = "json"

    def __init__(self, watched: sinks.DashboardRun):
        self.left = 1

    def log(self, step: int, metrics: Any) -> None:
        if not self.left:
            raise ConnectionError("no route\nto host")
        self.left -= 1

    def close(self) -> None:
        raise AssertionError("it was given up before")


class Stuck(Away):
    def log(self, step: int, metrics: Any) -> None:
        time.sleep(30)


class Refusing(Away):
    def __init__(self, watched: sinks.DashboardRun):
        raise PermissionError("no key")


class Missing(Away):
    """The driver has it; this node has not."""

    package = "no_such_package"


@pytest.mark.parametrize(
    ("sink", "why"),
    [(Away, "no route"), (Refusing, "no key"), (Missing, "No module named 'no_such_package'")],
)
def test_a_dashboard_that_fails_is_one_warning_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], sink: type, why: str
) -> None:
    monkeypatch.setitem(sinks.SINKS, "wandb", sink)
    monkeypatch.setitem(sinks._PACKAGES, "wandb", sink.package)
    run = make_run(tmp_path / "run", "wandb", "tensorboard")
    train(run)
    assert written(run) == ROWS
    assert same(events(run), ROWS)
    assert len(warnings) == 1
    assert "wandb" in warnings[0] and why in warnings[0] and "\n" not in warnings[0]


def test_a_dashboard_that_does_not_answer_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setitem(sinks.SINKS, "mlflow", Stuck)
    monkeypatch.setitem(sinks._PACKAGES, "mlflow", Stuck.package)
    monkeypatch.setattr(sinks, "PATIENCE_S", 0.2)
    started = time.monotonic()
    run = make_run(tmp_path / "run", "mlflow")
    train(run)
    assert time.monotonic() - started < 10
    assert written(run) == ROWS
    assert len(warnings) == 1 and "mlflow" in warnings[0]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_sink_whose_package_is_missing_is_one_line_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda package: None if package == name else object())
    words = ["run", "errand-town", "--out", str(tmp_path / "run"), "--set", f"sinks=[tensorboard, {name}]"]
    assert main([*words, "--check"]) == 2
    err = capsys.readouterr().err
    assert f"pip install 'cai_ray[{name}]'" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_id_is_that_of_the_run_the_stage_and_its_inputs_whatever_the_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(sinks, "open_all", lambda watched, warn: seen.append(watched.id) or [])
    for folder, stage, key in (
        ("a", "sft", "sft-01-100"),
        ("a", "sft", "sft-01-200"),  # another attempt
        ("a", "sft", "sft-02-300"),  # other inputs
        ("a", "rm", "sft-01-100"),
        ("b", "sft", "sft-01-100"),
    ):
        monkeypatch.setattr(metrics, "_driver_key", key)
        metrics.Log(make_run(tmp_path / folder), stage, 1)
    assert seen[0] == seen[1]
    assert len(set(seen)) == 4


def test_wandb_keeps_one_run_with_its_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """The real package, offline: each attempt leaves a file with the same run id, and all steps so far."""
    pytest.importorskip("wandb", reason="needs the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = make_run(tmp_path / "run", "wandb")
    train(run, last=3)
    train(run, first=3)
    assert not warnings
    paths = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns)
    attempts = [_wandb_file(path) for path in paths]
    assert [[step for step, _ in a["history"]] for a in attempts] == [[1, 2, 3], [1, 2, 3, 4]]
    for attempt in attempts:
        for (step, logged), row in zip(attempt["history"], ROWS, strict=False):
            assert {"step": step} | {k: v for k, v in logged.items() if k[0] != "_"} == row
        assert attempt["project"] == "watched" and attempt["name"] == "run/sft"
        assert attempt["config"]["constitution_sha"] == SHA
        assert attempt["config"]["config"] == run.config.model_dump(mode="json")
    assert attempts[0]["id"] == attempts[1]["id"]


def _wandb_file(path: Path) -> dict[str, Any]:
    """What a run's file says: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    found: dict[str, Any] = {"history": [], "config": {}}
    while place + 7 <= len(data):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind not in (1, 4):  # a beginning or a middle
            continue
        record, whole = Record.FromString(whole), b""
        if record.HasField("history"):
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            found["history"].append((record.history.step.num, items))
        elif record.HasField("run"):
            found |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
            found["config"] |= {c.key: json.loads(c.value_json) for c in record.run.config.update}
    return found


@pytest.mark.parametrize("store", ["files", "database"])
def test_mlflow_keeps_one_run_with_its_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], store: str
) -> None:
    """The real package. The second attempt goes on with the run; the step that both have stands there twice."""
    pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    if store == "database":
        pytest.importorskip("alembic", reason="mlflow-skinny alone has no database")
    uri = f"sqlite:///{tmp_path}/mlflow.db" if store == "database" else (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    from mlflow import MlflowClient

    run = make_run(tmp_path / "run", "mlflow")
    train(run, last=3)
    train(run, first=3)
    assert not warnings
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("watched")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "run/sft"
    assert found.data.tags["constitution_sha"] == SHA
    text = Path(client.download_artifacts(found.info.run_id, "config.json", str(tmp_path))).read_text()
    assert json.loads(text) == run.config.model_dump(mode="json")
    for name in ("sft/loss", "tokens/per_s"):
        logged = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        assert sorted(set(logged)) == [(row["step"], row[name]) for row in ROWS]
        assert len(logged) == len(ROWS) + 1
