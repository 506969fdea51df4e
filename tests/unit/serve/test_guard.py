"""What stands in front of every route, without Ray."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cai_ray.errors import InputError
from cai_ray.serve.app import _check_free
from cai_ray.serve.guard import Guard, Rate
from cai_ray.serve.keys import Key, add_key, find_key, hash_token, read_file, read_keys
from cai_ray.serve.schemas import CompareRequest, CritiqueRequest

TOKEN = "secret"


def ask(
    headers: dict[str, str], app: Any = None, token: str | None = TOKEN, body: bytes = b"{}"
) -> tuple[int, Any]:
    """Status and JSON of one request through the guard."""
    sent: list[dict[str, Any]] = []

    async def reached(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'"reached"'})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    keys = None if token is None else (Key(name="one", sha256=hash_token(token)),)
    guard = Guard(app or reached, keys=keys, max_body=100)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/models",
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
    }
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


def test_the_right_token_reaches_the_application() -> None:
    assert ask({"Authorization": f"Bearer {TOKEN}"}) == (200, "reached")
    assert ask({"Authorization": f"bearer {TOKEN}"}) == (200, "reached")


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong", "Bearer secrets", "Basic secret", "secret", "Bearer sécret"],
)
def test_any_other_is_401(header: str) -> None:
    status, body = ask({"Authorization": header} if header else {})
    assert status == 401
    assert body["error"]["type"] == "authentication_error"


def test_without_authentication_everybody_is_let_in() -> None:
    assert ask({}, token=None) == (200, "reached")


def test_a_large_body_and_one_of_unknown_length_are_refused() -> None:
    allowed = {"Authorization": f"Bearer {TOKEN}"}
    assert ask({**allowed, "Content-Length": "101"})[0] == 413
    assert ask({**allowed, "Content-Length": "-1"})[0] == 411
    assert ask({**allowed, "Transfer-Encoding": "chunked"})[0] == 411


def test_a_fault_behind_it_is_a_plain_500() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("secret details")

    status, body = ask({"Authorization": f"Bearer {TOKEN}"}, app=broken)
    assert status == 500
    assert "secret details" not in json.dumps(body)


def test_token_comes_from_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAI_RAY_TOKEN", "from the environment")
    (tmp_path / "token").write_text("from-a-file\n")
    (key,) = read_keys(None, no_auth=False, host="0.0.0.0")
    assert key.sha256 == hash_token("from the environment") and key.admin
    (key,) = read_keys(str(tmp_path / "token"), no_auth=False, host="0.0.0.0")
    assert key.sha256 == hash_token("from-a-file") and key.admin
    assert read_keys(None, no_auth=True, host="127.0.0.1") == ()


def test_no_token_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAI_RAY_TOKEN", raising=False)
    (tmp_path / "empty").write_text("\n")
    for file, no_auth, host in (
        (None, False, "127.0.0.1"),
        (str(tmp_path / "empty"), False, "127.0.0.1"),
        (str(tmp_path / "missing"), False, "127.0.0.1"),
        (None, True, "0.0.0.0"),
    ):
        with pytest.raises(InputError):
            read_keys(file, no_auth=no_auth, host=host)


@pytest.mark.parametrize("text", ["one\ntwo\n", "one two", "one\ttwo", "s\u00e9cret", "\ufeffone", "one\x00"])
def test_a_token_that_no_client_can_send_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="openssl rand") as e:
        read_keys(str(path), no_auth=False, host="127.0.0.1")
    assert str(path) in str(e.value) and text.strip() not in str(e.value)


def test_a_token_in_the_environment_is_one_line_of_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("one\ntwo", "s\u00e9cret"):
        monkeypatch.setenv("CAI_RAY_TOKEN", text)
        with pytest.raises(InputError, match="CAI_RAY_TOKEN holds no token"):
            read_keys(None, no_auth=False, host="127.0.0.1")


def test_a_token_file_with_no_auth_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    with pytest.raises(InputError, match=r"--token-file .* with --no-auth"):
        read_keys(str(tmp_path / "token"), no_auth=True, host="127.0.0.1")


def test_an_empty_token_file_name_is_not_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAI_RAY_TOKEN", "secret")
    with pytest.raises(InputError, match="cannot be read"):
        read_keys("", no_auth=False, host="127.0.0.1")


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("é..b", 8000)])
def test_an_address_that_is_none_is_refused(host: str, port: int) -> None:
    with pytest.raises(InputError, match=f"--host {host} --port {port}"):
        _check_free(host, port)


def test_requests_say_what_is_missing() -> None:
    question = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    CritiqueRequest.model_validate({"messages": [question, answer]})
    for bad in (
        [question],
        [answer],
        [],
        [question, {**answer, "name": "x"}],
        [{"role": "tool", "content": "x"}],
    ):
        with pytest.raises(ValidationError):
            CritiqueRequest.model_validate({"messages": bad})
    with pytest.raises(ValidationError, match="person's turn"):
        CompareRequest.model_validate({"messages": [question, answer], "response_a": "x", "response_b": "y"})


def test_a_file_of_keys_holds_hashes_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    tokens = {name: add_key(str(path), name, admin=name == "ops") for name in ("ops", "app")}
    text = path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert not any(token in text for token in tokens.values())
    keys = read_file(str(path))
    for name, token in tokens.items():
        found = find_key(f"Bearer {token}".encode(), keys)
        assert found is not None and found.name == name and found.admin == (name == "ops")
    assert find_key(f"Bearer {hash_token(tokens['app'])}".encode(), keys) is None
    with pytest.raises(InputError, match="has a key of this name"):
        add_key(str(path), "app", admin=False)
    with pytest.raises(InputError, match="may have letters, digits"):
        add_key(str(path), "two words", admin=False)


def test_a_line_that_is_no_key_is_refused_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add_key(str(path), "app", admin=False)
    with path.open("a") as f:
        f.write("my-secret-token\n")
    with pytest.raises(InputError, match="line 2") as e:
        read_file(str(path))
    assert "my-secret-token" not in str(e.value)


def test_a_key_has_so_many_requests_a_minute_and_they_come_back_evenly() -> None:
    clock = [0.0]
    rate = Rate(60, lambda: clock[0])
    assert [rate.wait("one") for _ in range(60)] == [0] * 60
    assert rate.wait("one") == pytest.approx(1)
    assert rate.wait("another") == 0
    clock[0] = 0.5
    assert rate.wait("one") == pytest.approx(0.5)
    clock[0] = 1.01
    assert rate.wait("one") == 0
    clock[0] = 1e6
    assert [rate.wait("one") for _ in range(61)].count(0) == 60
