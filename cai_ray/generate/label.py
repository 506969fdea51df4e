"""Stage `label`: the feedback model's soft preference between two responses, principle by principle.

Bai et al. 2022 (arXiv 2212.08073), section 4.1: the model reads the conversation, one principle and the options; its
label is the probability of the two option tokens, normalised over the two. Nothing is generated. Each principle is
asked in both orders and the two are averaged, so that a liking for a slot cancels (docs/method.md, items 1 to 6).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cai_ray import constitution as constitutions
from cai_ray.config import LabelConfig
from cai_ray.constitution import Constitution, Principle
from cai_ray.engine import Engine, Usage
from cai_ray.errors import InputError, RowError
from cai_ray.generate.draw import draw
from cai_ray.generate.rows import map_rows
from cai_ray.generate.sources import read_rows, to_messages
from cai_ray.prompts import TemplateSet, load_templates
from cai_ray.records import derive_id
from cai_ray.storage import Run


@dataclass(frozen=True)
class Label:
    """The chain of one comparison: a vote of each principle, and the label they make together."""

    constitution: Constitution
    templates: TemplateSet
    config: LabelConfig
    seed: int

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        out = {**row, "feedback_model": self.config.model, "constitution_sha": self.constitution.sha}
        if row["response_a"] == row["response_b"]:  # nothing to prefer, and nothing to ask
            return {
                **out,
                "votes": [],
                "p_a": 0.5,
                "p_a_raw": 0.5,
                "slot_bias": None,
                "usage": Usage()._asdict(),
            }
        principles = self._voters(row)
        answers = await asyncio.gather(*(self._vote(engine, row, p) for p in principles))
        votes = [vote for vote, _ in answers]
        usage = sum((u for _, u in answers), Usage())
        raw = combine([v["p_a"] for v in votes], [p.weight for p in principles], self.config.combine)
        low, high = self.config.clamp or (0.0, 1.0)
        return {
            **out,
            "votes": votes,
            "p_a": min(max(raw, low), high),
            "p_a_raw": raw,
            "slot_bias": slot_bias(votes),
            "usage": usage._asdict(),
        }

    def _voters(self, row: dict[str, Any]) -> list[Principle]:
        if self.config.principles == "all":
            return self.constitution.enabled
        drawn = draw(
            self.constitution.enabled,
            self.config.principles,
            seed=self.seed,
            row_id=row["id"],
            replacement=False,
        )
        return [p for p in drawn if p is not None]

    async def _vote(
        self, engine: Engine, row: dict[str, Any], principle: Principle
    ) -> tuple[dict[str, Any], Usage]:
        a, b = row["response_a"], row["response_b"]
        straight, usage = await self._ask(engine, row, principle, a, b)
        vote = {"principle_id": principle.id, "logprob_a": straight[0], "logprob_b": straight[1]}
        probabilities = [preference(*straight)]
        if self.config.both_orders:
            swapped, more = await self._ask(engine, row, principle, b, a)
            usage = usage + more
            # Response a stood in the second slot: its log-probability is the second option's.
            vote |= {"logprob_a_swapped": swapped[1], "logprob_b_swapped": swapped[0]}
            probabilities.append(preference(swapped[1], swapped[0]))
        return {**vote, "p_a": sum(probabilities) / len(probabilities)}, usage

    async def _ask(
        self, engine: Engine, row: dict[str, Any], principle: Principle, first: str, second: str
    ) -> tuple[list[float], Usage]:
        messages = self.templates.feedback_messages(row["messages"], first, second, principle)
        logprobs, usage = await engine.choose(messages, self.templates.options)
        if not all(math.isfinite(x) for x in logprobs):
            raise RowError(f"the feedback model gave no finite log-probability for principle {principle.id}")
        return logprobs, usage


def preference(logprob_a: float, logprob_b: float) -> float:
    """Probability of a, normalised over {a, b}."""
    return 1 / (1 + math.exp(min(max(logprob_b - logprob_a, -700.0), 700.0)))


def combine(p: Sequence[float], weights: Sequence[float], how: str) -> float:
    """The label that votes make together.

    `mean`: the weighted mean of probabilities. `log_odds`: weighted log-odds added up, so that an undecided
    principle (1/2) weighs nothing.
    """
    if how == "mean":
        return sum(w * x for w, x in zip(weights, p, strict=True)) / sum(weights)
    total = sum(w * logit(x) for w, x in zip(weights, p, strict=True))
    return preference(total, 0.0)


def logit(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))


def slot_bias(votes: Sequence[dict[str, Any]]) -> float | None:
    """Share of votes whose preferred slot survives the swap; None where only one order was asked."""
    asked = [v for v in votes if v.get("logprob_a_swapped") is not None]
    if not asked:
        return None
    stuck = [
        (v["logprob_a"] > v["logprob_b"]) == (v["logprob_b_swapped"] > v["logprob_a_swapped"]) for v in asked
    ]
    return sum(stuck) / len(stuck)


def dev_rows(run: Run) -> list[dict[str, Any]]:
    """Development comparisons whose preferred response is known: they measure the labeller, and train nothing."""
    dev = run.config.label.dev
    if dev is None:
        return []
    rows = read_rows(dev, run.config.seed)[: run.config.label.dev_limit]
    needed = ("messages", "response_a", "response_b", "gold")
    for number, row in enumerate(rows, 1):
        if missing := [name for name in needed if name not in row]:
            raise InputError(f"label.dev={dev}: row {number} lacks {', '.join(missing)}")
    return [
        {
            "id": derive_id("dev", r["messages"], r["response_a"], r["response_b"]),
            "messages": to_messages(r["messages"], dev),
            "response_a": r["response_a"],
            "response_b": r["response_b"],
            "source": str(r["gold"]),
        }
        for r in rows
    ]


def run(run: Run) -> dict[str, Any]:
    config = run.config
    chain = Label(
        constitutions.load(config.constitution), load_templates(config.templates), config.label, config.seed
    )
    rows = [
        {
            k: r[k]
            for k in (
                "id",
                "prompt_id",
                "messages",
                "response_a",
                "response_b",
                "truncated_a",
                "truncated_b",
                "model",
                "temperature",
                "source",
                "kind",
                "family",
            )
        }
        for r in run.rows("compare")
        if r["error"] is None
    ]
    dev = dev_rows(run)
    if dev:
        map_rows(run, "label", dev, chain, model=config.label.model, schema="labels", name="dev")
    return map_rows(run, "label", rows, chain, model=config.label.model, schema="labels")
