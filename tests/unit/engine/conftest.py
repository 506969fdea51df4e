"""The endpoint that the tests of this folder ask."""

from collections.abc import Iterator

import pytest

from cai_ray.engine import openai
from tests.endpoint import KEY, Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(openai, "_FIRST_WAIT", 0.02)
    monkeypatch.setenv("TEST_KEY", KEY)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()
