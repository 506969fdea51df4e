"""A run in object storage: whole on a bad day; and killed in the middle, its model and prompts lying there too."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cai_ray import storage
from cai_ray.generate.sources import read_prompts
from cai_ray.storage import Run, open_run
from cai_ray.town import BASE
from tests.cluster.jobs import SETTINGS
from tests.e2e.command import Driver, settings, succeed
from tests.s3 import S3, Fault


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    made = S3()
    yield made
    made.close()


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, which this process and those that it starts take for S3."""
    server.stand_in(monkeypatch)
    return server


def bad_day() -> list[Fault]:
    """Of a hundred requests some thirty go wrong."""
    return [
        Fault("500", every=9),
        Fault("503", every=13, match="GET|HEAD"),
        Fault("slow", every=31, seconds=1.0),
        Fault("cut the request", every=17, match="PUT"),
        Fault("cut the answer", every=11, match="GET .*(parquet|safetensors|json)"),
        Fault("lose the answer", every=19, match="PUT|POST|DELETE"),
    ]


def test_a_whole_run_on_a_bad_day(s3: S3, jobs_run: Path) -> None:
    """It ends as the same run does on a disk, to the last bit of the weights."""
    out, words = "s3://bucket/whole", settings(SETTINGS)
    before = len(s3.proxy.asked)
    with s3.proxy.failing(*bad_day()) as faults:
        said = succeed("run", "errand-town", "--out", out, *words, timeout=1500)
        assert said.stdout.strip().endswith(out)
        states = json.loads(succeed("status", out, "--json").stdout)
        exported = succeed("export", out, "--out", "s3://bucket/export").stdout
    assert all(fault.done for fault in faults), faults
    assert len(s3.proxy.asked) - before < 2500  # those that failed too
    assert {row["state"] for row in states} == {"done"} and len(states) == 8
    there, here = open_run(out), open_run(str(jobs_run))
    for stage in ("revise", "sft", "compare", "label", "evaluate"):
        assert _rows(there, stage) == _rows(here, stage), stage
    for stage in ("revise", "sft", "compare", "label", "rm", "ppo", "evaluate"):
        mine, other = there.manifest(stage), here.manifest(stage)
        assert mine and other
        for key in ("rows_in", "rows_out", "errors", "steps", "model_sha", "init_sha", "constitution_sha"):
            assert mine.get(key) == other.get(key), (stage, key)
        # What a stage rests on is the same, but for the ids of the stages before it, which are drawn.
        assert {k: v for k, v in mine["inputs"].items() if k not in SHOWN} == {
            k: v for k, v in other["inputs"].items() if k not in SHOWN
        }
    for stage in ("sft", "rm", "ppo"):
        name = (stage, "model", "model.safetensors")
        assert storage.read_bytes(there.path(*name)) == (jobs_run / Path(*name)).read_bytes()
        assert storage.list_files(there.path(stage, "checkpoints"), recursive=True) == []
        assert storage.list_files(there.path(stage, "tensorboard")) != []
    assert b"<html" in storage.read_bytes(there.path("report", "index.html"))
    row = there.rows("revise", ["id"])[0]["id"]
    assert row in succeed("explain", out, row).stdout
    assert exported.strip() == "s3://bucket/export"
    rl = "models/rl/model.safetensors"
    assert storage.read_bytes(f"s3://bucket/export/{rl}") == storage.read_bytes(
        there.path("ppo", "model", "model.safetensors")
    )
    # Nothing is done again, and to find that out costs little.
    with s3.proxy.counting() as asked:
        again = succeed("run", "errand-town", "--out", out, *words).stderr
    assert again.count("done before") == 8 and asked.total() < 400, asked


SHOWN = {"revise", "sft", "compare", "label", "rm", "ppo", "evaluate"}


def test_a_run_killed_in_the_middle_goes_on(s3: S3, jobs_run: Path, tmp_path: Path) -> None:
    """As on a spot machine: while rows are written, and again while a checkpoint is half sent.

    Model and prompts are read from the bucket too.
    """
    here = open_run(str(jobs_run))
    storage.upload_folder(BASE, "s3://bucket/models/base")
    given = [
        {k: row[k] for k in ("messages", "kind", "family", "split")}
        for row in read_prompts(here.config.prompts, 0)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in given)
    storage.write_bytes("s3://bucket/prompts.jsonl", lines.encode())
    out = "s3://bucket/killed"
    changes = {
        **SETTINGS,
        "model": "s3://bucket/models/base",
        "prompts": '[{path: "s3://bucket/prompts.jsonl"}]',
        "sft.checkpoint_every": 2,
    }
    words = ("run", "errand-town", "--until", "sft", "--out", out, *settings(changes))
    first, second = Driver(tmp_path / "1", *words), None
    try:
        _wait(first, lambda: _asked(s3, "PUT /bucket/killed/revise/journal/part/done-") >= 5)
        first.signal_group(signal.SIGKILL)
        assert not storage.exists(f"{out}/revise/manifest.json")
        assert first.leftovers() == []
        hang = Fault("hang", match="POST .*optim_states.*uploads", every=3, times=1, seconds=120)
        with s3.proxy.failing(hang):
            second = Driver(tmp_path / "2", *words)
            _wait(second, lambda: hang.done == 1)
            second.signal_group(signal.SIGKILL)
        assert second.leftovers() == []
    finally:
        first.end()
        if second:
            second.end()
    kept = re.search(r"revise: (\d+) of (\d+) rows were finished before", second.said())
    assert kept and 10 <= int(kept[1]) < int(kept[2])
    assert not storage.exists(f"{out}/sft/manifest.json")
    begun = sorted(
        {m[1] for a in s3.proxy.asked if (m := re.search(r"killed/.*/(checkpoint_\d[^/]*)/.", a.path))}
    )
    files = storage.list_files(f"{out}/sft/checkpoints", recursive=True)
    whole, half = ({f.partition(f"{name}/")[2] for f in files if name in f} for name in begun[-2:])
    assert half < whole  # a part of it is there, and is not to be taken for the whole
    before = len(s3.proxy.asked)
    said = succeed(*words, timeout=600).stderr
    assert "revise: done before" in said
    read = [a.path for a in s3.proxy.asked[before:] if a.method == "GET" and "loop-0.pt" in a.path]
    assert read and all(begun[-2] in path for path in read), read  # it went on from the one before
    there = open_run(out)
    names = ("messages", "response", "revision", "steps", "error", "kind")
    assert _rows(there, "revise", names) == _rows(here, "revise", names)
    metrics = storage.read_bytes(there.path("sft", "metrics.jsonl")).decode().splitlines()
    manifest = there.manifest("sft")
    assert manifest and [json.loads(m)["step"] for m in metrics] == list(range(1, manifest["steps"] + 1))
    weights = storage.read_bytes(there.path("sft", "model", "model.safetensors"))
    assert weights == (jobs_run / "sft" / "model" / "model.safetensors").read_bytes()
    left = [f for f in storage.list_files(out, recursive=True) if "/checkpoints/" in f or "/journal/" in f]
    assert left == []


def _rows(run: Run, stage: str, names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """In the order of their ids, all but what depends on what the engine's cache held."""
    rows = run.rows(stage)
    assert len({row["id"] for row in rows}) == len(rows) > 0
    return [{k: v for k, v in row.items() if k != "usage" and (not names or k in names)} for row in rows]


def _asked(s3: S3, start: str) -> int:
    return sum(f"{a.method} {a.path}".startswith(start) and a.status == 200 for a in list(s3.proxy.asked))


def _wait(driver: Driver, there: Callable[[], bool], timeout: float = 400) -> None:
    deadline = time.time() + timeout
    while not there():
        assert time.time() < deadline, driver.said()[-4000:]
        driver.run_for(0.1)
