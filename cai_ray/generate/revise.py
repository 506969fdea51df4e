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

from cai_ray.config.generation import ReviseConfig
from cai_ray.constitution import Constitution, Principle
from cai_ray.data.left_out import LeftOut
from cai_ray.data.preflight import Preflight
from cai_ray.data.training import training_prompts
from cai_ray.engine.api_key import read_key
from cai_ray.engine.check import check_engine
from cai_ray.engine.metered import Metered
from cai_ray.engine.openai import OpenaiEngine
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.errors import RowError
from cai_ray.generate import reuse
from cai_ray.generate.chain import keeping
from cai_ray.generate.draw import draw
from cai_ray.generate.rows import check_resources, map_rows
from cai_ray.generate.text_lengths import TextKind, TextLimit
from cai_ray.generate.texts import Text, write
from cai_ray.judging.quality import revision_alone, run_templates
from cai_ray.prompts.check import check_direct
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.models import ResolvedModel
from cai_ray.storage.records import Revision, Step, Turn, derive_id, derive_seed
from cai_ray.storage.run import Run

CRITIQUE_CUT = "the critique was cut off, and the template set has no `direct`"
REVISION_CUT = "the revision was cut off before its text began"
"""Why a round made no revision (`Step.left_out`)."""


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

    @property
    def text_kinds(self) -> list[TextKind]:
        limit = TextLimit("revise.max_tokens", self.config.max_tokens)
        of_critiques = TextLimit("revise.critique_max_tokens", self.config.critique_max_tokens)
        return [
            TextKind("response", "tokens", "truncated", limit),
            TextKind("critique", "steps.critique_tokens", "steps.critique_truncated", of_critiques),
            TextKind("revision", "steps.revision_tokens", "steps.revision_truncated", limit),
        ]

    async def __call__(self, engine: Engine, row: RevisionTask) -> Revision:
        steps = list[Step]()
        made: Revision = {
            "id": row["id"],
            "prompt_id": row["prompt_id"],
            "messages": row["messages"],
            "kind": row["kind"],
            "family": row["family"],
            "steps": steps,
            "revision": None,
            "model": self.model,
            "constitution_sha": self.constitution.sha,
        }
        writer = Metered(engine)
        critic = Metered(self._critique_engine) if self._critique_engine else writer
        with keeping(made, *{writer, critic}):
            response = await self._respond(writer, row, made)
            if row["kind"] == "helpful":
                if not response and not made["truncated"]:
                    raise RowError("the response is empty")
            elif response or not made["truncated"]:
                made["revision"] = await self._walk(writer, critic, row, steps, response)
            else:  # it was cut off before its text began: there is nothing to revise
                made["revision"] = response
        usage = writer.usage if critic is writer else writer.usage + critic.usage
        return {**made, "usage": usage.as_record()}

    async def _walk(
        self, writer: Engine, critic: Engine, row: RevisionTask, steps: list[Step], current: str
    ) -> str:
        """Adds the rounds to `steps`, and returns the answer after them."""
        earlier = reuse.by_key(s for e in row.get("earlier") or () for s in e["steps"] or ())
        for number, principle in enumerate(self._draw(row)):
            if principle is None:  # a disabled principle's slot: its round changes nothing
                continue
            key = self.key(row, current, number, principle)
            step = earlier.get(key) or await self._step(writer, critic, row, current, number, principle, key)
            steps.append(step)
            current = step["revision"]
        return current

    def key(self, row: Mapping[str, Any], response: str, number: int, principle: Principle) -> str:
        """Hash of everything that a step depends on: the answer it starts from, and the principle's requests."""
        requests = (principle.critique_request, principle.revision_request)
        return derive_id(self.context, row["messages"], response, number, principle.id, *requests)

    async def _respond(self, engine: Engine, row: RevisionTask, made: Revision) -> str:
        """Adds the first response to the row, and returns it."""
        key = derive_id(self.context, row["messages"])
        if earlier := reuse.by_key(row.get("earlier") or ()).get(key):
            text, truncated, tokens = earlier["response"], earlier["truncated"], earlier.get("tokens")
        else:
            first = await write(
                engine,
                self.templates.answer_messages(row["messages"]),
                self._sampling(row, "response", self.config.temperature, self.config.max_tokens),
                self.templates.thinking,
            )
            text, truncated, tokens = first.text, first.truncated, first.tokens
        made |= {"response": text, "truncated": truncated, "tokens": tokens, "key": key}
        return str(text)

    def _draw(self, row: RevisionTask) -> list[Principle | None]:
        return draw(
            self.constitution.principles,
            self.config.rounds,
            seed=self.seed,
            row_id=row["id"],
            replacement=self.config.draw == "with_replacement",
        )

    async def _step(
        self,
        writer: Engine,
        critic: Engine,
        row: RevisionTask,
        current: str,
        number: int,
        principle: Principle,
        key: str,
    ) -> Step:
        """One round: critique and revision, or the revision alone.

        A critique that was cut off is not used: what it says may turn around in what is missing. The revision is then
        asked for as where `revise.critique` is off; if the template set cannot do that, the round is left out.
        """
        conversation, templates, config = row["messages"], self.templates, self.config
        step: Step = {
            "round": number + 1,
            "principle_id": principle.id,
            "critique_request": principle.critique_request if config.critique else None,
            "critique": None,
            "revision_request": principle.revision_request,
            "revision": current,
            "key": key,
        }
        if config.critique:
            critique = await self._criticise(critic, row, current, number, principle)
            step["critique"], step["critique_truncated"] = critique.text, critique.truncated
            step["critique_tokens"] = critique.tokens
            if critique.truncated and templates.direct is None:
                return {**step, "left_out": CRITIQUE_CUT}
        if config.critique and not step["critique_truncated"]:
            messages = templates.revision_messages(conversation, current, principle, critique.text)
        else:
            messages = templates.direct_messages(conversation, current, principle)
        sampling = self._sampling(row, f"revision {number}", config.revision_temperature, config.max_tokens)
        revision = await write(writer, messages, sampling, templates.thinking)
        step["revision_truncated"], step["revision_tokens"] = revision.truncated, revision.tokens
        text = revision_alone(revision.text, templates)
        if not text and not revision.truncated:
            raise RowError("a revision is empty")
        return {**step, "revision": text} if text else {**step, "left_out": REVISION_CUT}

    async def _criticise(
        self, critic: Engine, row: RevisionTask, current: str, number: int, principle: Principle
    ) -> Text:
        templates, config = self.critique_templates or self.templates, self.config
        return await write(
            critic,
            templates.critique_messages(row["messages"], current, principle),
            self._sampling(
                row, f"critique {number}", config.revision_temperature, config.critique_max_tokens
            ),
            templates.thinking,
        )

    @cached_property
    def _critique_engine(self) -> Engine | None:
        """The endpoint of the critique model. Made in the worker, by its first row: it takes no resources there."""
        return OpenaiEngine(self.critique_model) if self.critique_model else None

    def _sampling(self, row: RevisionTask, step: str, temperature: float, max_tokens: int) -> Sampling:
        return Sampling(temperature, max_tokens, derive_seed(self.seed, row["id"], step))


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
