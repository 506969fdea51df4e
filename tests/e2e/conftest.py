"""What many tests share: one complete small run, made by the command line; one server; a browser."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest

from cai_ray import constitution
from cai_ray.config.load import load_config
from cai_ray.storage import files
from cai_ray.storage.run import Run
from cai_ray.town import BASE
from cai_ray.train.models import load_reward_model
from cai_ray.train.weights.state import save_folder
from tests.e2e.command import ROOT, SMALL, TOKEN, Driver, environment, free_port, settings, succeed


@pytest.fixture(scope="session")
def town_run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The run directory. Tests leave it as it is; what changes a run works on a copy.

    It takes five minutes, so pytest's cache keeps it for as long as nothing changes that it could depend on:
    `make test-rest` takes the run that `make test` made.
    """
    kept = request.config.cache.mkdir("town-run") / _package_sha()
    out = tmp_path_factory.mktemp("town") / "run"
    if not kept.exists():
        _make_town_run(out)
        shutil.rmtree(kept.parent)  # runs of other versions
        shutil.copytree(out, kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
    else:
        shutil.copytree(kept, out)
    return out


def _make_town_run(out: Path) -> None:
    words = ("errand-town", "--out", out, *settings(SMALL))
    done = succeed("run", *words, "--until", "rm", timeout=1200)
    assert done.stdout.strip().endswith(str(out))
    # A generation stage, a training stage and the report each by a command of its own.
    for stage in ("ppo", "evaluate", "report"):
        assert f"{stage}: done in" in succeed(stage, *words, timeout=600).stderr


def _package_sha() -> str:
    """A hash of the package, its settings in the test and everything that is installed."""
    digest = hashlib.sha256(repr((SMALL, sys.version)).encode())
    installed = [ROOT / name for name in ("pyproject.toml", "requirements-cpu.lock")]
    package = [p for p in (ROOT / "cai_ray").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    for path in sorted([*installed, *package]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run directory as the pipeline leaves it: the embedded base model as policy, a random head as reward model."""
    root = tmp_path_factory.mktemp("run")
    cfg = load_config("errand-town", out=str(root))
    run = Run(cfg)
    shutil.copytree(BASE, root / "ppo" / "model")
    save_folder(load_reward_model(str(BASE), cfg.rm), str(BASE), run.path("rm", "model"))
    files.write_json(run.path("rm", "model", "reward_head.json"), {"mean": 0.5, "std": 2.0})
    files.write_json(run.path("run.json"), {"config": cfg.model_dump(mode="json")})
    files.write_bytes(run.path("constitution.yaml"), constitution.load("errand-town").to_yaml().encode())
    for stage in ("ppo", "rm"):
        files.write_json(run.path(stage, "manifest.json"), {"stage": stage})
    return run


@pytest.fixture(scope="session")
def served(served_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of that run, with two models. Tests leave its constitution as it is."""
    port = free_port()
    words = ("serve", served_run.root, "--models", "rl,base", "--port", port)
    log = tmp_path_factory.mktemp("log") / "serve.log"
    server = Driver(log, *words, env=environment(CAI_RAY_TOKEN=TOKEN))
    try:
        server.wait_for("serving", 600)  # said when every replica is up
        yield f"http://127.0.0.1:{port}"
    finally:
        server.process.send_signal(signal.SIGINT)
        try:
            server.process.wait(60)
        except TimeoutExpired:
            os.killpg(server.process.pid, signal.SIGKILL)
            raise


@pytest.fixture(scope="module")  # while it is there, no other event loop can run in this process
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here; install one (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()
