"""The first part of stage `revise`: the policy's answer to each prompt.

Where a reviser writes critiques and revisions, this is a pass of its own: the policy's engines give all first answers,
and end before the reviser's engines start. So both models need not be in memory at once, and each may have an engine of
its own kind and size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from cai_ray.config.generation import ReviseConfig
from cai_ray.engine.metered import Metered
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.generate import reuse
from cai_ray.generate.chain import keeping
from cai_ray.generate.rows import map_rows
from cai_ray.generate.text_lengths import TextKind, TextLimit
from cai_ray.generate.texts import write
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.arrow import select
from cai_ray.storage.records import TokenUsage, Turn, derive_id, derive_seed
from cai_ray.storage.run import Run
from cai_ray.storage.tables import delete_rows

NAME = "answers"
"""The set of rows that this pass writes beside those of the stage."""


class PromptRow(TypedDict):
    """A prompt that is to be answered."""

    id: str
    prompt_id: str
    messages: list[Turn]
    kind: str
    family: str | None


class FirstAnswerTask(PromptRow):
    """A prompt, and what it was answered before."""

    earlier: NotRequired[list[reuse.EarlierRevision] | None]


class Answered(TypedDict):
    """What became of a prompt: the columns that a revision begins with."""

    response: NotRequired[str | None]
    truncated: NotRequired[bool | None]
    tokens: NotRequired[int | None]
    key: NotRequired[str | None]
    usage: NotRequired[TokenUsage | None]
    error: NotRequired[str | None]


class FirstAnswer(PromptRow, Answered):
    """The policy's answer to a prompt, as a row."""


@dataclass(frozen=True)
class FirstAnswerChain:
    """Has the policy answer a prompt."""

    templates: TemplateSet
    config: ReviseConfig
    seed: int
    context: str = ""
    """What all answers depend on (`reuse.context`)."""

    @property
    def text_kinds(self) -> list[TextKind]:
        limit = TextLimit("revise.max_tokens", self.config.max_tokens)
        return [TextKind("response", "tokens", "truncated", limit)]

    async def __call__(self, engine: Engine, row: FirstAnswerTask) -> FirstAnswer:
        made = select(row, PromptRow)
        with keeping(made, engine := Metered(engine)):
            answered = await self.answer(engine, row, row.get("earlier") or ())
        return {**made, **answered, "usage": engine.usage.as_record()}

    async def answer(
        self, engine: Engine, row: PromptRow, earlier: Iterable[reuse.EarlierRevision]
    ) -> Answered:
        """The answer to a prompt, taken over from an earlier row where that has the same key.

        Raises:
            RowError: the engine gives none.
        """
        key = derive_id(self.context, row["messages"])
        if before := reuse.by_key(earlier).get(key):
            text, truncated, tokens = before["response"], before["truncated"], before.get("tokens")
        else:
            seed = derive_seed(self.seed, row["id"], "response")
            first = await write(
                engine,
                self.templates.answer_messages(row["messages"]),
                Sampling(self.config.temperature, self.config.max_tokens, seed),
                self.templates.thinking,
            )
            text, truncated, tokens = first.text, first.truncated, first.tokens
        return {"response": text, "truncated": truncated, "tokens": tokens, "key": key}


def answer_all(run: Run, tasks: Iterable[FirstAnswerTask], chain: FirstAnswerChain) -> dict[str, Any]:
    """Has the policy answer all prompts, and returns what `map_rows` returns. They are read with `run.each_row`."""
    return map_rows(
        run, "revise", tasks, chain, takes=FirstAnswerTask, gives=FirstAnswer, model="base", name=NAME
    )


def delete_answers(run: Run) -> None:
    """Deletes what `answer_all` wrote, once the revisions are written."""
    delete_rows(run.path("revise"), NAME)
