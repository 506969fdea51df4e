"""One complete small run of the packaged configuration, made by the command line and read by many tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import SMALL, settings, succeed


@pytest.fixture(scope="session")
def town_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory. Tests leave it as it is; what changes a run works on a copy."""
    out = tmp_path_factory.mktemp("town") / "run"
    words = ("errand-town", "--out", out, *settings(SMALL))
    done = succeed("run", *words, "--until", "rm", timeout=1200)
    assert done.stdout.strip().endswith(str(out))
    # A generation stage, a training stage and the report each by a command of its own.
    for stage in ("ppo", "evaluate", "report"):
        assert f"{stage}: done in" in succeed(stage, *words, timeout=600).stderr
    return out
