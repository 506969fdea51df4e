"""Engine: messages in, text and log-probabilities out.

Three calls. `chat` writes an answer, `choose` weighs given options without writing anything, `sample` continues
token ids (for PPO). All are coroutines; an engine batches whatever is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from cai_ray.config import EngineConfig
    from cai_ray.prompts import Messages, TemplateSet


class Sampling(NamedTuple):
    temperature: float
    max_tokens: int
    seed: int


class Usage(NamedTuple):
    """Tokens: of prompts, of them found in the prefix cache, and generated; and how often an engine was asked."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    calls: int = 0

    def __add__(self, other: Usage) -> Usage:  # type: ignore[override]
        return Usage(*(a + b for a, b in zip(self, other, strict=True)))


class Completion(NamedTuple):
    text: str
    finished: bool
    """Whether the model ended its turn, rather than running into the length limit."""
    usage: Usage


class Sample(NamedTuple):
    ids: list[int]
    logprobs: list[float]
    """Of each id under the distribution it was drawn from."""
    finished: bool


class Engine(Protocol):
    async def chat(self, messages: Messages, sampling: Sampling) -> Completion: ...

    async def choose(self, messages: Messages, options: Sequence[str]) -> tuple[list[float], Usage]:
        """Log-probability of each option as the next token, before normalising over the options."""
        ...

    async def sample(self, ids: Sequence[int], sampling: Sampling) -> Sample: ...

    async def close(self) -> None:
        """Frees what the engine holds. Nothing is in flight then, and nothing is asked of it any more."""
        ...


def make_engine(model: str, templates: TemplateSet, config: EngineConfig, gpu: bool) -> Engine:
    """The engine that a configuration names, on this process's node."""
    if config.kind == "vllm":
        from cai_ray.engine.vllm import VllmEngine

        return VllmEngine(model, templates, config, gpu)
    if config.kind == "openai":
        from cai_ray.engine.openai import OpenaiEngine

        return OpenaiEngine(model, config)
    from cai_ray.engine.scripted import ScriptedEngine

    return ScriptedEngine()
