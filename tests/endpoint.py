"""An endpoint on this machine for tests: it throttles, drops, hangs, talks nonsense, and keeps what it is asked."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cai_ray.config.engine import EngineConfig
from cai_ray.engine.openai import OpenaiEngine
from cai_ray.engine.protocol import Sampling
from cai_ray.storage.models import ResolvedModel

KEY = "sk-Very-Secret-0123456789"
ASK = [{"role": "user", "content": "hello ?"}]
GREEDY = Sampling(temperature=0, max_tokens=8, seed=3)


class Reply:
    """What the server does with one request: answers, after `seconds`, or drops the connection."""

    def __init__(
        self, body: Any = b"", status: int = 200, *, seconds: float = 0.0, drop: bool = False, **headers: str
    ):
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.seconds, self.drop, self.headers = status, seconds, drop, headers


def completion(text: Any = "fine", finish: str = "stop", **choice: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": finish, **choice}], "usage": usage}


def likeliest(*top: tuple[str, float]) -> dict[str, Any]:
    tokens = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top]
    return completion(logprobs={"content": [{**tokens[0], "top_logprobs": tokens}]})


class Server:
    """Gives the replies in turn, the last one for ever, or what `rule` makes of a request; keeps what it was asked."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.rule: Callable[[dict[str, Any]], Reply] | None = None
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.running = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            do_PUT = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that hung up
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.bodies.append(body)
            self.keys.append(handler.headers["Authorization"])
            self.paths.append(handler.path)
            self.times.append(time.monotonic())
            self.running += 1
            self.most = max(self.most, self.running)
            if self.rule:
                reply = self.rule(body)
            else:
                reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        time.sleep(reply.seconds)
        with self.lock:
            self.running -= 1
        if reply.drop:
            handler.close_connection = True
            handler.connection.close()
            return
        handler.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(reply.body)


def model(name: str, engine: EngineConfig, **template_args: Any) -> ResolvedModel:
    return ResolvedModel(name, name, engine, "general", template_args)


def ask(
    server: Server, *replies: Reply, call: Callable[[OpenaiEngine], Any] | None = None, **more: Any
) -> Any:
    """What a call of an engine gives after these replies; by default one `chat`."""
    server.replies = list(replies)

    async def go() -> Any:
        engine = OpenaiEngine(model("judge-1", endpoint(server.url, **more)))
        try:
            return await (call or (lambda e: e.chat(ASK, GREEDY)))(engine)
        finally:
            await engine.close()

    return asyncio.run(go())


def endpoint(url: str, **more: Any) -> EngineConfig:
    given: dict[str, Any] = {"kind": "openai", "base_url": url, "api_key_env": "TEST_KEY", "attempts": 4}
    return EngineConfig(**given | more)


def choose(engine: OpenaiEngine) -> Any:
    return engine.choose(ASK, ["A", "B"])
