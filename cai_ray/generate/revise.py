"""Stage `revise`: response, then critique and revision, round after round; and samples on helpfulness prompts.

Bai et al. 2022 (arXiv 2212.08073), section 3. Each round draws one principle, asks the model to criticise its answer
by it, then to revise the answer; the revision takes the answer's place. Helpfulness prompts are only answered: trained
on these answers too, the policy stays helpful.

Where `revise.reviser` names a model, that one writes critiques and revisions: the policy answers all prompts first
(first_answers.py), then the reviser's engines go through the rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NotRequired

from cai_ray.cluster.usage import Usage
from cai_ray.config.generation import ReviseConfig
from cai_ray.constitution import Constitution, Principle
from cai_ray.data.left_out import LeftOut
from cai_ray.data.preflight import Preflight
from cai_ray.data.training import training_prompts
from cai_ray.engine.check import check_engine
from cai_ray.engine.metered import Metered
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.errors import RowError
from cai_ray.generate import first_answers, reuse
from cai_ray.generate.chain import keeping
from cai_ray.generate.draw import draw
from cai_ray.generate.first_answers import (
    Answered,
    FirstAnswerChain,
    FirstAnswerTask,
    PromptRow,
    answer_all,
)
from cai_ray.generate.rows import check_resources, map_rows
from cai_ray.generate.text_lengths import TextKind, TextLimit
from cai_ray.generate.texts import Text, write
from cai_ray.judging.quality import revision_alone, run_templates
from cai_ray.prompts.check import check_direct
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.arrow import select
from cai_ray.storage.models import ResolvedModel
from cai_ray.storage.records import Revision, Step, derive_id, derive_seed
from cai_ray.storage.run import Run

CRITIQUE_CUT = "the critique was cut off, and the template set has no `direct`"
REVISION_CUT = "the revision was cut off before its text began"
"""Why a round made no revision (`Step.left_out`)."""


class RevisionTask(FirstAnswerTask):
    """A prompt that is to be answered, and revised if it is a red-team prompt."""

    first: NotRequired[Answered | None]
    """The policy's answer, where it is there before a reviser's engine starts."""


@dataclass(frozen=True)
class ReviseChain:
    """Answers a prompt and revises the answer round after round; a helpfulness prompt is only answered.

    An answer that is there already (`RevisionTask.first`) is only revised: then the engine is the reviser's.
    """

    constitution: Constitution
    templates: TemplateSet
    config: ReviseConfig
    seed: int
    model: str
    context: str = ""
    """What all responses depend on (`reuse.context`)."""
    reviser: str | None = None
    """The model that writes critiques and revisions; the one that answers where none is named."""
    reviser_templates: TemplateSet | None = None
    reviser_context: str = ""
    """What all steps depend on beside that."""

    @property
    def text_kinds(self) -> list[TextKind]:
        limit = TextLimit("revise.max_tokens", self.config.max_tokens)
        of_critiques = TextLimit("revise.critique_max_tokens", self.config.critique_max_tokens)
        return [
            *self.answering.text_kinds,
            TextKind("critique", "steps.critique_tokens", "steps.critique_truncated", of_critiques),
            TextKind("revision", "steps.revision_tokens", "steps.revision_truncated", limit),
        ]

    @cached_property
    def answering(self) -> FirstAnswerChain:
        """The part that gives first answers."""
        return FirstAnswerChain(self.templates, self.config, self.seed, self.context)

    async def __call__(self, engine: Engine, row: RevisionTask) -> Revision:
        steps = list[Step]()
        made: Revision = {
            **select(row, PromptRow),
            "steps": steps,
            "revision": None,
            "model": self.model,
            "reviser": self.reviser or self.model,
            "constitution_sha": self.constitution.sha,
        }
        with keeping(made, writer := Metered(engine)):
            response = await self._respond(writer, row, made)
            if row["kind"] == "helpful":
                if not response and not made["truncated"]:
                    raise RowError("the response is empty")
            elif response or not made["truncated"]:
                made["revision"] = await self._walk(writer, row, steps, response)
            else:  # it was cut off before its text began: there is nothing to revise
                made["revision"] = response
        return {**made, "usage": writer.usage.as_record()}

    async def _respond(self, writer: Metered, row: RevisionTask, made: Revision) -> str:
        """Adds the first response to the row, and returns it."""
        if first := row.get("first"):
            if usage := first.get("usage"):
                writer.usage = Usage(**usage)
            if (error := first.get("error")) is not None:
                raise RowError(error)
            made |= select(first, Answered)
        else:
            made |= await self.answering.answer(writer, row, row.get("earlier") or ())
        return str(made["response"])

    async def _walk(self, engine: Engine, row: RevisionTask, steps: list[Step], current: str) -> str:
        """Adds the rounds to `steps`, and returns the answer after them."""
        earlier = reuse.by_key(s for e in row.get("earlier") or () for s in e["steps"] or ())
        for number, principle in enumerate(self._draw(row)):
            if principle is None:  # a disabled principle's slot: its round changes nothing
                continue
            key = self.key(row, current, number, principle)
            step = earlier.get(key) or await self._step(engine, row, current, number, principle, key)
            steps.append(step)
            current = step["revision"]
        return current

    def key(self, row: Mapping[str, Any], response: str, number: int, principle: Principle) -> str:
        """Hash of everything that a step depends on: the answer it starts from, and the principle's requests."""
        requests = (principle.critique_request, principle.revision_request)
        context = (self.context, *([self.reviser_context] if self.reviser_context else []))
        return derive_id(*context, row["messages"], response, number, principle.id, *requests)

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
        engine: Engine,
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
        conversation, templates, config = row["messages"], self._asking, self.config
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
            critique = await self._criticise(engine, row, current, number, principle)
            step["critique"], step["critique_truncated"] = critique.text, critique.truncated
            step["critique_tokens"] = critique.tokens
            if critique.truncated and templates.direct is None:
                return {**step, "left_out": CRITIQUE_CUT}
        if config.critique and not step["critique_truncated"]:
            messages = templates.revision_messages(conversation, current, principle, critique.text)
        else:
            messages = templates.direct_messages(conversation, current, principle)
        sampling = self._sampling(row, f"revision {number}", config.revision_temperature, config.max_tokens)
        revision = await write(engine, messages, sampling, templates.thinking)
        step["revision_truncated"], step["revision_tokens"] = revision.truncated, revision.tokens
        text = revision_alone(revision.text, templates)
        if not text and not revision.truncated:
            raise RowError("a revision is empty")
        return {**step, "revision": text} if text else {**step, "left_out": REVISION_CUT}

    async def _criticise(
        self, engine: Engine, row: RevisionTask, current: str, number: int, principle: Principle
    ) -> Text:
        templates, config = self._asking, self.config
        return await write(
            engine,
            templates.critique_messages(row["messages"], current, principle),
            self._sampling(
                row, f"critique {number}", config.revision_temperature, config.critique_max_tokens
            ),
            templates.thinking,
        )

    @property
    def _asking(self) -> TemplateSet:
        """How critiques and revisions are asked for."""
        return self.reviser_templates or self.templates

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
    settings = revise.model_dump(exclude={"rounds", "draw", "helpful_samples", "limit", "reviser"})
    context = reuse.context(run, run.resolve_model("base"), templates.sha, config.thinking, settings)
    chain = ReviseChain(config.document, templates, revise, config.seed, config.model, context)
    if revise.reviser is None:
        return chain
    model = run.resolve_model(revise.reviser)
    asking = run_templates(config, model.templates)
    return replace(
        chain,
        reviser=_name(run, model),
        reviser_templates=asking,
        reviser_context=reuse.context(run, model, asking.sha),
    )


def _name(run: Run, model: ResolvedModel) -> str:
    """What rows call the reviser: a role's name would say nothing once the rows are elsewhere."""
    return run.config.model if model.name == "base" else model.name


def run(run: Run) -> dict[str, Any]:
    left_out = LeftOut(run.config.max_error_rate)
    chain, reviser = make_chain(run), run.config.revise.reviser
    rows: Iterable[RevisionTask] = tasks(run, left_out)
    # Also first answers of an attempt that ended before their revisions.
    for name in ("part", first_answers.NAME):
        rows = reuse.with_earlier(run, "revise", rows, name)
    if reviser is None:
        summary = map_rows(run, "revise", rows, chain, takes=RevisionTask, gives=Revision, model="base")
        return {**summary, "prompts_left_out": dict(left_out)}
    answers = answer_all(run, rows, chain.answering)
    answered = reuse.with_earlier(run, "revise", _answered(run))
    summary = map_rows(run, "revise", answered, chain, takes=RevisionTask, gives=Revision, model=reviser)
    first_answers.delete_answers(run)
    return {
        **summary,
        "engine_seconds": round(answers["engine_seconds"] + summary["engine_seconds"], 2),
        "engine": answers["engine"],
        "reviser": summary["engine"],
        "prompts_left_out": dict(left_out),
    }


def _answered(run: Run) -> Iterator[RevisionTask]:
    """The prompts with the policy's answers to them. They are read from the files: there may be many."""
    for first in run.each_row("revise", name=first_answers.NAME):
        yield {**select(first, PromptRow), "first": select(first, Answered)}


def check(run: Run, preflight: Preflight) -> None:
    """Raises InputError if a model, the prompts, the templates or an endpoint's key cannot be used."""
    config, reviser = run.config, run.config.revise.reviser
    check_engine(config.engine)
    templates = preflight.check_reviser("revise.reviser", reviser) if reviser else preflight.templates
    if not config.revise.critique:
        check_direct(templates)
    preflight.renderer("base")
    prompts = preflight.trains_on_prompts("prompts", config.prompts, config.revise.max_tokens)
    if reviser:
        # A request for a revision holds the answer and its critique.
        critique = config.revise.critique_max_tokens if config.revise.critique else 0
        written = 2 * config.revise.max_tokens + critique
        revised = [prompt for prompt in prompts if prompt["kind"] == "red_team"]
        preflight.asks_about("revise.reviser", reviser, revised, written)


def check_room(run: Run) -> None:
    """Raises InputError if the cluster will never have room for the engines of the policy or of the reviser."""
    for model in ("base", run.config.revise.reviser):
        if model:
            check_resources(run.config, run.resolve_model(model).engine)
