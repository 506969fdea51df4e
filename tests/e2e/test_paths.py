"""Folders with blanks and letters beyond ASCII in their names: of the checkout, of its environment and of the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.command import ROOT, environment, refused, settings

FEW = {"revise.limit": 16, "revise.rounds": 1, "sft.epochs": 1, "sft.batch_size": 8}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder in which this checkout and its environment seem to lie."""
    folder = tmp_path / "my projects (été) – 한"
    folder.mkdir()
    (folder / "cai_ray").symlink_to(ROOT)
    (folder / "environment").symlink_to(sys.prefix)
    return folder


def run(elsewhere: Path, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    checkout = elsewhere / "cai_ray"
    return subprocess.run(
        [elsewhere / "environment" / "bin" / "python", "-m", "cai_ray", *map(str, words)],
        cwd=checkout,
        env=environment(PYTHONPATH=str(checkout), **env),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_stages_run_wherever_the_checkout_and_the_run_are(elsewhere: Path) -> None:
    """Ray Data's actors, Ray Train's controller and its workers."""
    out = elsewhere / "runs" / "the first one"
    done = run(elsewhere, "run", "errand-town", "--out", out, *settings(FEW), "--until", "sft")
    assert done.returncode == 0, done.stderr[-8000:]
    assert (out / "sft" / "model" / "model.safetensors").exists()


def test_a_cluster_that_cannot_start_workers_there_is_one_line(elsewhere: Path) -> None:
    done = run(
        elsewhere,
        "run",
        "errand-town",
        "--out",
        elsewhere / "run",
        "--until",
        "revise",
        RAY_ADDRESS="127.0.0.1:1",
    )
    assert f"cannot start workers with {elsewhere}/environment/bin/python" in refused(done)
