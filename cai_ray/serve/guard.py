"""Stands before every route: checks the key, limits body, rate and time, and lets no traceback out."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from cai_ray.serve.keys import Key, find_key

logger = logging.getLogger("ray.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Paths that show nothing of a run: the empty pages, and whether the server is up.
OPEN_PATHS = frozenset({"/", "/docs", "/healthz", "/readyz"})
# Seconds in which a body must arrive.
_BODY_S = 60


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """The outermost ASGI middleware. Nothing is parsed before the key is checked.

    Args:
        keys: the keys whose requests are answered; None answers everybody.
        per_minute: requests per minute and key.
        observe: called with scope, status and seconds of each request.
        log_texts: whether messages of exceptions may be logged, which can hold texts of requests.
    """

    def __init__(
        self,
        app: Any,
        keys: Sequence[Key] | None = None,
        max_body: int = 4 << 20,
        per_minute: int | None = None,
        observe: Callable[[Scope, int, float], None] | None = None,
        log_texts: bool = False,
    ):
        self.app = app
        self.keys = keys
        self.max_body = max_body
        self.rate = Rate(per_minute) if per_minute else None
        self.observe = observe
        self.log_texts = log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websocket routes
            await send({"type": "websocket.close", "code": 1008})
            return
        started, status = time.perf_counter(), 0

        async def send_noting_status(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, send_noting_status)
        finally:
            if self.observe:
                self.observe(scope, status, time.perf_counter() - started)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN_PATHS and self.keys is not None:
            key = find_key(headers.get(b"authorization", b""), self.keys)
            if key is None:
                body = error_body("a valid bearer token is needed", "authentication_error", "invalid_api_key")
                await reply(send, 401, body, [(b"www-authenticate", b"Bearer")])
                return
            scope["key"] = key
            if self.rate and (wait := self.rate.wait(key.name)):
                body = error_body(
                    f"more than {self.rate.per_minute:g} requests a minute with this key; wait {wait:.0f} s",
                    "rate_limit_error",
                    "rate_limit_exceeded",
                )
                await reply(send, 429, body, [(b"retry-after", str(max(1, round(wait))).encode())])
                return
        length = headers.get(b"content-length")
        if b"transfer-encoding" in headers or (length is not None and not length.isdigit()):
            await reply(send, 411, error_body("a Content-Length is needed", "invalid_request_error"))
            return
        if length is not None and int(length) > self.max_body:
            await _drain(receive, 8 * self.max_body)
            message = f"the body is larger than {self.max_body} bytes"
            await reply(send, 413, error_body(message, "invalid_request_error", "body_too_large"))
            return
        try:
            async with asyncio.timeout(_BODY_S):
                content = await _read(receive)
        except TimeoutError:
            await reply(send, 408, error_body("the body did not arrive in time", "invalid_request_error"))
            return
        await self._pass_on(scope, _replayed(content, receive), send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_noting_start(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, send_noting_start)
        except Exception as e:
            # A fault of the server: the traceback is logged, and the client gets a status. An answer that has begun can
            # only be cut off.
            trace = (
                traceback.format_exc() if self.log_texts else "".join(traceback.format_tb(e.__traceback__))
            )
            logger.error("%s %s failed with %s\n%s", scope["method"], scope["path"], type(e).__name__, trace)
            if started:
                raise
            await reply(send, 500, error_body("the server failed; its log has the reason", "server_error"))


class Rate:
    """A limit on the requests per minute of each name: a bucket that fills evenly and holds a minute's requests."""

    def __init__(self, per_minute: float, now: Callable[[], float] = time.monotonic):
        self.per_minute = per_minute
        self.now = now
        self.left: dict[str, tuple[float, float]] = {}

    def wait(self, name: str) -> float:
        """Takes one request from the bucket and returns 0; if it is empty, returns the seconds until it is not."""
        now = self.now()
        left, then = self.left.get(name, (self.per_minute, now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        taken = left >= 1
        self.left[name] = (left - taken, now)
        return 0.0 if taken else (1 - left) * 60 / self.per_minute


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, and then what comes from the client, such as its disconnect."""
    replayed = False

    async def receive_again() -> MutableMapping[str, Any]:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def _drain(receive: Receive, most: int) -> None:
    """Reads what the client sends, up to a limit. A client that is cut off while it writes would not see the answer."""
    while most > 0:
        message = await receive()
        most -= len(message.get("body", b"")) or 1
        if not message.get("more_body"):
            return


async def reply(
    send: Send, status: int, body: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """Sends a whole answer in JSON."""
    data = json.dumps(body).encode()
    head = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
        *(headers or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": data})
