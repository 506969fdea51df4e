"""A running server on this machine is given another constitution."""

from __future__ import annotations

import pytest

from cai_ray.serve.app import update_constitution
from tests.endpoint import Reply, Server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_this_machine_is_reached_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    server = Server()
    server.replies = [Reply({"constitution": {"name": "harmless"}})]
    try:
        assert update_constitution("harmless", None, host, server.http.server_port, None) == {
            "name": "harmless"
        }
    finally:
        server.http.shutdown()
        server.http.server_close()
    assert server.paths == ["/v1/constitution"]
