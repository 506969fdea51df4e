"""Stage `compare`: samples of the SL-CAI policy, paired into comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, TypedDict, cast

from cai_ray.config.generation import CompareConfig
from cai_ray.data.preflight import Preflight
from cai_ray.data.sources import read_prompts
from cai_ray.engine.check import check_engine
from cai_ray.engine.metered import Metered
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.generate.chain import keeping
from cai_ray.generate.rows import check_resources, map_rows
from cai_ray.generate.text_lengths import TextKind, TextLimit
from cai_ray.generate.texts import Text, write
from cai_ray.judging.quality import run_templates
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

    @property
    def text_kinds(self) -> list[TextKind]:
        limit = TextLimit("compare.max_tokens", self.config.max_tokens)
        return [TextKind("answer", f"tokens_{side}", f"truncated_{side}", limit) for side in "ab"]

    async def __call__(self, engine: Engine, row: ComparisonTask) -> Comparison:
        made: dict[str, Any] = {
            "id": row["id"],
            "prompt_id": row["prompt_id"],
            "messages": row["messages"],
            "kind": row["kind"],
            "family": row["family"],
            "model": self.model,
            "temperature": self.config.temperature,
            "source": "ai",
        }
        with keeping(made, engine := Metered(engine)):
            for side, number in (("a", row["first"]), ("b", row["second"])):
                answer = await self._sample(engine, row, number)
                made |= {
                    f"response_{side}": answer.text,
                    f"truncated_{side}": answer.truncated,
                    f"tokens_{side}": answer.tokens,
                }
        return cast(Comparison, {**made, "usage": engine.usage.as_record()})

    async def _sample(self, engine: Engine, row: ComparisonTask, number: int) -> Text:
        seed = derive_seed(self.seed, row["prompt_id"], "sample", number)
        return await write(
            engine,
            self.templates.answer_messages(row["messages"]),
            Sampling(self.config.temperature, self.config.max_tokens, seed),
            self.templates.thinking,
        )


def left_out_as_cut(comparison: Mapping[str, Any], setting: Literal["drop", "keep"]) -> bool:
    """Whether a comparison is not labelled, because an answer was cut off before its text began, or was cut off at all
    and `compare.truncated` is `drop`."""
    return any(
        comparison[f"truncated_{side}"] and (setting == "drop" or not comparison[f"response_{side}"])
        for side in "ab"
    )


def tasks(run: Run) -> list[ComparisonTask]:
    """Every pair of a prompt's samples."""
    config = run.config.compare
    prompts = [
        p
        for p in read_prompts(config.prompts or run.config.prompts, run.config.seed)
        if p["split"] == "train"
    ]
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
    return map_rows(run, "compare", tasks(run), chain, takes=ComparisonTask, gives=Comparison, model="sl")


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the engine or the prompts cannot be used."""
    check_engine(run.config.engine)
    preflight.trains_on_prompts("compare.prompts", run.config.compare.prompts)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the engines."""
    check_resources(run.config, run.config.engine)
