"""The sample: the run's own configuration on a few of its prompts, with a few steps of training."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from cai_ray.config.load import validate
from cai_ray.config.run import RunConfig
from cai_ray.data.sources import read_comparisons, read_prompts
from cai_ray.data.training import training_prompts
from cai_ray.generate import compare, revise
from cai_ray.storage import files
from cai_ray.storage.records import Prompt, derive_id
from cai_ray.storage.run import Run

STEPS = 4
"""Training steps on rows, at least. The first one is slower, and does not count."""
PPO_STEPS = 2


def choose(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """A sample of so many prompts, in which each kind has its share, and at least one prompt."""
    kinds: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        kinds[prompt["kind"]].append(prompt)
    chosen: list[Prompt] = []
    for _, rows in sorted(kinds.items()):
        rows.sort(key=lambda row: derive_id(seed, "estimate", row["id"]))
        chosen += rows[: max(1, round(count * len(rows) / len(prompts)))]
    return chosen


def prompts_of(config: RunConfig) -> dict[str, list[Prompt]]:
    """The prompts that each stage uses, by stage."""

    return {
        "revise": training_prompts(config)[: config.revise.limit],
        "compare": training_prompts(config, config.compare.prompts)[: config.compare.limit],
        "ppo": training_prompts(config, config.ppo.prompts),
        "evaluate": read_prompts(config.evaluate.prompts, config.seed)[: config.evaluate.limit],
    }


def sampled(config: RunConfig, folder: str, count: int) -> RunConfig:
    """The sample's configuration. Its prompts are written into the folder."""
    data = config.model_dump(mode="json")
    rows: dict[str, int] = {}
    for stage, prompts in prompts_of(config).items():
        if not prompts:
            continue
        chosen = choose(prompts, count, config.seed)
        rows[stage] = len(chosen)
        path = files.join(folder, f"{stage}.jsonl")
        written = ({key: value for key, value in row.items() if key != "id"} for row in chosen)
        text = "".join(json.dumps(row) + "\n" for row in written)
        files.write_bytes(path, text.encode())
        (data if stage == "revise" else data[stage])["prompts"] = [{"path": path}]
    data |= {"out": files.join(folder, "run"), "budget": {}, "sinks": [], "max_error_rate": 1.0}
    for stage in rows:
        if "limit" in data[stage]:
            data[stage]["limit"] = None
    for prompted in (
        data,
        data["label"]["judge"],
        data["evaluate"]["judge"],
        data["ppo"]["watch"]["judge"],
        data["revise"]["reviser"],
    ):
        if prompted and prompted["engine"]:
            prompted["engine"] |= {"min_actors": 1, "max_actors": 1}
    limit = data["label"]["gold_limit"]
    data["label"] |= {"gates": {}, "gold_limit": min(limit, count)}
    share = rows["compare"] / len(prompts_of(config)["compare"])
    for section in ("rm", "dpo"):
        for source, given in zip(data[section]["human"], getattr(config, section).human, strict=True):
            n = len(read_comparisons(given, config.seed))
            source["limit"] = max(1, math.ceil(n * share))
    data["sft"]["epochs"] = _epochs(rows["revise"], config.sft.batch_size)
    data["rm"]["epochs"] = _epochs(rows["compare"], config.rm.batch_size)
    data["dpo"]["epochs"] = _epochs(rows["compare"], config.dpo.batch_size)
    warmup = min(1, config.ppo.value_warmup_steps)
    data["ppo"] |= {"steps": PPO_STEPS, "value_warmup_steps": warmup}
    watch = data["ppo"]["watch"]
    watch |= {"on_alarm": "log", "limit": min(watch["limit"], count)}
    data["evaluate"]["harness"] = None
    for given in data["evaluate"]["sets"]:
        given["limit"] = min(given["limit"] or count, count)
    return validate(data, "the sample of --estimate")


def _epochs(rows: int, batch: int) -> int:
    return math.ceil(STEPS / math.ceil(rows / batch))


def rows_by_kind(run: Run, stage: str) -> dict[str, int]:
    """How many rows of each kind a generating stage has."""
    counts: dict[str, int] = defaultdict(int)
    rows: Iterable[Any]
    each = 1
    if stage == "evaluate":
        rows = prompts_of(run.config)["evaluate"]
    elif stage == "revise":
        rows = revise.tasks(run)
    else:
        rows, each = compare.tasks(run), math.comb(run.config.compare.samples, 2)
    for row in rows:
        counts[row["kind"]] += each
    return dict(counts)
