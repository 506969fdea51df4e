"""What a rank tells the driver while it trains, through Ray's own store."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cai_ray.train.runtime import metrics
from tests.ray import training


def test_progress_and_warnings_reach_the_driver(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "_driver_key", "")
    key = f"sft-0123-{time.time_ns()}"
    with metrics.progress_lines(key):
        metrics.report_to(key)
        log = metrics.Log(training.make_run(tmp_path, sinks=[]), "sft", 3)
        log.add(1, {"sft/loss": 2.5, "tokens/per_s": 10.0})
        metrics.warn("a dashboard is away")
        deadline = time.monotonic() + 20
        while "step 1 of 3" not in (said := capfd.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.2)
        metrics.warn("so is another")  # at the very end
    said += capfd.readouterr().err
    assert "  sft: step 1 of 3, loss 2.5, 10 tokens/s\n" in said
    assert said.count("warning: a dashboard is away\n") == said.count("warning: so is another\n") == 1
    assert metrics.get(key, "progress") is None, "nothing is left in the store"
