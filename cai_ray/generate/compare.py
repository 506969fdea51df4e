"""Stage `compare`: samples of the SL-CAI policy, paired into comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypedDict

from cai_ray.config.generation import CompareConfig
from cai_ray.data.left_out import LeftOut
from cai_ray.data.preflight import Preflight
from cai_ray.data.training import training_prompts
from cai_ray.engine.check import check_engine
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.generate.rows import check_resources, map_rows
from cai_ray.judging.quality import run_templates, without_thinking
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.records import Comparison, Turn, derive_id, derive_seed
from cai_ray.storage.run import Run


class ComparisonTask(TypedDict):
    """A prompt whose samples number `first` and `second` are to be compared."""

    id: str
    prompt_id: str
    messages: list[Turn]
    kind: str
    family: str | None
    first: int
    second: int


@dataclass(frozen=True)
class CompareChain:
    """Samples both responses of a comparison.

    A sample's seed depends on the prompt and the sample's number alone, so a sample that stands in several comparisons
    is the same text in each.
    """

    templates: TemplateSet
    config: CompareConfig
    seed: int
    model: str

    async def __call__(self, engine: Engine, row: ComparisonTask) -> Comparison:
        messages = self.templates.answer_messages(row["messages"])
        a, b = [
            await engine.chat(
                messages,
                Sampling(
                    self.config.temperature,
                    self.config.max_tokens,
                    derive_seed(self.seed, row["prompt_id"], "sample", number),
                ),
            )
            for number in (row["first"], row["second"])
        ]
        return {
            "id": row["id"],
            "prompt_id": row["prompt_id"],
            "messages": row["messages"],
            "kind": row["kind"],
            "family": row["family"],
            "response_a": without_thinking(a.text, self.templates.thinking),
            "response_b": without_thinking(b.text, self.templates.thinking),
            "truncated_a": not a.finished,
            "truncated_b": not b.finished,
            "model": self.model,
            "temperature": self.config.temperature,
            "source": "ai",
            "usage": (a.usage + b.usage).as_record(),
        }


def tasks(run: Run, left_out: LeftOut | None = None) -> list[ComparisonTask]:
    """Every pair of a prompt's samples.

    Args:
        left_out: see `training_prompts`.
    """
    config = run.config.compare
    prompts = training_prompts(run.config, config.prompts, left_out)
    return [
        {
            "id": derive_id("comparison", prompt["id"], first, second),
            "prompt_id": prompt["id"],
            "messages": prompt["messages"],
            "kind": prompt["kind"],
            "family": prompt["family"],
            "first": first,
            "second": second,
        }
        for prompt in prompts[: config.limit]
        for first, second in combinations(range(config.samples), 2)
    ]


def run(run: Run) -> dict[str, Any]:
    config = run.config
    chain = CompareChain(run_templates(config), config.compare, config.seed, "sl")
    left_out = LeftOut(config.max_error_rate)
    rows = tasks(run, left_out)
    summary = map_rows(run, "compare", rows, chain, takes=ComparisonTask, gives=Comparison, model="sl")
    return {**summary, "prompts_left_out": dict(left_out)}


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the engine or the prompts cannot be used."""
    check_engine(run.config.engine)
    compare = run.config.compare
    preflight.trains_on_prompts("compare.prompts", compare.prompts, compare.max_tokens)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the engines."""
    check_resources(run.config, run.config.engine)
