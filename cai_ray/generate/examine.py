"""Whether a principle is at stake in a response: the critic's question, asked by the server and by `constitution test`.

A critique finds fault whenever it is asked to, so that its wording is no evidence. What is: that the feedback model
prefers the revision which the critique led to, by this principle and in both orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cai_ray.config.run import RunConfig
from cai_ray.constitution import Constitution, Principle
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.generate.label import Label
from cai_ray.judging.quality import run_templates, without_prefix, without_thinking
from cai_ray.prompts.messages import Message
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.records import derive_id, derive_seed

# A principle is at stake when the feedback model prefers the revision by it to the response this clearly.
AT_STAKE = 0.6


@dataclass(frozen=True)
class Examine:
    """Critique, revision and preference by one principle."""

    judge: Label
    templates: TemplateSet
    seed: int

    async def __call__(
        self,
        engine: Engine,
        conversation: Sequence[Message],
        response: str,
        principle: Principle,
        max_tokens: int,
    ) -> dict[str, Any]:
        """
        Returns:
            at_stake, p_at_stake (the preference for the revision), critique, revision.

        Raises:
            RowError: the feedback model says nothing readable.
        """
        # Greedy, so that the same question has the same answer.
        turns = [*conversation, {"role": "assistant", "content": response}]
        how = Sampling(0.0, max_tokens, derive_seed(self.seed, turns, principle.id))
        critique = await engine.chat(self.templates.critique_messages(conversation, response, principle), how)
        remarks = without_thinking(critique.text, self.templates.thinking)
        revision = await engine.chat(
            self.templates.revision_messages(conversation, response, principle, remarks), how
        )
        revised = without_thinking(revision.text, self.templates.thinking)
        revised = without_prefix(revised, self.templates.prefixes)
        label = await judge_by(self.judge, [principle])(
            engine, comparison(conversation, revised.strip(), response.strip())
        )
        return {
            "at_stake": label["p_a"] > AT_STAKE,
            "p_at_stake": label["p_a"],
            "critique": remarks,
            "revision": revised,
        }


def make_examine(config: RunConfig, document: Constitution) -> Examine:
    # Preferences are as the model gives them: every principle asked, in both orders, nothing clamped.
    label = config.label.model_copy(update={"principles": "all", "both_orders": True, "clamp": None})
    templates = run_templates(config)
    return Examine(Label(document, templates, label, config.seed), templates, config.seed)


def judge_by(judge: Label, principles: Sequence[Principle]) -> Label:
    """The judge, asked by these principles alone, also such as are not enabled."""
    chosen = tuple(p.model_copy(update={"enabled": True}) for p in principles)
    return replace(judge, constitution=judge.constitution.model_copy(update={"principles": chosen}))


def comparison(messages: Sequence[Message], response_a: str, response_b: str) -> dict[str, Any]:
    """A row for the judge."""
    return {
        "id": derive_id(messages, response_a, response_b),
        "messages": messages,
        "response_a": response_a,
        "response_b": response_b,
    }
