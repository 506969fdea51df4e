"""A text that a model writes in a step of a chain, with what the record says of it."""

from __future__ import annotations

from typing import NamedTuple

from cai_ray.cluster.usage import Usage
from cai_ray.engine.protocol import Engine, Sampling
from cai_ray.judging.quality import without_thinking
from cai_ray.prompts.messages import Messages
from cai_ray.prompts.templates import Thinking


class Text(NamedTuple):
    """A text, whether it is whole, and its length.

    A text that was cut off is a fact, not an error: each stage says what becomes of it. If the cut fell before the
    answer, within the thinking, the text is empty.
    """

    text: str
    truncated: bool
    """Whether the token limit ended it."""
    usage: Usage

    @property
    def tokens(self) -> int | None:
        """Tokens that the model wrote, its thinking and the end of the turn included; None if an endpoint does not say
        how many."""
        return self.usage.generated or None


async def write(engine: Engine, messages: Messages, sampling: Sampling, thinking: Thinking | None) -> Text:
    """Has the model answer, and takes its thinking off.

    Raises:
        RowError: the engine gives no answer, or the model ended its turn while it was thinking.
    """
    completion = await engine.chat(messages, sampling)
    truncated = not completion.finished
    return Text(without_thinking(completion.text, thinking, truncated), truncated, completion.usage)
