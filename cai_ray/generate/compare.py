"""Stage `compare`: samples of the SL-CAI policy, paired into comparisons.

One row is one prompt with all its samples; afterwards every two of them become a comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NotRequired, TypedDict, cast

from cai_ray.cluster.usage import Usage
from cai_ray.config.generation import CompareConfig
from cai_ray.data.left_out import LeftOut
from cai_ray.data.preflight import Preflight
from cai_ray.data.training import training_prompts
from cai_ray.engine.check import check_engine
from cai_ray.engine.metered import Metered
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.generate.chain import keeping
from cai_ray.generate.rows import check_resources, map_rows
from cai_ray.generate.text_lengths import TextKind, TextLimit
from cai_ray.generate.texts import Text, write
from cai_ray.judging.quality import run_templates
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.arrow import schema_of, to_tables
from cai_ray.storage.records import Comparison, TokenUsage, Turn, derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.storage.sorting import SortedWriter
from cai_ray.storage.tables import delete_rows

SAMPLES = "samples"
"""The prompts with their samples stand in compare/samples-*.parquet until the comparisons are written."""


class SamplesTask(TypedDict):
    """A prompt that is to be answered several times."""

    id: str
    """That of the prompt's first comparison."""
    prompt_id: str
    messages: list[Turn]
    kind: str
    family: str | None


class Sample(TypedDict):
    """One answer to a prompt."""

    response: str
    truncated: bool
    tokens: int | None
    usage: TokenUsage


class Samples(SamplesTask):
    """A prompt with its answers."""

    samples: NotRequired[list[Sample] | None]
    usage: NotRequired[TokenUsage | None]
    error: NotRequired[str | None]


@dataclass(frozen=True)
class SamplesChain:
    """Samples all answers to a prompt. A sample's seed depends on the prompt and the sample's number alone."""

    templates: TemplateSet
    config: CompareConfig
    seed: int

    @property
    def text_kinds(self) -> list[TextKind]:
        limit = TextLimit("compare.max_tokens", self.config.max_tokens)
        return [TextKind("answer", "samples.tokens", "samples.truncated", limit)]

    async def __call__(self, engine: Engine, row: SamplesTask) -> Samples:
        samples = list[Sample]()
        made = {**row, "samples": samples}
        with keeping(made, engine := Metered(engine)):
            for number in range(self.config.samples):
                answer = await self._sample(engine, row, number)
                samples.append(
                    {
                        "response": answer.text,
                        "truncated": answer.truncated,
                        "tokens": answer.tokens,
                        "usage": answer.usage.as_record(),
                    }
                )
        return cast(Samples, {**made, "usage": engine.usage.as_record()})

    async def _sample(self, engine: Engine, row: SamplesTask, number: int) -> Text:
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


def tasks(run: Run, left_out: LeftOut | None = None) -> list[SamplesTask]:
    """One row per prompt.

    Args:
        left_out: see `training_prompts`.
    """
    config = run.config.compare
    prompts = training_prompts(run.config, config.prompts, left_out)
    return [
        {
            "id": _id(prompt["id"], 0, 1),
            "prompt_id": prompt["id"],
            "messages": prompt["messages"],
            "kind": prompt["kind"],
            "family": prompt["family"],
        }
        for prompt in prompts[: config.limit]
    ]


def to_comparisons(row: Samples, config: CompareConfig, model: str) -> Iterator[Comparison]:
    """Every two samples of a prompt. What a sample cost counts in the first comparison that it stands in, and what a
    failed prompt cost in its first comparison."""
    samples, error, counted = row.get("samples") or [], row.get("error"), set[int]()
    about = {name: row[name] for name in ("prompt_id", "messages", "kind", "family")}  # type: ignore[literal-required]
    for number, (first, second) in enumerate(_pairs(config)):
        comparison: dict[str, Any] = {
            "id": _id(row["prompt_id"], first, second),
            **about,
            "model": model,
            "temperature": config.temperature,
            "source": "ai",
            "error": error,
        }
        for side, place in (("a", first), ("b", second)):
            for name in ("response", "truncated", "tokens") if place < len(samples) else ():
                comparison[f"{name}_{side}"] = samples[place][name]  # type: ignore[literal-required]
        if error is None:
            costs = [samples[place]["usage"] for place in {first, second} - counted]
            counted |= {first, second}
        else:
            spent = row.get("usage")
            costs = [spent] if spent and number == 0 else []
        usage = sum((Usage(**cost) for cost in costs), Usage())
        yield cast(Comparison, {**comparison, "usage": usage.as_record()})


def _pairs(config: CompareConfig) -> Iterator[tuple[int, int]]:
    return combinations(range(config.samples), 2)


def _id(prompt_id: str, first: int, second: int) -> str:
    return derive_id("comparison", prompt_id, first, second)


def run(run: Run) -> dict[str, Any]:
    config, seed = run.config.compare, run.config.seed
    chain = SamplesChain(run_templates(run.config), config, seed)
    left_out = LeftOut(run.config.max_error_rate)
    summary = map_rows(
        run,
        "compare",
        tasks(run, left_out),
        chain,
        takes=SamplesTask,
        gives=Samples,
        model="sl",
        name=SAMPLES,
    )
    rows, errors = write_comparisons(run, "sl")
    delete_rows(run.path("compare"), SAMPLES)
    counts = {"rows_in": rows, "rows_out": rows, "errors": errors, "prompts_left_out": dict(left_out)}
    return {**summary, **counts}


def write_comparisons(run: Run, model: str) -> tuple[int, int]:
    """Writes the comparisons of all samples; returns how many there are, and how many have an error."""
    config, schema = run.config.compare, schema_of(Comparison)
    prompts = run.each_row("compare", ["prompt_id"], SAMPLES)
    samples: Iterable[Samples] = run.each_row("compare", name=SAMPLES)
    rows = errors = 0
    ids = (_id(prompt["prompt_id"], *pair) for prompt in prompts for pair in _pairs(config))
    with SortedWriter(run.path("compare"), schema, ids) as writer:
        for table in to_tables((c for row in samples for c in to_comparisons(row, config, model)), schema):
            writer.add(table)
        for part in writer.write():
            rows += part.num_rows
            errors += part.num_rows - part["error"].null_count
    return rows, errors


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the engine or the prompts cannot be used."""
    check_engine(run.config.engine)
    compare = run.config.compare
    preflight.trains_on_prompts("compare.prompts", compare.prompts, compare.max_tokens)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the engines."""
    check_resources(run.config, run.config.engine)
