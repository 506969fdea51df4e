"""Runs whose stages before PPO are given: a policy and a reward model of the embedded world's size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from cai_ray.config.training import TrainConfig
from cai_ray.storage import files
from cai_ray.storage.run import Run
from cai_ray.town import BASE
from cai_ray.train.models import load_reward_model
from cai_ray.train.weights.state import save_folder
from tests.ray.engines import town_config


def ready_for_ppo(out: Path, *, templates: str = "errand-town", **changes: Any) -> Run:
    """A run with `sft` (the base model) and `rm` (the base model with a random head) made.

    Args:
        changes: sections of the configuration, such as `ppo={"steps": 2}`.
    """
    run = Run(town_config(out=str(out), templates=templates, **changes))
    shutil.copytree(BASE, run.path("sft", "model"))
    save_folder(load_reward_model(BASE, TrainConfig()), BASE, run.path("rm", "model"))
    files.write_json(run.path("rm", "model", "reward_head.json"), {"mean": 0.0, "std": 1.0})
    return run
