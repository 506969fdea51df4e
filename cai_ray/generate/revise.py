"""Stage `revise`: response, then critique and revision, round after round; and samples on helpfulness prompts.

Bai et al. 2022 (arXiv 2212.08073), section 3. Each round draws one principle, asks the model to criticise its answer
by it, then to revise the answer; the revision takes the answer's place. Helpfulness prompts are only answered: trained
on these answers too, the policy stays helpful.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NotRequired, TypedDict

from cai_ray.cluster.usage import Usage
from cai_ray.config.generation import ReviseConfig
from cai_ray.constitution import Constitution, Principle
from cai_ray.data.left_out import LeftOut
from cai_ray.data.preflight import Preflight
from cai_ray.data.training import training_prompts
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
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.models import ResolvedModel
from cai_ray.storage.records import Revision, Step, Turn, derive_id, derive_seed
from cai_ray.storage.run import Run


class RevisionTask(TypedDict):
    """A prompt that is to be answered, and revised if it is a red-team prompt."""

    id: str
    prompt_id: str
    messages: list[Turn]
    kind: str
    family: str | None
    earlier: NotRequired[list[reuse.EarlierRevision] | None]


@dataclass(frozen=True)
class ReviseChain:
    """Answers a prompt and revises the answer round after round; a helpfulness prompt is only answered."""

    constitution: Constitution
    templates: TemplateSet
    config: ReviseConfig
    seed: int
    model: str
    context: str = ""
    """What all responses and steps depend on (`reuse.context`)."""
    critique_model: ResolvedModel | None = None
    critique_templates: TemplateSet | None = None

    async def __call__(self, engine: Engine, row: RevisionTask) -> Revision:
        response, usage = await self._respond(engine, row)
        if row["kind"] == "helpful":
            if not response["response"]:
                raise RowError("the response is empty")
            return {**response, "steps": [], "revision": None, "usage": usage.as_record()}
        current, steps = str(response["response"]), list[Step]()
        earlier = reuse.by_key(s for e in row.get("earlier") or () for s in e["steps"] or ())
        for number, principle in enumerate(self._draw(row)):
            if principle is None:  # a disabled principle's slot: its round changes nothing
                continue
            key = self.key(row, current, number, principle)
            if (step := earlier.get(key)) is None:
                step, spent = await self._step(engine, row, current, number, principle, key)
                usage = usage + spent
            steps.append(step)
            current = step["revision"]
        return {**response, "steps": steps, "revision": current, "usage": usage.as_record()}

    def key(self, row: Mapping[str, Any], response: str, number: int, principle: Principle) -> str:
        """Hash of everything that a step depends on: the answer it starts from, and the principle's requests."""
        requests = (principle.critique_request, principle.revision_request)
        return derive_id(self.context, row["messages"], response, number, principle.id, *requests)

    async def _respond(self, engine: Engine, row: RevisionTask) -> tuple[Revision, Usage]:
        """The row with its first response."""
        key = derive_id(self.context, row["messages"])
        if earlier := reuse.by_key(row.get("earlier") or ()).get(key):
            text, truncated, usage = earlier["response"], earlier["truncated"], Usage()
        else:
            first = await engine.chat(
                self.templates.answer_messages(row["messages"]),
                self._sampling(row, "response", self.config.temperature, self.config.max_tokens),
            )
            text = without_thinking(first.text, self.templates.thinking)
            truncated, usage = not first.finished, first.usage
        revision: Revision = {
            "id": row["id"],
            "prompt_id": row["prompt_id"],
            "messages": row["messages"],
            "kind": row["kind"],
            "family": row["family"],
            "response": text,
            "truncated": truncated,
            "key": key,
            "model": self.model,
            "constitution_sha": self.constitution.sha,
        }
        return revision, usage

    def _draw(self, row: RevisionTask) -> list[Principle | None]:
        return draw(
            self.constitution.principles,
            self.config.rounds,
            seed=self.seed,
            row_id=row["id"],
            replacement=self.config.draw == "with_replacement",
        )

    async def _step(
        self, engine: Engine, row: RevisionTask, current: str, number: int, principle: Principle, key: str
    ) -> tuple[Step, Usage]:
        """One round: critique and revision, or where `revise.critique` is off, the revision alone."""
        conversation, templates, config = row["messages"], self.templates, self.config
        remarks, usage = "", Usage()
        if config.critique:
            asking = self.critique_templates or templates
            critique = await (self._critique_engine or engine).chat(
                asking.critique_messages(conversation, current, principle),
                self._sampling(
                    row, f"critique {number}", config.revision_temperature, config.critique_max_tokens
                ),
            )
            usage = critique.usage
            remarks = without_thinking(critique.text, asking.thinking)
            messages = templates.revision_messages(conversation, current, principle, remarks)
        else:
            messages = templates.direct_messages(conversation, current, principle)
        revision = await engine.chat(
            messages,
            self._sampling(row, f"revision {number}", config.revision_temperature, config.max_tokens),
        )
        step: Step = {
            "round": number + 1,
            "principle_id": principle.id,
            "critique_request": principle.critique_request if config.critique else None,
            "critique": remarks if config.critique else None,
            "revision_request": principle.revision_request,
            "revision": _revision_text(revision, templates),
            "key": key,
        }
        return step, usage + revision.usage

    @cached_property
    def _critique_engine(self) -> Engine | None:
        """The endpoint of the critique model. Made in the worker, by its first row: it takes no resources there."""
        return OpenaiEngine(self.critique_model) if self.critique_model else None

    def _sampling(self, row: RevisionTask, step: str, temperature: float, max_tokens: int) -> Sampling:
        return Sampling(temperature, max_tokens, derive_seed(self.seed, row["id"], step))


def _revision_text(revision: Completion, templates: TemplateSet) -> str:
    text = without_prefix(without_thinking(revision.text, templates.thinking), templates.prefixes)
    if not text:
        raise RowError("a revision is empty")
    if not revision.finished:
        raise RowError("a revision hit revise.max_tokens")
    return text


def tasks(run: Run, left_out: LeftOut | None = None) -> list[RevisionTask]:
    """One row per red-team prompt, `helpful_samples` per helpfulness prompt.

    Args:
        left_out: see `training_prompts`.
    """
    config = run.config.revise
    prompts = training_prompts(run.config, left_out=left_out)
    return [
        {
            "id": derive_id("revision", prompt["id"], number),
            "prompt_id": prompt["id"],
            "messages": prompt["messages"],
            "kind": prompt["kind"],
            "family": prompt["family"],
        }
        for prompt in prompts[: config.limit]
        for number in range(1 if prompt["kind"] == "red_team" else config.helpful_samples)
    ]


def make_chain(run: Run) -> ReviseChain:
    config, revise = run.config, run.config.revise
    templates = run_templates(config)
    settings = revise.model_dump(exclude={"rounds", "draw", "helpful_samples", "limit", "critique_model"})
    critic = run.resolve_model(revise.critique_model) if revise.critique_model else None
    asking = run_templates(config, critic.templates) if critic else None
    critique = reuse.context(run, critic, asking.sha) if critic and asking else None
    context = reuse.context(
        run, run.resolve_model("base"), templates.sha, config.thinking, settings, critique
    )
    return ReviseChain(config.document, templates, revise, config.seed, config.model, context, critic, asking)


def run(run: Run) -> dict[str, Any]:
    left_out = LeftOut(run.config.max_error_rate)
    rows = reuse.with_earlier(run, "revise", tasks(run, left_out))
    summary = map_rows(run, "revise", rows, make_chain(run), takes=RevisionTask, gives=Revision, model="base")
    return {**summary, "prompts_left_out": dict(left_out)}


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if the model, the prompts, the templates or an endpoint's key cannot be used."""
    config = run.config
    check_engine(config.engine)
    if not config.revise.critique:
        check_direct(preflight.templates)
    if config.revise.critique_model:
        critic = run.resolve_model(config.revise.critique_model)
        load_templates(critic.templates)
        if "revise" in preflight.stages and preflight.models_here:
            read_key(critic.engine)
    preflight.renderer("base")
    preflight.trains_on_prompts("prompts", config.prompts, config.revise.max_tokens)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the engines."""
    check_resources(run.config, run.config.engine)
