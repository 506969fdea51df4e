"""Stage `redteam`, before a run: a model writes more red-team prompts after examples.

As in Bai et al. 2022 (arXiv 2212.08073, section 3.2), where most red-team prompts came from a model that was shown
some. The examples for one prompt are all of one family, and each family gets the same number of prompts. Prompts that
nearly repeat an example, an evaluation prompt or each other are left out, and so is what is a refusal to write one.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypedDict

from cai_ray.config.generation import RedTeamConfig
from cai_ray.data.near_duplicates import NearDuplicates
from cai_ray.data.overlap import normalised
from cai_ray.data.preflight import Preflight
from cai_ray.data.sources import read_prompts
from cai_ray.engine.check import check_engine
from cai_ray.engine.metered import Metered
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.errors import InputError, RowError
from cai_ray.generate.chain import keeping
from cai_ray.generate.rows import check_resources, map_rows
from cai_ray.generate.text_lengths import TextKind, TextLimit
from cai_ray.generate.texts import write
from cai_ray.judging.quality import is_refusal, run_templates
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.arrow import select, to_table
from cai_ray.storage.records import Prompt, RedTeamPrompt, derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.storage.tables import write_table


class RedTeamTask(TypedDict):
    """Examples of one family, after which a prompt is to be written."""

    id: str
    kind: str
    family: str | None
    split: str
    source: str
    examples: list[str]


@dataclass(frozen=True)
class RedTeamChain:
    """Shows the model a few examples, and takes its answer as a prompt."""

    templates: TemplateSet
    config: RedTeamConfig
    seed: int

    @property
    def text_kinds(self) -> list[TextKind]:
        limit = TextLimit("redteam.max_tokens", self.config.max_tokens)
        return [TextKind("prompt", "tokens", "truncated", limit)]

    async def __call__(self, engine: Engine, row: RedTeamTask) -> RedTeamPrompt:
        config = self.config
        with keeping({}, engine := Metered(engine)):
            prompt = await write(
                engine,
                self.templates.red_team_messages(row["examples"]),
                Sampling(config.temperature, config.max_tokens, derive_seed(self.seed, row["id"], "prompt")),
                self.templates.thinking,
            )
            if not prompt.text and not prompt.truncated:
                raise RowError("a prompt is empty")
        return {
            **row,
            "messages": [{"role": "user", "content": prompt.text}],
            "truncated": prompt.truncated,
            "tokens": prompt.tokens,
            "usage": prompt.usage.as_record(),
        }


def run(run: Run) -> dict[str, Any]:
    """Writes RUN/redteam/prompts: rows of the record `Prompt`, to be named as a source.

    Raises:
        InputError: there are no examples, or the template set does not say how to ask.
    """
    config = run.config.redteam
    examples = _examples(run)
    quotas = _quotas(sorted(examples), config.count)
    chain = RedTeamChain(run_templates(run.config), config, run.config.seed)
    summary = map_rows(
        run,
        "redteam",
        _tasks(run, examples, quotas),
        chain,
        takes=RedTeamTask,
        gives=RedTeamPrompt,
        model=config.model,
    )
    prompts, left_out = _choose(run, quotas)
    write_table(run.path("redteam", "prompts", "part-00000.parquet"), to_table(prompts, Prompt))
    by_family = Counter(prompt["family"] or "" for prompt in prompts)
    return {
        **summary,
        "asked": summary["rows_in"],
        "rows_out": len(prompts),
        "by_family": {f: {"wanted": quotas[f], "kept": by_family[f]} for f in sorted(quotas)},
        "left_out": dict(left_out),
    }


def _choose(run: Run, quotas: dict[str, int]) -> tuple[list[Prompt], Counter[str]]:
    """The written prompts up to each family's quota, and how many were left out, by reason."""
    refusals = run_templates(run.config).refusals
    index = NearDuplicates(run.config.redteam.near_duplicates)
    held = read_prompts(run.config.evaluate.prompts, run.config.seed)
    for prompt in read_prompts(run.config.prompts, run.config.seed) + held:
        index.seen(normalised(prompt["messages"]))
    prompts: list[Prompt] = []
    by_family: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for row in run.rows("redteam"):
        family = row["family"] or ""
        if row["error"] is not None:
            continue
        if row["truncated"]:
            left_out["truncated"] += 1
        elif is_refusal(row["messages"][-1]["content"], refusals):
            left_out["refusal"] += 1
        elif by_family[family] == quotas[family]:
            left_out["more than asked for"] += 1
        elif index.seen(normalised(row["messages"])):
            left_out["near"] += 1
        else:
            by_family[family] += 1
            prompts.append(select(row, Prompt))
    return prompts, left_out


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the model cannot be used, there are no examples, or the template set has no such step."""
    run_templates(run.config).red_team_messages([])
    _examples(run)
    check_engine(run.config.engine)
    preflight.renderer(run.config.redteam.model)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the engines."""
    check_resources(run.config, run.config.engine)


def _examples(run: Run) -> dict[str, list[str]]:
    """Texts of the run's own red-team prompts by family ("" where they have none)."""
    examples: dict[str, list[str]] = {}
    for row in read_prompts(run.config.prompts, run.config.seed):
        if row["kind"] == "red_team" and row["split"] == "train":
            examples.setdefault(row["family"] or "", []).append(row["messages"][-1]["content"])
    if not examples:
        raise InputError("prompts: none is of kind red_team; name a source with examples to write more of")
    return examples


def _quotas(families: list[str], count: int) -> dict[str, int]:
    """How many prompts each family gets: as even as possible, the first families getting one more."""
    return {f: count // len(families) + (i < count % len(families)) for i, f in enumerate(families)}


def _tasks(run: Run, examples: dict[str, list[str]], quotas: dict[str, int]) -> list[RedTeamTask]:
    config = run.config.redteam
    rows: list[RedTeamTask] = []
    for family, texts in examples.items():
        for number in range(math.ceil(quotas[family] * config.oversample)):
            identity = derive_id("red_team", family, number)
            rng = random.Random(derive_seed(run.config.seed, identity, "examples"))
            rows.append(
                {
                    "id": identity,
                    "examples": rng.sample(texts, min(config.examples, len(texts))),
                    "kind": "red_team",
                    "family": family or None,
                    "split": "train",
                    "source": f"written by {config.model}",
                }
            )
    return rows
