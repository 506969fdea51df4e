"""Reward model training: comparisons a second, ours beside TRL's RewardTrainer.

    python benchmarks/rm.py [--rows N] [--runs N]

A random model of 3 million parameters in fp32, one thread, on comparisons of random ids: a prompt with two answers,
whose lengths are skewed as answers' are (log-normal; at most 1,024 tokens). The label is hard, which TRL needs.

- `ours`: the stage's own `update`, under DeepSpeed.
- `trl`: RewardTrainer as it comes: 4 comparisons, that is 8 rows, in a micro-batch, in the order in which they come.
  With the longest of 1,024 tokens these take the memory that ours may take.
- `single`: the same with 1 comparison in a micro-batch, which pads least and is the best of TRL's sizes on one core.

TRL is installed into a folder of its own by the first run (baseline.py) and uses the same torch and transformers. All
steps but the first are timed. Each measurement is a process of its own; they take turns, and medians are compared. The
last line is JSON: `vs_trl` and `vs_trl_single` are ours over theirs, `padding` is its share of our tokens.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import baseline
from benchmarks.training import (
    LONGEST,
    MICRO_BATCH_TOKENS,
    TRL,
    WARM,
    join,
    padding,
    settings,
    skewed,
    timed,
    timed_by,
    words_of,
)
from benchmarks.turns import Found, Turns, median_of
from cai_ray.config.training import TrainConfig
from cai_ray.train.batches import Example

BATCH = 32
"""Comparisons of a step."""
PAIRS = {"trl": 4, "single": 1}
"""Of TRL's micro-batches."""
WAYS = ("ours", *PAIRS)
Pair = tuple[Example, Example]


def main() -> int:
    env = {way: lambda: baseline.trl(TRL) for way in PAIRS}
    return Turns(__file__, __doc__, WAYS, rows=4 * BATCH, hidden=256, layers=4, env=env).main(
        measure, summary
    )


def summary(found: Found, rows: int) -> dict[str, Any]:
    rates = median_of(found, "rate")
    return {
        "vs_trl": round(rates["ours"] / rates["trl"], 2),
        "vs_trl_single": round(rates["ours"] / rates["single"], 2),
        "padding": round(found["ours"][0]["padding"], 3),
        "comparisons_per_s": {way: round(rate, 2) for way, rate in rates.items()},
        "trl": TRL,
        "comparisons_per_step": BATCH,
        "micro_batch": {"ours": f"{MICRO_BATCH_TOKENS} tokens"}
        | {way: f"{n} comparisons" for way, n in PAIRS.items()},
    }


def measure(way: str, model: str, rows: int, folder: str) -> dict[str, Any]:
    pairs = comparisons(rows, words_of(model))
    seconds, more = ours(model, pairs, folder) if way == "ours" else theirs(PAIRS[way], model, pairs, folder)
    return {"rate": (rows - WARM * BATCH) / seconds, "seconds": seconds, "start": 0.0, **more}


def comparisons(count: int, words: int) -> list[Pair]:
    """Two rows each, with the prompt of the first."""
    pairs = []
    for first, other in zip(skewed(count, words, seed=1), skewed(count, words, seed=2), strict=True):
        prompt, answer = first.mask.count(0), other.mask.count(0)
        ids = first.ids[:prompt] + other.ids[answer:]
        pairs.append((first, Example(ids, [0] * prompt + [1] * (len(ids) - prompt))))
    return pairs


def ours(model: str, pairs: list[Pair], folder: str) -> tuple[float, dict[str, float]]:
    import numpy as np

    from cai_ray.train import rm
    from cai_ray.train.dialogues import pack
    from cai_ray.train.models import load_reward_model
    from cai_ray.train.pairs import Pairs
    from cai_ray.train.runtime.engine import distribute

    join(folder)
    cfg = TrainConfig(micro_batch_tokens=MICRO_BATCH_TOKENS, schedule="constant")
    reward = distribute(load_reward_model(model, cfg), cfg, 1000)
    rows = [row for pair in pairs for row in pair]
    data = Pairs(pack(rows), np.ones(len(pairs)), np.zeros(len(pairs), bool), 0)
    batches = [list(range(i, i + BATCH)) for i in range(0, len(pairs), BATCH)]
    seconds = timed(lambda i: rm.update(reward, data, batches[i], cfg), len(batches))
    groups = [
        rows for b in batches for micro_batch in data.micro_batches(b, cfg) for rows in micro_batch.passes
    ]
    return seconds, {"padding": padding([len(row.ids) for row in rows], groups)}


def theirs(rows: int, model: str, pairs: list[Pair], folder: str) -> tuple[float, dict[str, float]]:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(**settings(folder, rows, BATCH, len(pairs) // BATCH), max_length=LONGEST)
    columns = {"chosen_ids": [a.ids for a, _ in pairs], "rejected_ids": [b.ids for _, b in pairs]}
    return timed_by(RewardTrainer(model, args, train_dataset=Dataset.from_dict(columns))), {}


if __name__ == "__main__":
    sys.exit(main())
