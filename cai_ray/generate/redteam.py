"""`redteam`, before a run: more red-team prompts, written by a model after examples.

As in Bai et al. 2022 (arXiv 2212.08073, section 3.2), where most red-team prompts came from a model that was shown
some. The examples of one prompt are of one family, each family is asked for the same number, and what nearly repeats an
example, an evaluation prompt or another answer is left out.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cai_ray.cluster.connect import uses_gpu
from cai_ray.config.generation import RedTeamConfig
from cai_ray.data.near_duplicates import NearDuplicates
from cai_ray.data.preflight import Preflight
from cai_ray.data.sources import normalised, read_prompts
from cai_ray.engine.check import check_engine
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.errors import InputError, RowError
from cai_ray.generate.rows import check_resources, map_rows
from cai_ray.judging.quality import run_templates, without_thinking
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.records import derive_id, derive_seed, to_table
from cai_ray.storage.run import Run
from cai_ray.storage.tables import write_table


@dataclass(frozen=True)
class Write:
    """The chain of one prompt: a few examples, and the model's own."""

    templates: TemplateSet
    config: RedTeamConfig
    seed: int

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        written = await engine.chat(
            self.templates.red_team_messages(row["examples"]),
            Sampling(config.temperature, config.max_tokens, derive_seed(self.seed, row["id"], "prompt")),
        )
        text = without_thinking(written.text, self.templates.thinking)
        if not written.finished:
            raise RowError("a prompt hit redteam.max_tokens")
        if not text:
            raise RowError("a prompt is empty")
        return {**row, "messages": [{"role": "user", "content": text}], "usage": written.usage._asdict()}


def run(run: Run) -> dict[str, Any]:
    """Writes RUN/redteam/prompts: rows of schema `prompts`, to be named as a source.

    Raises:
        InputError: there are no examples, or the template set does not say how to ask.
    """
    config = run.config.redteam
    examples = _examples(run)
    quota = _quotas(sorted(examples), config.count)
    chain = Write(run_templates(run.config), config, run.config.seed)
    made = map_rows(run, "redteam", _rows(run, examples, quota), chain, model=config.model, schema="red_team")

    seen = NearDuplicates(config.near_duplicates)
    held = read_prompts(run.config.evaluate.prompts, run.config.seed)
    for row in read_prompts(run.config.prompts, run.config.seed) + held:
        seen.seen(normalised(row["messages"]))
    kept: list[dict[str, Any]] = []
    by_family: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for row in run.rows("redteam"):
        family = row["family"] or ""
        if row["error"] is not None:
            continue
        if by_family[family] == quota[family]:
            left_out["more than asked for"] += 1
        elif seen.seen(normalised(row["messages"])):
            left_out["near"] += 1
        else:
            by_family[family] += 1
            kept.append(row)
    write_table(run.path("redteam", "prompts", "part-00000.parquet"), to_table(kept, "prompts"))
    return {
        **made,
        "asked": made["rows_in"],
        "rows_out": len(kept),
        "by_family": {f: {"wanted": quota[f], "kept": by_family[f]} for f in sorted(quota)},
        "left_out": dict(left_out),
    }


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the model cannot be used, there are no examples, or the template set has no such step."""
    run_templates(run.config).red_team_messages([])
    _examples(run)
    check_engine(run.config)
    preflight.renderer(run.config.redteam.model)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the engines."""
    check_resources(run.config, uses_gpu(run.config))


def _examples(run: Run) -> dict[str, list[str]]:
    """Texts of the run's own red-team prompts by family ("" where they have none)."""
    found: dict[str, list[str]] = {}
    for row in read_prompts(run.config.prompts, run.config.seed):
        if row["kind"] == "red_team" and row["split"] == "train":
            found.setdefault(row["family"] or "", []).append(row["messages"][-1]["content"])
    if not found:
        raise InputError("prompts: none is of kind red_team; name a source with examples to write more of")
    return found


def _quotas(families: list[str], count: int) -> dict[str, int]:
    """As even as can be; the first families have one more where it does not come out."""
    return {f: count // len(families) + (i < count % len(families)) for i, f in enumerate(families)}


def _rows(run: Run, examples: dict[str, list[str]], quota: dict[str, int]) -> list[dict[str, Any]]:
    config, rows = run.config.redteam, []
    for family, texts in examples.items():
        for number in range(math.ceil(quota[family] * config.oversample)):
            identity = derive_id("red_team", family, number)
            drawn = random.Random(derive_seed(run.config.seed, identity, "examples"))
            shown = drawn.sample(texts, min(config.examples, len(texts)))
            rows.append(
                {
                    "id": identity,
                    "examples": shown,
                    "kind": "red_team",
                    "family": family or None,
                    "split": "train",
                    "source": f"written by {config.model}",
                }
            )
    return rows
