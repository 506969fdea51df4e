"""Stage `revise`: response, then critique and revision, round after round; and samples that keep it helpful.

Bai et al. 2022 (arXiv 2212.08073), section 3. Each round draws one principle, asks the model to criticise its answer
by it, then to revise; the revision takes the answer's place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cai_ray.cluster.connect import uses_gpu
from cai_ray.cluster.usage import Usage
from cai_ray.config.generation import ReviseConfig
from cai_ray.constitution import Constitution, Principle
from cai_ray.data.preflight import Preflight
from cai_ray.data.sources import read_prompts
from cai_ray.engine.api_key import read_key
from cai_ray.engine.check import check_engine
from cai_ray.engine.openai import OpenaiEngine
from cai_ray.engine.protocol import Completion, Engine, Sampling
from cai_ray.errors import RowError
from cai_ray.generate import reuse
from cai_ray.generate.draw import draw
from cai_ray.generate.rows import check_resources, map_rows
from cai_ray.judging.quality import run_templates, without_prefix, without_thinking
from cai_ray.prompts.check import check_direct
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.records import derive_id, derive_seed
from cai_ray.storage.run import Run


@dataclass(frozen=True)
class Revise:
    """The chain of one row: a red-team prompt is answered and revised, a helpfulness prompt only answered."""

    constitution: Constitution
    templates: TemplateSet
    config: ReviseConfig
    seed: int
    model: str
    context: str = ""
    """What all responses and steps depend on (`reuse.context`)."""

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        config, conversation, usage = self.config, row["messages"], Usage()
        key = derive_id(self.context, conversation)
        if before := reuse.known(row).get(key):
            response, truncated = before["response"], before["truncated"]
        else:
            first = await engine.chat(
                self.templates.answer_messages(conversation), self._sampling(row, "response", first=True)
            )
            response, usage = without_thinking(first.text, self.templates.thinking), first.usage
            truncated = not first.finished
        out = {
            **row,
            "response": response,
            "truncated": truncated,
            "key": key,
            "model": self.model,
            "constitution_sha": self.constitution.sha,
        }
        if row["kind"] == "helpful":
            if not response:
                raise RowError("the response is empty")
            return {**out, "steps": [], "revision": None, "usage": usage._asdict()}

        current, steps, known = response, [], reuse.known(row, "steps")
        drawn = draw(
            self.constitution.principles,
            config.rounds,
            seed=self.seed,
            row_id=row["id"],
            replacement=config.draw == "with_replacement",
        )
        for number, principle in enumerate(drawn):
            if principle is None:  # a disabled principle's slot: its round changes nothing
                continue
            key = self.key(row, current, number, principle)
            if key in known:
                steps.append(known[key])
                current = known[key]["revision"]
                continue
            if config.critique:
                critique = await (self._critique_engine or engine).chat(
                    self.templates.critique_messages(conversation, current, principle),
                    self._sampling(row, f"critique {number}"),
                )
                usage = usage + critique.usage
                remarks = without_thinking(critique.text, self.templates.thinking)
                asked = self.templates.revision_messages(conversation, current, principle, remarks)
            else:
                remarks, asked = None, self.templates.direct_messages(conversation, current, principle)
            revision = await engine.chat(asked, self._sampling(row, f"revision {number}"))
            usage = usage + revision.usage
            current = _whole(revision, self.templates)
            steps.append(
                {
                    "round": number + 1,
                    "principle_id": principle.id,
                    "critique_request": principle.critique_request if config.critique else None,
                    "critique": remarks,
                    "revision_request": principle.revision_request,
                    "revision": current,
                    "key": key,
                }
            )
        return {**out, "steps": steps, "revision": current, "usage": usage._asdict()}

    def key(self, row: Mapping[str, Any], response: str, number: int, principle: Principle) -> str:
        """Of everything that a step depends on: the answer it starts from, and the principle's requests."""
        requests = (principle.critique_request, principle.revision_request)
        return derive_id(self.context, row["messages"], response, number, principle.id, *requests)

    @cached_property
    def _critique_engine(self) -> Engine | None:
        """Made in the worker, by its first row: an endpoint's takes no resources of its own."""
        model, engine = self.config.critique_model, self.config.critique_engine
        return OpenaiEngine(model, engine) if model and engine else None

    def _sampling(self, row: dict[str, Any], step: str, first: bool = False) -> Sampling:
        config = self.config
        return Sampling(
            temperature=config.temperature if first else config.revision_temperature,
            max_tokens=config.critique_max_tokens if step.startswith("critique") else config.max_tokens,
            seed=derive_seed(self.seed, row["id"], step),
        )


def rows(run: Run, left_out: Counter[str] | None = None) -> list[dict[str, Any]]:
    """One row per red-team prompt, `helpful_samples` per helpfulness prompt."""
    config = run.config.revise
    prompts = [
        p for p in read_prompts(run.config.prompts, run.config.seed, left_out) if p["split"] == "train"
    ]
    out = []
    for prompt in prompts[: config.limit]:
        samples = 1 if prompt["kind"] == "red_team" else config.helpful_samples
        for number in range(samples):
            out.append(
                {
                    "id": derive_id("revision", prompt["id"], number),
                    "prompt_id": prompt["id"],
                    **{k: prompt[k] for k in ("messages", "kind", "family")},
                }
            )
    return out


def make_chain(run: Run) -> Revise:
    config, revise = run.config, run.config.revise
    templates = run_templates(config)
    asked = revise.model_dump(exclude={"rounds", "draw", "helpful_samples", "limit", "critique_engine"})
    critic = revise.critique_engine and revise.critique_engine.answers_by
    context = reuse.context(
        run, run.model("base"), config.engine, templates.sha, config.thinking, asked, critic
    )
    return Revise(config.document, templates, revise, config.seed, config.model, context)


def run(run: Run) -> dict[str, Any]:
    left_out: Counter[str] = Counter()
    todo = reuse.with_before(run, "revise", rows(run, left_out))
    made = map_rows(run, "revise", todo, make_chain(run), model="base", schema="revisions")
    return {**made, "prompts_left_out": dict(left_out)}


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the model, the prompts, the templates or an endpoint's key cannot be used."""
    config = run.config
    check_engine(config)
    if not config.revise.critique:
        check_direct(preflight.templates)
    critic = config.revise.critique_engine
    if critic and "revise" in preflight.stages and preflight.models_here:
        read_key(critic)
    preflight.renderer("base")
    preflight.trains_on_prompts("prompts", config.prompts)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the engines."""
    check_resources(run.config, uses_gpu(run.config))


def _whole(revision: Completion, templates: TemplateSet) -> str:
    text = without_prefix(without_thinking(revision.text, templates.thinking), templates.prefixes)
    if not text:
        raise RowError("a revision is empty")
    if not revision.finished:
        raise RowError("a revision hit revise.max_tokens")
    return text
