"""The embedded world with engines and training on a GPU."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.command import SMALL, settings, succeed


def test_stages_up_to_the_reward_model_run_on_one_gpu(tmp_path: Path) -> None:
    """PPO wants a second GPU, for its rollouts."""
    given = settings({**SMALL, "engine.device": "gpu", "sft.dtype": "bfloat16"})
    said = succeed("run", "errand-town", "--out", tmp_path / "run", *given, "--until", "rm", timeout=1800)
    assert "rm: done in" in said.stderr
