"""The calls that every engine has. An engine batches the calls that are in flight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from cai_ray.prompts.messages import Messages
from cai_ray.cluster.usage import Usage


class Sampling(NamedTuple):
    """How one answer is sampled."""

    temperature: float
    max_tokens: int
    seed: int


class Completion(NamedTuple):
    """One answer."""

    text: str
    finished: bool
    """Whether the model ended its turn, rather than running into the token limit."""
    usage: Usage


class Engine(Protocol):
    async def chat(self, messages: Messages, sampling: Sampling) -> Completion:
        """Answers a conversation, or continues its last message if that is the assistant's."""
        ...

    async def choose(self, messages: Messages, options: Sequence[str]) -> tuple[list[float], Usage]:
        """Log-probability of each option as the next token, before normalising over the options."""
        ...

    def tokens(self) -> int:
        """Tokens generated so far, those of calls under way included. Any thread may ask."""
        ...

    async def close(self) -> None:
        """Frees what the engine holds. No call may be in flight, and none may follow."""
        ...
