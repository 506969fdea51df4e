"""Supervised fine-tuning: tokens that count a second, ours beside TRL's SFTTrainer.

    python benchmarks/sft.py [--rows N] [--runs N]

A random model of 3 million parameters in fp32, one thread, on random rows whose lengths are skewed as answers' are
(log-normal; at most 1,024 tokens). The loss is that of the answers' tokens on all sides, and these are what is counted.

- `ours`: the stage's own `update`, under DeepSpeed.
- `unpacked`: SFTTrainer as it comes: 8 rows in a micro-batch, in the order in which they come. With the longest of
  1,024 tokens these take the memory that ours may take.
- `single`: the same with 1 row in a micro-batch, which pads nothing and is the best of TRL's sizes on one core.
- `packed`: SFTTrainer with `packing=True`: rows of 1,024 tokens, each a micro-batch (several in one would be one long
  row, with a mask of its length squared), as many in a step as give the same tokens.

TRL is installed into a folder of its own by the first run (baseline.py) and uses the same torch and transformers. All
steps but the first are timed. Each measurement is a process of its own; they take turns, and medians are compared. The
last line is JSON: `vs_trl_unpacked`, `vs_trl_single` and `vs_trl_best`, of all three, are ours over theirs, `padding`
is its share of our tokens.
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
from cai_ray.train.batches import Example, micro_batches

BATCH = 32
ROWS = {"unpacked": 8, "single": 1, "packed": 1}
"""Of TRL's micro-batches."""
WAYS = ("ours", *ROWS)


def main() -> int:
    env = {way: lambda: baseline.trl(TRL) for way in WAYS[1:]}
    return Turns(__file__, __doc__, WAYS, rows=7 * BATCH, hidden=256, layers=4, env=env).main(
        measure, summary
    )


def summary(found: Found, rows: int) -> dict[str, Any]:
    rates = median_of(found, "rate")
    ours = rates["ours"]
    return {
        "vs_trl_unpacked": round(ours / rates["unpacked"], 2),
        "vs_trl_single": round(ours / rates["single"], 2),
        "vs_trl_best": round(ours / max(rates[way] for way in ROWS), 2),
        "padding": round(found["ours"][0]["padding"], 3),
        "tokens_per_s": {way: round(rate) for way, rate in rates.items()},
        "trl": TRL,
        "rows_per_step": {way: found[way][0]["rows_per_step"] for way in WAYS},
        "micro_batch": {"ours": f"{MICRO_BATCH_TOKENS} tokens"}
        | {way: f"{n} rows" for way, n in ROWS.items()},
    }


def measure(way: str, model: str, rows: int, folder: str) -> dict[str, Any]:
    data = skewed(rows, words_of(model), seed=1)
    tokens, seconds, more = ours(model, data, folder) if way == "ours" else theirs(way, model, data, folder)
    return {"rate": tokens / seconds, "seconds": seconds, "start": 0.0, **more}


def ours(model: str, data: list[Example], folder: str) -> tuple[int, float, dict[str, Any]]:
    """Tokens that counted, and their seconds."""
    from cai_ray.train import sft
    from cai_ray.train.dialogues import pack
    from cai_ray.train.models import load_policy
    from cai_ray.train.runtime.engine import distribute

    join(folder)
    cfg = TrainConfig(micro_batch_tokens=MICRO_BATCH_TOKENS, schedule="constant")
    policy, packed = distribute(load_policy(model, cfg), cfg, 1000), pack(data)
    batches = [list(range(i, i + BATCH)) for i in range(0, len(data), BATCH)]
    seconds = timed(lambda i: sft.update(policy, packed, batches[i], cfg, 0), len(batches))
    lengths = packed.lengths
    cuts = [micro_batches([lengths[i] for i in batch], MICRO_BATCH_TOKENS) for batch in batches]
    groups = [[batch[i] for i in g] for batch, cut in zip(batches, cuts, strict=True) for g in cut]
    tokens = sum(sum(row.mask) for row in data[WARM * BATCH :])
    return tokens, seconds, {"rows_per_step": BATCH, "padding": padding(lengths, groups)}


def theirs(way: str, model: str, data: list[Example], folder: str) -> tuple[int, float, dict[str, Any]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    packed, steps = way == "packed", len(data) // BATCH
    rows = ROWS[way]
    # The packer fills rows nearly to the end, so that these hold what a step of whole rows does.
    batch = round(sum(len(row.ids) for row in data) / steps / LONGEST) if packed else BATCH
    args = SFTConfig(
        **settings(folder, rows, batch, steps), packing=packed, max_length=LONGEST, completion_only_loss=True
    )
    table = Dataset.from_dict({"input_ids": [r.ids for r in data], "completion_mask": [r.mask for r in data]})
    trainer = SFTTrainer(model, args, train_dataset=table)
    collate, counted = trainer.data_collator, []

    def counting(examples: list[Any]) -> Any:
        made = collate(examples)
        counted.append(int((made["labels"] != -100).sum()))
        return made

    trainer.data_collator = counting
    seconds = timed_by(trainer)
    tokens = sum(counted[WARM * batch // rows : steps * batch // rows])
    return tokens, seconds, {"rows_per_step": batch}


if __name__ == "__main__":
    sys.exit(main())
