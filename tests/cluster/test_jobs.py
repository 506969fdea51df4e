"""The scripts under jobs/, submitted with `ray job submit` to a cluster of this machine, as the README says."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cai_ray.storage import open_run
from tests.e2e.command import BIN, ROOT, SMALL, environment, free_port, settings


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node, and the environment in which it is reached. Ended by its own processes, no other's."""
    dashboard = free_port()
    address = f"http://127.0.0.1:{dashboard}"
    # Ray asks for a token unless told otherwise; a cluster's nodes, drivers and clients have the same one.
    env = environment(
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
    )
    log = tmp_path_factory.mktemp("log") / "head.log"
    # Of its own: another cluster of this machine is not disturbed, nor taken for this one. The name of a socket may
    # have 107 bytes, so the folder is not pytest's.
    folder = tempfile.mkdtemp(prefix="ray")
    command = f"""{BIN}/ray start --head --block --temp-dir {folder} --port {free_port()}
        --dashboard-port {dashboard} --dashboard-host 127.0.0.1 --dashboard-agent-listen-port {free_port()}
        --ray-client-server-port {free_port()} --num-cpus 16 --object-store-memory 300000000
        --disable-usage-stats"""
    with log.open("wb") as out:
        head = subprocess.Popen(
            command.split(), env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.time() + 90
        while subprocess.run(
            [f"{BIN}/ray", "job", "list", "--address", address], env=env, capture_output=True
        ).returncode:
            assert head.poll() is None, log.read_text()
            assert time.time() < deadline, log.read_text()
            time.sleep(1)
        yield {**env, "RAY_API_SERVER_ADDRESS": address}
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


def test_stages_run_as_jobs_and_one_submitted_again_goes_on(cluster: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    few = settings({**SMALL, "revise.limit": 24})
    said = _submit(cluster, "python", "jobs/revise.py", "errand-town", "--out", out, *few)
    assert "revise: done in" in said
    manifest = out / "revise" / "manifest.json"
    made = manifest.read_text()
    rows = json.loads(made)["rows_out"]
    assert rows == len({r["id"] for r in open_run(str(out)).rows("revise")}) >= 24
    # A training stage in a job: its workers are on the same cluster.
    said = _submit(cluster, "python", "jobs/run.py", "errand-town", "--out", out, "--until", "sft", *few)
    assert "revise: done before" in said
    assert "sft: done in" in said
    assert manifest.read_text() == made
    assert (out / "sft" / "model" / "model.safetensors").exists()


def test_the_report_and_the_status_of_a_run_as_jobs(
    cluster: dict[str, str], town_run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(town_run, tmp_path / "run", ignore=shutil.ignore_patterns("report")))
    words = ("errand-town", "--out", copy, *settings(SMALL))
    assert "report: done in" in _submit(cluster, "python", "jobs/report.py", *words)
    assert (copy / "report" / "index.html").exists()
    said = _submit(cluster, "python", "-m", "cai_ray", "status", copy)
    assert "missing" not in said and said.count(" done ") >= 8


def test_a_job_with_a_wrong_setting_fails_with_one_line(cluster: dict[str, str], tmp_path: Path) -> None:
    wrong = settings({"revise.round": 2})
    out = _submit(
        cluster, "python", "jobs/run.py", "errand-town", "--out", tmp_path / "run", *wrong, fails=True
    )
    assert "did you mean 'rounds'?" in out
    assert "Traceback" not in out.split("did you mean")[0]


def _submit(env: dict[str, str], *entrypoint: Any, fails: bool = False) -> str:
    done = subprocess.run(
        [f"{BIN}/ray", "job", "submit", "--working-dir", ".", "--", *map(str, entrypoint)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def _end(head: subprocess.Popen[bytes]) -> None:
    """`ray start --block` ends its node's processes when it is told to end; `ray stop` would end every cluster here."""
    import psutil

    started = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs([psutil.Process(head.pid), *started] if started else [], timeout=5)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    head.wait(10)
