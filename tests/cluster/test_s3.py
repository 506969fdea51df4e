"""A run in object storage: on a bad day, and killed in the middle of what it writes."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cai_ray.data.sources import read_prompts
from cai_ray.stages import STAGES
from cai_ray.storage import files
from cai_ray.storage.run import Run, open_run
from cai_ray.town import BASE
from tests.cluster.jobs import SETTINGS
from tests.e2e.command import Driver, settings, succeed
from tests.s3 import S3, Fault


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A server, which this process and those that it starts take for S3."""
    made = S3()
    made.stand_in(monkeypatch)
    yield made
    made.close()


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


def test_a_whole_run_on_a_bad_day_killed_twice(s3: S3, jobs_run: Path, tmp_path: Path) -> None:
    """As on a spot machine: killed while rows are written, and again while a checkpoint is half sent. It ends as the
    same run does on a disk, to the last bit of the weights. Model and prompts lie in the bucket, too.
    """
    here, out = open_run(str(jobs_run)), "s3://bucket/whole"
    words = ("errand-town", "--out", out, *settings(changes(here)))
    before = len(s3.proxy.asked)
    first, second = Driver(tmp_path / "1", "run", *words), None
    try:
        killed_while(first, s3, Fault("hang", match="PUT .*revise/journal/part/done-", after=5, seconds=120))
        assert not files.exists(f"{out}/revise/manifest.json")
        second = Driver(tmp_path / "2", "run", *words)
        hanging = Fault("hang", match="POST .*optim_states.*uploads", after=3, seconds=120)
        killed_while(second, s3, hanging, *bad_day())
    finally:
        first.end()
        if second:
            second.end()
    kept = re.search(r"revise: (\d+) of (\d+) rows were finished before", second.said())
    assert kept and 10 <= int(kept[1]) < int(kept[2])
    assert files.exists(f"{out}/revise/manifest.json") and not files.exists(f"{out}/sft/manifest.json")
    begun = sorted(
        {m[1] for a in s3.proxy.asked if (m := re.search(r"whole/.*/(checkpoint_\d[^/]*)/.", a.path))}
    )
    paths = files.list_files(f"{out}/sft/checkpoints", recursive=True)
    whole, half = ({f.partition(f"{name}/")[2] for f in paths if name in f} for name in begun[-2:])
    assert half < whole  # a part of it is there, and is not to be taken for the whole

    third = len(s3.proxy.asked)
    with s3.proxy.failing(*bad_day()) as faults:
        said = succeed("run", *words, timeout=1500)
        states = json.loads(succeed("status", out, "--json").stdout)
        exported = succeed("export", out, "--out", "s3://bucket/export").stdout
    assert all(fault.done for fault in faults), faults
    # Those that failed too: of the attempt that ends, and of all three.
    assert len(s3.proxy.asked) - third < 2500 and len(s3.proxy.asked) - before < 3500
    assert "revise: done before" in said.stderr and said.stdout.strip().endswith(out)
    read = [a.path for a in s3.proxy.asked[third:] if a.method == "GET" and "loop-0.pt" in a.path]
    assert read and all(begun[-2] in path for path in read), read  # it went on from the one before
    assert {row["state"] for row in states} == {"done"} and len(states) == 8

    there = open_run(out)
    for stage in ("revise", "sft", "compare", "label", "evaluate"):
        assert _rows(there, stage) == _rows(here, stage), stage
    for stage in ("revise", "sft", "compare", "label", "rm", "ppo", "evaluate"):
        mine, other = there.manifest(stage), here.manifest(stage)
        assert mine and other
        for key in ("rows_in", "rows_out", "errors", "steps", "model_sha", "init_sha", "constitution_sha"):
            assert mine.get(key) == other.get(key), (stage, key)
        # What a stage rests on is the same, but for the prompts' file, and the ids of the stages before it, which
        # are drawn.
        assert {k: v for k, v in mine["inputs"].items() if k not in {"prompts", *STAGES}} == {
            k: v for k, v in other["inputs"].items() if k not in {"prompts", *STAGES}
        }
    metrics = files.read_bytes(there.path("sft", "metrics.jsonl")).decode().splitlines()
    assert [json.loads(m)["step"] for m in metrics] == list(range(1, len(metrics) + 1)) and len(metrics) > 8
    for stage in ("sft", "rm", "ppo"):
        name = (stage, "model", "model.safetensors")
        assert files.read_bytes(there.path(*name)) == (jobs_run / Path(*name)).read_bytes()
        assert files.list_files(there.path(stage, "tensorboard")) != []
    left = [f for f in files.list_files(out, recursive=True) if "/checkpoints/" in f or "/journal/" in f]
    assert left == []
    assert b"<html" in files.read_bytes(there.path("report", "index.html"))
    row = there.rows("revise", ["id"])[0]["id"]
    assert row in succeed("explain", out, row).stdout
    assert exported.strip() == "s3://bucket/export"
    rl = "models/rl/model.safetensors"
    assert files.read_bytes(f"s3://bucket/export/{rl}") == files.read_bytes(
        there.path("ppo", "model", "model.safetensors")
    )
    # Nothing is done again, and to find that out costs little.
    with s3.proxy.counting() as asked:
        again = succeed("run", *words).stderr
    assert again.count("done before") == 8 and asked.total() < 330, asked


def changes(run: Run) -> dict[str, Any]:
    """Settings of the same run, with the model and the prompts of its first stage put into the bucket."""
    files.upload_folder(BASE, "s3://bucket/models/base")
    given = [
        {k: row[k] for k in ("messages", "kind", "family", "split")}
        for row in read_prompts(run.config.prompts, 0)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in given)
    files.write_bytes("s3://bucket/prompts.jsonl", lines.encode())
    return {
        **SETTINGS,
        "model": "s3://bucket/models/base",
        "prompts": '[{path: "s3://bucket/prompts.jsonl"}]',
        "sft.checkpoint_every": 2,
    }


def killed_while(driver: Driver, s3: S3, hanging: Fault, *faults: Fault) -> None:
    """Ends a run with all its processes, while requests of a kind hang and others fail."""
    with s3.proxy.failing(hanging, *faults):
        deadline = time.time() + 400
        while not hanging.done:
            assert time.time() < deadline, driver.said()[-4000:]
            driver.run_for(0.1)
        driver.signal_group(signal.SIGKILL)
    assert driver.leftovers() == []


def _rows(run: Run, stage: str) -> list[dict[str, Any]]:
    """In the order of their ids, all but what depends on what the engine's cache held, and where the model lies."""
    rows = run.rows(stage)
    assert len({row["id"] for row in rows}) == len(rows) > 0
    hidden = {"usage", "model"} if stage == "revise" else {"usage"}
    return [{k: v for k, v in row.items() if k not in hidden} for row in rows]
