"""Answers that are streamed as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from ray.exceptions import RayError
from starlette.responses import StreamingResponse

from cai_ray.serve.guard import error_body

logger = logging.getLogger("ray.serve")

Explain = Callable[[str], Awaitable[dict[str, Any]]]
"""Which principle is at stake in a text."""


def stream(answer: StreamingResponse, timeout_s: float, explain: Explain | None = None) -> StreamingResponse:
    """Passes a stream on. It ends in time, and an error on the way is an event that clients can read.

    Args:
        explain: adds a last event, with the explanation of the whole text.
    """
    deadline = asyncio.get_running_loop().time() + timeout_s

    async def events() -> AsyncIterator[str]:
        try:
            async with asyncio.timeout_at(deadline):
                async for event in _explained(answer, explain) if explain else _texts(answer):
                    yield event
        except TimeoutError:
            yield _event(error_body("the time for this request is over", "server_error", "timeout"))
        except RayError:
            logger.exception("a stream was cut off")
            yield _event(
                error_body("the answer was cut off; ask again", "server_error", "stream_interrupted")
            )

    return StreamingResponse(events(), media_type="text/event-stream")


async def _texts(answer: StreamingResponse) -> AsyncIterator[str]:
    async for event in answer.body_iterator:
        yield event if isinstance(event, str) else bytes(event).decode()


async def _explained(answer: StreamingResponse, explain: Explain) -> AsyncIterator[str]:
    """The events of an answer, and before the last one (`[DONE]`) one more with the explanation."""
    text: list[str] = []
    async for event in _texts(answer):
        text += _deltas(event)
        body, done, _ = event.partition("data: [DONE]")
        if body:
            yield body
        if done:
            explanation = await explain("".join(text))
            yield _event({"object": "chat.completion.chunk", "choices": [], "explanation": explanation})
            yield "data: [DONE]\n\n"


def _deltas(event: str) -> list[str]:
    """The text that server-sent events add to the first choice."""
    texts = []
    for line in event.splitlines():
        if line.startswith("data: {"):
            choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
            texts.append(choices[0].get("delta", {}).get("content") or "")
    return texts


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
