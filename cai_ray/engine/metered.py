"""An engine that counts what its calls use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai_ray.cluster.usage import Usage
from cai_ray.engine.protocol import Completion, Engine, Sampling
from cai_ray.errors import RowError

if TYPE_CHECKING:
    from cai_ray.prompts.messages import Messages


class Metered:
    """Another engine, whose calls are counted in `usage`: also those that failed after they had cost something."""

    def __init__(self, engine: Engine):
        self.engine, self.usage = engine, Usage()

    async def chat(self, messages: Messages, sampling: Sampling) -> Completion:
        try:
            completion = await self.engine.chat(messages, sampling)
        except RowError as e:
            self._count_failed(e)
            raise
        self.usage = self.usage + completion.usage
        return completion

    async def choose(self, messages: Messages, options: Sequence[str]) -> tuple[list[float], Usage]:
        try:
            logprobs, usage = await self.engine.choose(messages, options)
        except RowError as e:
            self._count_failed(e)
            raise
        self.usage = self.usage + usage
        return logprobs, usage

    def tokens(self) -> int:
        return self.engine.tokens()

    async def close(self) -> None:
        await self.engine.close()

    def _count_failed(self, error: RowError) -> None:
        self.usage = self.usage + Usage(*error.spent)
