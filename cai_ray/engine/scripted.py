"""An engine for unit tests: functions give the answers, and no model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cai_ray.cluster.usage import Usage
from cai_ray.engine.protocol import Completion, Sampling
from cai_ray.prompts.messages import Messages, plain_messages


class ScriptedEngine:
    """
    Args:
        answer: `answer(messages, sampling)` returns the text of a `chat`, or the whole completion.
        weigh: `weigh(messages, options)` returns the log-probabilities of a `choose`.
    """

    def __init__(
        self,
        answer: Callable[[list[dict[str, str]], Sampling], str | Completion] = lambda messages, sampling: (
            "fine"
        ),
        weigh: Callable[[list[dict[str, str]], Sequence[str]], list[float]] = lambda m, options: (
            [-0.7] * len(options)
        ),
    ):
        self.answer = answer
        self.weigh = weigh
        self._generated = 0

    async def chat(self, messages: Messages, sampling: Sampling) -> Completion:
        answer = self.answer(plain_messages(messages), sampling)
        if not isinstance(answer, Completion):
            answer = Completion(answer, True, Usage(len(messages), 0, len(answer.split()), 1))
        self._generated += answer.usage.generated
        return answer

    async def choose(self, messages: Messages, options: Sequence[str]) -> tuple[list[float], Usage]:
        self._generated += 1
        return self.weigh(plain_messages(messages), options), Usage(len(messages), 0, 1, 1)

    def tokens(self) -> int:
        return self._generated

    async def close(self) -> None:
        pass
