"""Cores and precision on a CPU: tokens a second of engine and SFT on one core and on two, in float32 and in bfloat16.

    python benchmarks/threads.py MODEL [--runs N] [--only engine|sft]

MODEL is a folder or id of a Hugging Face model, such as HuggingFaceTB/SmolLM2-135M-Instruct.

- `engine`: the engine of a stage (vLLM) answers 48 questions at once with at most 64 tokens each; what it generates is
  counted.
- `sft`: the stage's own `update` under DeepSpeed, on random rows whose lengths are skewed as answers' are; the tokens
  that are trained on are counted, and the first step, which allocates, is not timed.

Each measurement is a process of its own with as many cores as it is measured on, and takes its threads from them, as
`threads: auto` does. They take turns, and medians are compared. The last line is JSON: `scaling` is the smaller of the
two gains, of engine and SFT, of two cores over one, in the precision that `dtype: auto` takes on this machine (`auto`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from cai_ray.cluster.connect import WORKER_ENV
from cai_ray.cluster.threads import use_threads
from cai_ray.config.engine import EngineConfig
from cai_ray.config.training import TrainConfig
from cai_ray.provenance.precision import bf16_unit
from cai_ray.provenance.versions import versions
from cai_ray.storage.models import ResolvedModel

KINDS, CORES, DTYPES = ("engine", "sft"), (1, 2), ("float32", "bfloat16")
WAYS = tuple(f"{kind} {cores} {dtype}" for dtype in DTYPES for kind in KINDS for cores in CORES)
QUESTIONS, MAX_TOKENS = 48, 64
STEPS, BATCH, MEDIAN = 3, 8, 80
"""Steps, rows of each, and the median length of an answer in tokens."""
THINGS = ("a candle", "a river", "bread", "a bicycle", "the moon", "a garden", "an old letter", "snow")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--runs", type=int, default=1, help="measurements of each way (default 1)")
    parser.add_argument("--only", choices=KINDS, default="", help="this kind alone")
    parser.add_argument("--part", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure(args.part, args.model)))
        return 0
    usable = len(os.sched_getaffinity(0))
    if usable < max(CORES):
        parser.error(f"this process may use {usable} core; two are needed")
    load, found = os.getloadavg()[0], dict[str, list[float]]()
    for _ in range(args.runs):
        for way in WAYS:
            if way.startswith(args.only):
                found.setdefault(way, []).append(_in_a_process(way, args.model))
                print(f"{way}: {found[way][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    rates = {way: statistics.median(values) for way, values in found.items()}
    auto = "bfloat16" if bf16_unit() else "float32"
    gains = {
        f"{kind} {dtype}": round(rates[f"{kind} 2 {dtype}"] / rates[f"{kind} 1 {dtype}"], 2)
        for kind in KINDS
        if kind.startswith(args.only)
        for dtype in DTYPES
    }
    result = {
        "benchmark": "threads",
        "scaling": min(gain for way, gain in gains.items() if way.endswith(auto)),
        "auto": auto,
        "bf16_unit": bf16_unit(),
        "tokens_per_s": {way: round(rate, 1) for way, rate in rates.items()},
        "gains": gains,
        "runs": args.runs,
        "model": args.model,
        "cores": usable,
        "load_before": round(load, 2),
        "versions": versions(),
    }
    print(json.dumps(result))
    return 0


def _in_a_process(way: str, model: str) -> float:
    command = [sys.executable, __file__, model, "--part", way]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **WORKER_ENV}
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(way: str, model: str) -> float:
    """Tokens a second of one way."""
    kind, cores, dtype = way.split()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    assert use_threads("auto") == int(cores)
    if kind == "engine":
        return asyncio.run(answers(model, dtype))
    with tempfile.TemporaryDirectory(prefix="cai-ray-benchmark-") as folder:
        return updates(model, dtype, folder)


async def answers(model: str, dtype: Any) -> float:
    from cai_ray.engine.protocol import Sampling
    from cai_ray.engine.vllm import VllmEngine

    config = EngineConfig(dtype=dtype, max_model_len=1024, max_num_seqs=QUESTIONS, kv_cache_mb=512)
    engine = VllmEngine(ResolvedModel(model, model, config, "general"))

    async def answer(number: int, tokens: int) -> int:
        question = f"{number + 1}. Tell me something interesting about {THINGS[number % len(THINGS)]}."
        done = await engine.chat([{"role": "user", "content": question}], Sampling(1.0, tokens, number))
        return done.usage.generated

    await asyncio.gather(*(answer(number, 2) for number in range(4)))  # the first steps allocate
    started = time.perf_counter()
    generated = await asyncio.gather(*(answer(number, MAX_TOKENS) for number in range(QUESTIONS)))
    seconds = time.perf_counter() - started
    await engine.close()
    return sum(generated) / seconds


def updates(model: str, dtype: Any, folder: str) -> float:
    from benchmarks.training import WARM, join, skewed, timed, words_of
    from cai_ray.train import sft
    from cai_ray.train.dialogues import pack
    from cai_ray.train.models import load_policy
    from cai_ray.train.runtime.engine import distribute

    join(folder)
    rows = skewed(STEPS * BATCH, words_of(model), seed=1, median=MEDIAN)
    cfg = TrainConfig(dtype=dtype, micro_batch_tokens=2048, schedule="constant")
    policy, packed = distribute(load_policy(model, cfg), cfg, 1000), pack(rows)
    batches = [list(range(i, i + BATCH)) for i in range(0, len(rows), BATCH)]
    seconds = timed(lambda i: sft.update(policy, packed, batches[i], cfg, 0), len(batches))
    return sum(sum(row.mask) for row in rows[WARM * BATCH :]) / seconds


if __name__ == "__main__":
    sys.exit(main())
