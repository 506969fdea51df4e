"""Proxies of the environment: never on the way to this machine, otherwise as the environment says."""

from __future__ import annotations

import socket

import pytest

from cai_ray.engine.http_client import is_on_this_machine
from cai_ray.errors import InputError
from tests.endpoint import Reply, Server, ask, completion

DEAD = "http://me:secret-9@127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:8000/v1", True),
        ("http://LOCALHOST./v1", True),
        ("http://vllm.localhost/v1", True),
        ("https://127.0.0.1/v1", True),
        ("http://127.45.6.7:80", True),
        ("http://[::1]:8000/v1", True),
        ("http://[::ffff:127.0.0.1]/v1", True),
        ("http://0.0.0.0:8000/v1", True),
        ("http://127.1:8000/v1", True),
        ("http://0:8000/v1", True),
        ("http://localhost.localdomain/v1", True),
        (f"http://{socket.gethostname()}:8000/v1", True),
        ("http://10.1/v1", False),
        ("http://localhost.example/v1", False),
        ("http://127.0.0.1.example/v1", False),
        ("http://10.0.0.1/v1", False),
        ("http://[fe80::1]/v1", False),
        ("https://api.example/v1", False),
    ],
)
def test_addresses_of_this_machine(url: str, here: bool) -> None:
    assert is_on_this_machine(url) is here


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("proxy", [DEAD, "nonsense://me:secret-9@127.0.0.1:9"])
def test_no_proxy_leads_to_this_machine(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str, proxy: str
) -> None:
    monkeypatch.setenv(name, proxy)
    assert ask(server, Reply(completion())).text == "fine"
    by_name = server.url.replace("127.0.0.1", "localhost")
    assert ask(server, Reply(completion()), base_url=by_name).text == "fine"
    assert server.paths == ["/v1/chat/completions"] * 2


def test_other_machines_are_reached_through_the_proxy_unless_no_proxy_says_so(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    far = "http://far.invalid/v1"
    assert ask(server, Reply(completion()), base_url=far).text == "fine"
    assert server.paths == [f"{far}/chat/completions"]
    monkeypatch.setenv("NO_PROXY", "far.invalid")
    with pytest.raises(InputError, match="nothing answers there"):
        ask(server, Reply(completion()), base_url=far, attempts=1)
    assert len(server.paths) == 1


def test_a_proxy_that_cannot_be_used_is_one_line_without_its_password(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://me:secret-9@127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"^endpoint http://far.invalid/v1: .*proxy that cannot be used"
    ) as e:
        ask(server, Reply(completion()), base_url="http://far.invalid/v1")
    assert "secret-9" not in str(e.value) and e.value.__cause__ is None
