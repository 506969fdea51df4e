"""What the ingress does with an answer that does not come in time. (What comes is asked for in tests/e2e.)"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import HTTPException
from starlette.responses import StreamingResponse

from cai_ray.serve.ingress import Ingress
from cai_ray.serve.settings import ServeSettings


@pytest.fixture
def ingress() -> Any:
    """One that waits for 50 ms. What it would ask is not needed here."""
    made: Any = Ingress.__new__(Ingress)
    made.settings = ServeSettings(run="run", timeout_s=0.05)
    return made


def test_an_answer_that_does_not_come_in_time_is_504(ingress: Any) -> None:
    with pytest.raises(HTTPException, match=r"no answer within 0\.05 s") as e:
        asyncio.run(ingress._within_time(asyncio.sleep(10)))
    assert e.value.status_code == 504
    assert asyncio.run(ingress._within_time(asyncio.sleep(0, "fine"))) == "fine"


def test_a_stream_that_does_not_end_in_time_ends_with_an_error(ingress: Any) -> None:
    ended = False

    async def slow() -> AsyncIterator[str]:
        nonlocal ended
        try:
            yield 'data: {"choices": []}\n\n'
            await asyncio.sleep(10)
        finally:
            ended = True

    async def read() -> list[str]:
        return [
            str(event) async for event in ingress._streamed(StreamingResponse(slow()), None).body_iterator
        ]

    first, last = asyncio.run(read())
    assert first == 'data: {"choices": []}\n\n'
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert ended  # the replica is told, and does not go on with what nobody waits for
