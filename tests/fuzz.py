"""Requests that are wrong in some way, the same ones for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

ASKED = [{"role": "user", "content": "how do i read the baker's diary ?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "sure , first unfold the diary ."}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "rl", "messages": ASKED, "max_tokens": 2, "temperature": 0},
    "/v1/completions": {"model": "rl", "prompt": "how do i", "max_tokens": 2},
    "/v1/critique": {"messages": ANSWERED, "principles": ["privacy"], "max_tokens": 2},
    "/v1/revise": {"messages": ANSWERED, "principles": ["privacy"], "max_tokens": 2},
    "/v1/compare": {"messages": ASKED, "response_a": "a", "response_b": "b", "principles": ["privacy"]},
    "/v1/score": {"messages": ANSWERED},
}
FIELDS = (
    "temperature", "top_p", "n", "stop", "seed", "logprobs", "top_logprobs", "stream", "stream_options", "logit_bias",
    "response_format", "tools", "tool_choice", "echo", "suffix", "prompt_logprobs", "explain", "constitutions",
    "rounds",
    "choose", "best_of", "ignore_eos", "chat_template", "documents", "guided_regex", "structured_outputs", "priority",
    "min_tokens", "kv_transfer_params", "mm_processor_kwargs", "cache_salt", "bad_words", "allowed_token_ids",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 1e308, -1e-308, 0.5, "", " ", "rl", "\x00",
    "\ud800",
    "￿", "<judge>", "a" * 5000, "{{7*7}}", "'; drop table --", "../../etc/passwd", [], [[]], [None], [""], ["a"] * 300,
    {}, {"": ""}, {"a": {"b": {"c": []}}}, {"type": "json_object"}, {"type": "image_url", "image_url": "file:///etc"},
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
PATHS = (
    "/",
    "/v1",
    "/v1/",
    "/v1/models/",
    "/v1/models/%00",
    "/v1/models/" + "a" * 3000,
    "/-/x",
    "/v1/../v1/models",
    "/%ff",
)


class Wrong(NamedTuple):
    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    token: bool
    """Whether it has the right one."""


def requests(count: int, seed: int, token: str) -> Iterator[Wrong]:
    dice = random.Random(seed)
    for _ in range(count):
        path = dice.choice(list(BODIES))
        body = _body(dice, path)
        method, headers = "POST", {"Content-Type": "application/json"}
        kind = dice.random()
        if kind < 0.05:
            path = dice.choice(PATHS)
        elif kind < 0.1:
            method = dice.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND"])
        elif kind < 0.15:
            headers["Content-Type"] = dice.choice(
                ["", "text/plain", "multipart/form-data", "application/xml", "\t"]
            )
        elif kind < 0.2:
            headers["Accept-Encoding"] = headers["Cookie"] = dice.choice(
                ["x" * 4000, "", "*", "é".encode().hex()]
            )
        right = dice.random() < 0.8
        if right:
            headers["Authorization"] = f"Bearer {token}"
        elif dice.random() < 0.7:
            wrong = [
                f"Bearer {token}x",
                "Bearer",
                "Bearer  ",
                f"Basic {token}",
                token,
                "Bearer " + "a" * 3000,
            ]
            headers["Authorization"] = dice.choice(wrong)
        yield Wrong(method, path, body, headers, right)


def _body(dice: random.Random, path: str) -> bytes:
    body: Any = json.loads(json.dumps(BODIES[path]))
    kind = dice.random()
    if kind < 0.45:
        _change(dice, body)
    elif kind < 0.7:
        body[dice.choice(FIELDS)] = dice.choice(VALUES)
    elif kind < 0.8:
        del body[dice.choice(list(body))]
    elif kind < 0.85:
        body = dice.choice(VALUES)
    text = json.dumps(body).encode()
    if kind >= 0.85:
        cut = dice.randrange(len(text))
        broken = (
            text[:cut],
            text[:cut] + bytes([dice.randrange(256)]) + text[cut:],
            dice.randbytes(dice.randrange(200)),
            b"[" * dice.choice([10, 10_000, 200_000]),
            b'{"messages":' * 2000,
            b'{"model": ' + b"9" * 5000 + b"}",
            b"\xff\xfe" + text,
        )
        text = dice.choice(broken)
    return text


def _change(dice: random.Random, body: Any) -> None:
    """Puts another value somewhere."""
    while True:
        key = dice.choice(list(body)) if isinstance(body, dict) else dice.randrange(len(body))
        if isinstance(body[key], (dict, list)) and body[key] and dice.random() < 0.6:
            body = body[key]
            continue
        body[key] = dice.choice(VALUES)
        return
