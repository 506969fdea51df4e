"""What an engine can be asked. An engine batches whatever calls are in flight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from cai_ray.prompts.messages import Messages
from cai_ray.cluster.usage import Usage


class Sampling(NamedTuple):
    temperature: float
    max_tokens: int
    seed: int


class Completion(NamedTuple):
    text: str
    finished: bool
    """Whether the model ended its turn, rather than running into the length limit."""
    usage: Usage


class Engine(Protocol):
    async def chat(self, messages: Messages, sampling: Sampling) -> Completion: ...

    async def choose(self, messages: Messages, options: Sequence[str]) -> tuple[list[float], Usage]:
        """Log-probability of each option as the next token, before normalising over the options."""
        ...

    async def close(self) -> None:
        """Frees what the engine holds. Nothing is in flight then, and nothing is asked of it any more."""
        ...
