"""What the server does with an answer that does not come in time. (Answers that come are tested in tests/e2e.)"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from fastapi import HTTPException
from starlette.responses import StreamingResponse

from cai_ray.serve.calls import within
from cai_ray.serve.streams import stream


def test_an_answer_that_does_not_come_in_time_is_504() -> None:
    with pytest.raises(HTTPException, match=r"no answer within 0\.05 s") as e:
        asyncio.run(within(0.05, asyncio.sleep(10)))
    assert e.value.status_code == 504
    assert asyncio.run(within(0.05, asyncio.sleep(0, "fine"))) == "fine"


def test_a_stream_that_does_not_end_in_time_ends_with_an_error() -> None:
    ended = False

    async def slow() -> AsyncIterator[str]:
        nonlocal ended
        try:
            yield 'data: {"choices": []}\n\n'
            await asyncio.sleep(10)
        finally:
            ended = True

    async def read() -> list[str]:
        return [str(event) async for event in stream(StreamingResponse(slow()), 0.05).body_iterator]

    first, last = asyncio.run(read())
    assert first == 'data: {"choices": []}\n\n'
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert ended  # the replica is told, and does not go on with what nobody waits for


def test_an_explanation_comes_before_the_last_event_of_a_stream() -> None:
    async def answer() -> AsyncIterator[bytes]:
        for text in ("sorry", " ,"):
            yield f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n".encode()
        yield b"data: [DONE]\n\n"

    async def explain(text: str) -> dict[str, str]:
        return {"critique": f"on: {text}"}

    async def read() -> list[str]:
        return [str(event) async for event in stream(StreamingResponse(answer()), 5, explain).body_iterator]

    *_, explanation, done = asyncio.run(read())
    assert json.loads(explanation.removeprefix("data: "))["explanation"] == {"critique": "on: sorry ,"}
    assert done == "data: [DONE]\n\n"
