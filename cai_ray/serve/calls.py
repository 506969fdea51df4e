"""Calls of the deployments behind the ingress: within a time limit, and again if a replica died."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError

logger = logging.getLogger("ray.serve")

ATTEMPTS = 4
"""How many replicas a request is given to, if each dies before it begins to answer."""


async def retry(call: Callable[[], Awaitable[Any]]) -> Any:
    """The answer to a call. If a replica dies before it begins to answer, another one is asked.

    Raises:
        HTTPException: 503, too many requests are waiting, or no replica could answer.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await call()
        except BackPressureError as e:
            raise HTTPException(503, "too many requests are waiting; ask again later") from e
        except (RayActorError, TaskCancelledError):
            if attempt == ATTEMPTS:
                logger.exception("no replica answered")
                raise HTTPException(503, "no replica could answer; ask again later") from None
            await asyncio.sleep(0.5 * attempt)
    raise AssertionError


async def within(seconds: float, answer: Awaitable[Any]) -> Any:
    """Waits for an answer, and raises HTTPException 504 if it takes too long."""
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError as e:
        raise HTTPException(504, f"no answer within {seconds:g} s") from e
