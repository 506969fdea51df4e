"""In front of every route: a bearer token, a limit on the body, and no traceback for whatever goes wrong behind."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from cai_ray.errors import InputError

logger = logging.getLogger("ray.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

TOKEN_VARIABLE = "CAI_RAY_TOKEN"
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_MAX_BODY = 4 << 20


def read_token(token_file: str | None, *, no_auth: bool, host: str) -> str | None:
    """The bearer token from a file or the environment; None where authentication is switched off.

    Raises:
        InputError: there is no token or one that no client can send, authentication is off on an address that
            others reach, or it is off and a token is given.
    """
    if no_auth and token_file is not None:
        raise InputError(
            f"--token-file {token_file} with --no-auth: the token would not be asked for; drop one"
        )
    if no_auth:
        if host not in _LOOPBACK:
            raise InputError(
                f"--no-auth with --host {host}: others can reach it; set a token or use 127.0.0.1"
            )
        return None
    if token_file is not None:
        try:
            token = Path(token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(
                f"--token-file {token_file}: cannot be read ({e}); give a file with one token"
            ) from e
    else:
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        where = f"--token-file {token_file} is empty" if token_file else f"{TOKEN_VARIABLE} is not set"
        raise InputError(f"no bearer token: {where}; set one, give --token-file, or --no-auth on loopback")
    # A header is one line of ASCII. It may have spaces, but a file with them holds something else than a token.
    if not (token.isascii() and token.isprintable()) or (token_file is not None and " " in token):
        where = TOKEN_VARIABLE if token_file is None else f"--token-file {token_file}"
        raise InputError(
            f"{where}: holds no token that a client can send; make one with `openssl rand -hex 32`: "
            "a single line of ASCII without spaces"
        )
    return token


def hash_token(token: str) -> str:
    """What replicas keep instead of the token."""
    return hashlib.sha256(token.encode()).hexdigest()


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware, the outermost: nothing is parsed before the token is right.

    Args:
        token_hash: of `hash_token`; None lets everybody in.
    """

    def __init__(self, app: Any, token_hash: str | None = None, max_body: int = _MAX_BODY):
        self.app = app
        self.token_hash = token_hash
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websocket routes here
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        if not self._allowed(headers.get(b"authorization", b"")):
            body = error_body("a valid bearer token is needed", "authentication_error", "invalid_api_key")
            await _reply(send, 401, body, [(b"www-authenticate", b"Bearer")])
            return
        length = headers.get(b"content-length")
        if b"transfer-encoding" in headers or (length is not None and not length.isdigit()):
            await _reply(send, 411, error_body("a Content-Length is needed", "invalid_request_error"))
            return
        if length is not None and int(length) > self.max_body:
            await _drain(receive, 8 * self.max_body)
            message = f"the body is larger than {self.max_body} bytes"
            await _reply(send, 413, error_body(message, "invalid_request_error", "body_too_large"))
            return
        await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            # Ours to mend: the log has it, the client has a status. Once an answer has begun, it can only be cut off.
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            await _reply(send, 500, error_body("the server failed; its log says why", "server_error"))

    def _allowed(self, header: bytes) -> bool:
        if self.token_hash is None:
            return True
        scheme, _, given = header.partition(b" ")
        # Hashes are compared, in constant time: neither the token's length nor its start can be probed.
        same = hmac.compare_digest(hashlib.sha256(given.strip()).hexdigest(), self.token_hash)
        return same and scheme.lower() == b"bearer"


async def _drain(receive: Receive, most: int) -> None:
    """Reads what the client sends, within bounds: one that is cut off while it writes never sees the answer."""
    while most > 0:
        message = await receive()
        most -= len(message.get("body", b"")) or 1
        if not message.get("more_body"):
            return


async def _reply(
    send: Send, status: int, body: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    data = json.dumps(body).encode()
    head = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
        *(headers or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": data})
