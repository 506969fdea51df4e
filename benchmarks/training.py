"""What benchmarks of training share: rows of skewed lengths, a group of ranks without Ray, and TRL's steps timed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cai_ray.train.batches import Example

TRL = "1.16.0"
LONGEST = 1024
MICRO_BATCH_TOKENS = 8192
"""For ours. TRL's micro-batches have a number of rows: as many as the longest would allow, 8."""
WARM = 1
"""Steps before the ones that count: the first one allocates."""


def words_of(model: str) -> int:
    """The vocabulary of a model's folder."""
    return int(json.loads((Path(model) / "config.json").read_text())["vocab_size"])


def padding(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
    """Its share of the tokens of micro-batches, given as indices of rows."""
    padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    return 1 - sum(lengths[i] for group in groups for i in group) / padded


def skewed(count: int, words: int, seed: int, median: int = 150, spread: float = 0.8) -> list[Example]:
    """Rows of random ids, prompt and answer log-normal in length as answers are; the answer counts."""
    g = torch.Generator().manual_seed(seed)

    def lengths(median: int, most: int) -> list[int]:
        drawn = median * torch.exp(spread * torch.randn(count, generator=g))
        return drawn.long().clamp(8, most).tolist()

    rows = []
    for prompt, answer in zip(
        lengths(median // 3, LONGEST // 4), lengths(median, 3 * LONGEST // 4), strict=True
    ):
        ids = torch.randint(3, words, (prompt + answer,), generator=g).tolist()
        rows.append(Example(ids, [0] * prompt + [1] * answer))
    return rows


def join(folder: str, rank: int = 0, world: int = 1) -> None:
    """Makes this process a rank of a group that meets in a folder."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=world
    )


def timed(step: Callable[[int], Any], steps: int) -> float:
    """Seconds of all steps but the first ones."""
    for number in range(steps):
        if number == WARM:
            started = time.perf_counter()
        step(number)
    return time.perf_counter() - started


def timed_by(trainer: Any) -> float:
    """The same of TRL's trainer, from the end of one step to the end of the last."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Watch())
    trainer.train()
    return ends[-1] - ends[WARM - 1]


def settings(folder: str, rows: int, batch: int, steps: int) -> dict[str, Any]:
    """TRL's, as ours are: optimizer, clipping, precision; everything that is not training is off."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": batch // rows,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
