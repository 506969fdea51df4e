"""Weak scaling: two ranks that train together beside two that train apart, for ZeRO 1, 2 and 3.

    python benchmarks/scale.py [--rows N] [--runs N] [--only sft|ppo]

`sft` is the stage's own `update`, `ppo` that of policy and value model with made-up rollouts, under DeepSpeed over gloo
and without Ray, one thread for each rank. A step has the given rows, of skewed lengths (log-normal). Apart, two
processes have the rows that the two ranks are dealt together, and start their steps at the same time: what two
processes take from one another on a machine is in both, and what is left is what the ranks do for one another.

All steps but the first are timed. Each measurement is a group of processes of its own; they take turns, and medians are
compared. The last line is JSON: `efficiency` is tokens a second together over those apart, and `gib_per_rank` the
most resident memory of a rank together, each by kind and ZeRO stage.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import join, skewed, words_of
from benchmarks.turns import Found, Turns, median_of
from cai_ray.config.ppo import PpoConfig
from cai_ray.config.training import TrainConfig
from cai_ray.train.batches import Example, for_rank

KINDS, STAGES, GROUPS = ("sft", "ppo"), (1, 2, 3), ("together", "apart")
WORLD = 2
STEPS = 2
"""Timed ones, after one that is not."""
MICRO_BATCH_TOKENS = 4096


def main() -> int:
    ways = [f"{kind} {stage} {group}" for kind in KINDS for stage in STAGES for group in GROUPS]
    return Turns(__file__, __doc__, ways, rows=64, hidden=384, layers=4, kinds=KINDS).main(measure, summary)


def summary(found: Found, rows: int) -> dict[str, Any]:
    rates, gib = median_of(found, "rate"), median_of(found, "gib")
    pairs = [(kind, stage) for kind in KINDS for stage in STAGES if f"{kind} {stage} apart" in found]

    def table(cell: Callable[[str], float]) -> dict[str, dict[str, float]]:
        return {
            kind: {f"zero_{stage}": round(cell(f"{kind} {stage}"), 3) for k, stage in pairs if k == kind}
            for kind in dict(pairs)
        }

    return {
        "efficiency": table(lambda way: rates[f"{way} together"] / rates[f"{way} apart"]),
        "gib_per_rank": table(lambda way: gib[f"{way} together"]),
        "tokens_per_s": {way: round(rate) for way, rate in rates.items()},
        "tokens_per_rank_and_step": next(iter(found.values()))[0]["tokens"] // WORLD,
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "ranks": WORLD,
        "steps": STEPS,
    }


def measure(way: str, model: str, rows: int, folder: str) -> dict[str, Any]:
    started = time.perf_counter()
    with ProcessPoolExecutor(WORLD, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(on_rank, way, model, rows, folder, rank) for rank in range(WORLD)]
        found = [job.result() for job in jobs]
    seconds = max(f["seconds"] for f in found)
    return {
        "rate": sum(f["rate"] for f in found),
        "gib": max(f["gib"] for f in found),
        "tokens": sum(f["tokens"] for f in found),
        "seconds": seconds,
        "start": time.perf_counter() - started - seconds,
    }


def on_rank(way: str, model: str, rows: int, folder: str, rank: int) -> dict[str, float]:
    kind, stage, group = way.split()
    data = skewed(rows, words_of(model), seed=1)
    lengths = [len(row.ids) for row in data]
    mine = for_rank(range(rows), rank, WORLD, lengths)
    if group == "together":
        join(folder, rank, WORLD)
    else:
        own = Path(folder) / str(rank)
        own.mkdir()
        join(str(own))
        data = [data[i] for i in mine]
    step = {"sft": sft_step, "ppo": ppo_step}[kind](model, data, int(stage))
    step()
    meet(folder, rank)
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds = time.perf_counter() - started
    tokens = sum(lengths[i] for i in mine)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"rate": STEPS * tokens / seconds, "tokens": tokens, "seconds": seconds, "gib": gib}


def meet(folder: str, rank: int) -> None:
    """Returns when all ranks are here; those that train apart know no other way."""
    (Path(folder) / f"here-{rank}").touch()
    while not all((Path(folder) / f"here-{other}").exists() for other in range(WORLD)):
        time.sleep(0.01)


def sft_step(model: str, data: list[Example], stage: int) -> Callable[[], Any]:
    from cai_ray.train import sft
    from cai_ray.train.dialogues import pack
    from cai_ray.train.models import load_policy
    from cai_ray.train.runtime.engine import distribute

    cfg = TrainConfig(micro_batch_tokens=MICRO_BATCH_TOKENS, zero_stage=stage, schedule="constant")  # type: ignore[arg-type]
    policy, packed = distribute(load_policy(model, cfg), cfg, 1000), pack(data)
    return lambda: sft.update(policy, packed, list(range(len(data))), cfg, 0)


def ppo_step(model: str, data: list[Example], stage: int) -> Callable[[], Any]:
    from cai_ray.train.models import load_policy, load_value_model
    from cai_ray.train.ppo import update
    from cai_ray.train.ppo.experience import Batch, Targets, minibatches
    from cai_ray.train.runtime.engine import distribute
    from cai_ray.train.runtime.ranks import rank, world_size

    count = len(data)
    cfg = PpoConfig(
        micro_batch_tokens=MICRO_BATCH_TOKENS, zero_stage=stage, schedule="constant",  # type: ignore[arg-type]
        epochs=1, rollout_batch=count, minibatch=count, max_update_kl=None,
    )  # fmt: skip
    policy = distribute(load_policy(model, cfg), cfg, 1000)
    value = distribute(load_value_model(model, cfg, False), cfg, 1000)
    update.check_ratio = lambda *_: None  # type: ignore[attr-defined]  # these log-probabilities are made up
    g = torch.Generator().manual_seed(2)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row.mask, dtype=torch.float32) for row in data], True
    )
    old, advantages, returns = (torch.randn(mask.shape, generator=g) for _ in range(3))
    none = torch.zeros(count)
    targets = Targets(old, old, advantages, returns, torch.ones_like(mask), none, none)
    batch = Batch(data, torch.zeros(count, dtype=torch.bool), mask, torch.zeros_like(mask))
    plan = minibatches(batch.lengths, cfg, 0, 0, 0, rank(), world_size())

    def step() -> None:
        update.update_policy(policy, batch, targets, plan, cfg, 0)
        update.update_value(value, batch, targets, plan, cfg, 0, cfg.value_clip)

    return step


if __name__ == "__main__":
    sys.exit(main())
