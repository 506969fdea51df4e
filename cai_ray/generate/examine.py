"""Examines whether a principle is at stake in a response, for the served critic and for `constitution test`.

A critique finds fault whenever it is asked to, so its wording is no evidence. The evidence is that the feedback model,
asked by this principle and in both orders, prefers the revision that the critique led to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, cast

from cai_ray.config.judge import JudgeConfig
from cai_ray.config.run import RunConfig
from cai_ray.constitution import Constitution, Principle
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.errors import RowError
from cai_ray.generate.label import LabelChain, LabelTask
from cai_ray.generate.texts import write
from cai_ray.judging.quality import revision_alone, run_templates
from cai_ray.prompts.messages import Messages
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.records import Turn, derive_id, derive_seed

# A principle is at stake when the feedback model prefers the revision by it to the response this clearly.
AT_STAKE = 0.6


class Examination(TypedDict):
    """What comes of a response under one principle."""

    at_stake: bool
    p_at_stake: float
    """The preference for the revision."""
    critique: str
    revision: str


@dataclass(frozen=True)
class Examine:
    """Asks for critique, revision and preference by one principle."""

    judge: LabelChain
    templates: TemplateSet
    seed: int

    async def __call__(
        self,
        engine: Engine,
        conversation: Messages,
        response: str,
        principle: Principle,
        max_tokens: int,
    ) -> Examination:
        """Examines a response.

        Raises:
            RowError: the feedback model gives no readable answer.
        """
        # Greedy, so that the same question has the same answer.
        turns = [*conversation, {"role": "assistant", "content": response}]
        sampling = Sampling(0.0, max_tokens, derive_seed(self.seed, turns, principle.id))
        templates = self.templates
        asked = templates.critique_messages(conversation, response, principle)
        critique = await write(engine, asked, sampling, templates.thinking)
        if critique.truncated and templates.direct:  # not used, as in stage `revise`
            asked = templates.direct_messages(conversation, response, principle)
        else:
            asked = templates.revision_messages(conversation, response, principle, critique.text)
        revision = await write(engine, asked, sampling, templates.thinking)
        revised = revision_alone(revision.text, templates)
        if revision.truncated and not revised:
            raise RowError(f"the revision was cut off before its text began; raise max_tokens={max_tokens}")
        label = await judge_by(self.judge, [principle])(
            engine, comparison(conversation, revised.strip(), response.strip())
        )
        p = label["p_a"]
        assert p is not None  # only a row with an error has none
        return {"at_stake": p > AT_STAKE, "p_at_stake": p, "critique": critique.text, "revision": revised}


def make_examine(config: RunConfig, judge: JudgeConfig, document: Constitution) -> Examine:
    """The examination by a judge's model, as the judge is asked."""
    # Preferences as the model gives them: by every principle that is asked, in both orders, not clamped.
    judge = judge.model_copy(update={"principles": "all", "both_orders": True, "clamp": None})
    templates = run_templates(config, judge.templates)
    return Examine(LabelChain(document, templates, judge, config.seed), templates, config.seed)


def judge_by(judge: LabelChain, principles: Sequence[Principle]) -> LabelChain:
    """The judge, asked by these principles alone, also those that are not enabled."""
    chosen = tuple(p.model_copy(update={"enabled": True}) for p in principles)
    return replace(judge, constitution=judge.constitution.model_copy(update={"principles": chosen}))


def comparison(messages: Messages, response_a: str, response_b: str) -> LabelTask:
    """Two responses as a row for the judge."""
    return {
        "id": derive_id(messages, response_a, response_b),
        "messages": cast(list[Turn], list(messages)),
        "response_a": response_a,
        "response_b": response_b,
    }
