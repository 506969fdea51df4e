"""An S3 server on this machine (moto's), and a proxy before it at which requests go wrong as they do on a bad day.

The proxy counts what it is asked, so that a test can say how many requests something may cost.
"""

from __future__ import annotations

import http.client
import logging
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import pytest

from cai_ray.storage import object_stores

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret"}
"""Any are good while the server does not look (`S3.guarded`)."""
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass
class Fault:
    """What becomes of every `every`-th request that matches, the first `times` times."""

    kind: Literal["403", "500", "503", "slow", "hang", "cut the request", "cut the answer", "lose the answer"]
    every: int = 1
    match: str = ""
    """A regular expression, searched in "METHOD /bucket/key?query"."""
    after: int = 0
    """How many that match come through before."""
    times: float = float("inf")
    seconds: float = 1.0
    """How long a slow answer takes, or none comes."""
    seen: int = field(default=0, init=False)
    done: int = field(default=0, init=False)

    def strikes(self, request: str) -> bool:
        if not re.search(self.match, request):
            return False
        self.seen += 1
        if self.seen <= self.after or self.seen % self.every or self.done >= self.times:
            return False
        self.done += 1
        return True


@dataclass
class Asked:
    """A request, from when it came. The client's id is the same when it asks again."""

    method: str
    path: str
    id: str
    status: int = 0
    """Of its answer; 0 while there is none, and where it was cut."""


class Proxy:
    """Forwards to a server; `faults` and `asked` may be changed and read at any time."""

    def __init__(self, upstream: tuple[str, int]):
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.guarded = False
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @contextmanager
    def failing(self, *faults: Fault) -> Iterator[Sequence[Fault]]:
        """Meanwhile these faults strike."""
        self.faults = list(faults)
        try:
            yield faults
        finally:
            self.faults = []

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """Requests that came in the meantime, by method, when it is over: those that were answered, each once,
        however often the client had to ask."""
        start, found = len(self.asked), Counter[str]()
        yield found
        answered = {a.id: a.method for a in self.asked[start:] if 0 < a.status < 500}
        found.update(answered.values())

    def fault_of(self, request: str) -> Fault | None:
        with self.lock:
            return next((f for f in self.faults if f.strikes(request)), None)


class _Handler(BaseHTTPRequestHandler):
    owner: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with suppress(OSError):  # the other side has gone: it was killed, or did not wait
            super().handle()

    def _forward(self) -> None:
        # Noted as it comes: an answer may be slower than the client's patience, and fall into another test's count.
        self.asked = Asked(self.command, self.path, self.headers["amz-sdk-invocation-id"])
        self.owner.asked.append(self.asked)
        fault = self.owner.fault_of(f"{self.command} {self.path}")
        kind = fault.kind if fault else ""
        if kind == "cut the request":
            if {*self.headers} & {"Content-Length", "Transfer-Encoding"}:
                self.rfile.read(1)
            self._close()
            return
        body = self._body()
        if fault and kind in ("slow", "hang"):
            time.sleep(fault.seconds)
        if kind == "hang":
            self._close()
            return
        if self.owner.guarded and "Authorization" not in self.headers:
            kind = "403"
        if kind.isdigit():
            name = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}[kind]
            text = (
                f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>{name}</Message></Error>".encode()
            )
            self._answer(int(kind), {"Content-Type": "application/xml"}, text)
            return
        status, headers, answer = self._ask(body)
        if kind == "lose the answer":
            self._close()
        else:
            self._answer(status, headers, answer, cut=kind == "cut the answer")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _ask(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        server = http.client.HTTPConnection(*self.owner.upstream, timeout=60)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    server.putheader(name, value)
            server.putheader("Content-Length", str(len(body)))
            server.endheaders(body)
            answer = server.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            server.close()

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, cut: bool = False) -> None:
        # Before the other side can go on: what it asks next is counted apart.
        self.asked.status = 0 if cut else status
        self.send_response(status)
        given = {k.lower(): v for k, v in headers.items()}
        # Of what a HEAD request is told the length is the object's.
        length = given.get("content-length", "0") if self.command == "HEAD" else str(len(body))
        for name, value in given.items():
            if name not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if cut:
            self.wfile.write(body[: len(body) // 2])
            self._close()
            return
        if self.command != "HEAD":
            self.wfile.write(body)

    def _close(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the other side was first
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


class S3:
    """The server, and the proxy before it."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server.start()
        self.proxy = Proxy(self.server.get_host_and_port())
        self.env = {**KEYS, "AWS_ENDPOINT_URL": self.proxy.url, "AWS_REGION": "us-east-1"}
        self.ask("PUT", "/bucket")

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
        """This process, and those that it starts, take it for S3."""
        for name in [n for n in os.environ if n.startswith("AWS_") and n != "AWS_CA_BUNDLE"]:
            monkeypatch.delenv(name)
        for name, value in {**self.env, **more}.items():
            monkeypatch.setenv(name, value)
        object_stores._stores.clear()

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A request to the server itself."""
        server = http.client.HTTPConnection(*self.server.get_host_and_port(), timeout=60)
        try:
            server.request(
                method,
                path,
                body,
                {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"},
            )
            answer = server.getresponse()
            text = answer.read()
            assert answer.status < 300, text
            return text
        finally:
            server.close()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Meanwhile the server knows no one: who signs with any key is refused. (The proxy refuses whoever does not
        sign, at which moto's own check falls over.)"""
        self.ask("POST", "/moto-api/reset-auth", b"0")
        self.proxy.guarded = True
        try:
            yield
        finally:
            self.ask("POST", "/moto-api/reset-auth", b"inf")
            self.proxy.guarded = False

    def close(self) -> None:
        self.proxy.close()
        self.server.stop()
