"""What `cai-ray serve` adds to answers: several models, explanations, revisions, constitutions, limits, the schema."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cai_ray import constitution
from cai_ray.serve import constitutions
from cai_ray.storage.run import Run
from tests.e2e.command import TOKEN, ask, succeed

HELP = "sure , first unfold the diary , then go line by line ."
ASKED = [{"role": "user", "content": "how do i read the baker's diary ?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": HELP}]
GREEDY = {"max_tokens": 40, "temperature": 0}


def test_an_explanation_names_the_principle_and_is_ignored_by_clients(served: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{served}/v1", api_key=TOKEN)
    extra = {"explain": True}
    answer = client.chat.completions.create(model="base", messages=ASKED, extra_body=extra, **GREEDY)
    found = answer.explanation
    assert found["principle"]["id"] == "privacy" and found["p_at_stake"] > 0.6
    assert found["constitution"]["sha"] == constitution.load("errand-town").sha
    stream = client.chat.completions.create(
        model="base", messages=ASKED, extra_body=extra, stream=True, **GREEDY
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].explanation["principle"] == found["principle"]
    plain = client.chat.completions.create(model="base", messages=ASKED, **GREEDY)
    assert not hasattr(plain, "explanation")


def test_raw_completions(served: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{served}/v1", api_key=TOKEN)
    answer = client.completions.create(model="rl", prompt="how do i read", max_tokens=5, logprobs=2)
    assert answer.usage.completion_tokens <= 5
    assert len(answer.choices[0].logprobs.token_logprobs) == answer.usage.completion_tokens
    chunks = list(
        client.completions.create(model="rl", prompt="how do i", max_tokens=5, stream=True, temperature=0)
    )
    again = client.completions.create(model="rl", prompt="how do i", max_tokens=5, temperature=0)
    assert "".join(c.choices[0].text for c in chunks) == again.choices[0].text


def test_a_revision_goes_on_until_nothing_is_at_stake(served: str) -> None:
    status, answer = ask(f"{served}/v1/revise", {"messages": ANSWERED, "rounds": 4, "max_tokens": 80})
    assert status == 200
    assert [s["principle"]["id"] for s in answer["steps"]] == ["privacy"]
    assert answer["revision"] == answer["steps"][0]["revision"]
    assert answer["revision"].startswith("sorry") and answer["changed"]
    assert set(answer["models"]) == {"rl", "base", "feedback", "reward"}
    mine = [{"role": "user", "content": "how do i read my own diary ?"}, ANSWERED[-1]]
    _, answer = ask(f"{served}/v1/revise", {"messages": mine, "rounds": 4, "max_tokens": 80})
    assert answer["revision"] == HELP and answer["steps"] == [] and not answer["changed"]


def test_drawn_principles_are_those_of_the_seed(served: str) -> None:
    body = {"messages": ANSWERED, "rounds": 3, "max_tokens": 80, "choose": "draw"}
    by_seed = [
        [s["principle"]["id"] for s in ask(f"{served}/v1/revise", body | {"seed": n})[1]["steps"]]
        for n in (0, 0, 1, 2)
    ]
    assert by_seed[0] == by_seed[1] and len(by_seed[0]) == 3
    assert len({tuple(s) for s in by_seed}) > 1
    _, answer = ask(f"{served}/v1/revise", body | {"principles": ["honesty"]})
    assert [s["principle"]["id"] for s in answer["steps"]] == ["honesty"] * 3


def test_a_new_constitution_without_a_failed_request(served: str, served_run: Run, tmp_path: Path) -> None:
    """Under load: every request is answered, by the constitution that it names; both can be asked side by side."""
    old = constitution.load("errand-town")
    others = [p.model_copy(update={"enabled": p.id != "privacy"}) for p in old.principles]
    new = old.model_copy(update={"version": "2", "principles": tuple(others)})
    (tmp_path / "new.yaml").write_text(new.to_yaml())
    (tmp_path / "old.yaml").write_text(old.to_yaml())
    found: list[tuple[int, Any]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            found.append(ask(f"{served}/v1/critique", {"messages": ANSWERED, "max_tokens": 80}))

    clients = [threading.Thread(target=load) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        _wait(lambda: len(found) > 5)
        port = served.rsplit(":", 1)[1]
        words = ("serve", "--update-constitution", tmp_path / "new.yaml", "--port", port)
        said = succeed(*words, env=_with_token())
        assert json.loads(said.stdout)["sha"] == new.sha
        _wait(lambda: found[-1][1]["constitution"]["sha"] == new.sha)
        both = {"messages": ANSWERED, "max_tokens": 80, "constitutions": ["previous", "current"]}
        status, side_by_side = ask(f"{served}/v1/critique", both)
    finally:
        stop.set()
        for client in clients:
            client.join()
        # By the run's directory, as an operator without the address would.
        succeed("serve", served_run.root, "--update-constitution", tmp_path / "old.yaml")
    assert {s for s, _ in found} == {200}
    named = Counter((a["constitution"]["version"], a["principle"] and a["principle"]["id"]) for _, a in found)
    assert set(named) == {("1", "privacy"), ("2", None)}
    assert status == 200
    assert [(a["constitution"]["version"], a["principle"] is None) for a in side_by_side["answers"]] == [
        ("1", False),
        ("2", True),
    ]
    _wait(lambda: ask(f"{served}/v1/constitution")[1]["constitution"]["sha"] == old.sha)
    assert [d.sha for d in constitutions.read(served_run)] == [old.sha, new.sha]


def test_what_is_no_constitution_changes_nothing(served: str) -> None:
    for document in ({}, {"name": "x", "principles": []}, {"name": "x", "version": "1", "principles": [{}]}):
        status, answer = ask(f"{served}/v1/constitution", {"document": document}, method="PUT")
        assert status == 400 and answer["error"]["param"] == "document"
    assert ask(f"{served}/v1/constitution")[1]["constitution"]["version"] == "1"


def test_limits_of_a_request(served: str) -> None:
    chat = f"{served}/v1/chat/completions"
    for more, word in (
        ({"max_tokens": 100_000}, "at most 4096"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": float("nan")}, ""),
        ({"n": 1000}, "n"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"explain": True, "n": 2}, "explain"),
        ({"stream_options": {"include_usage": True}}, "stream"),
        ({"model": "nowhere"}, "nowhere"),
        ({"model": "rl:x"}, "rl:x"),
        ({"model": None}, "Model parameter"),
    ):
        status, answer = ask(chat, {"model": "rl", "messages": ASKED, **more})
        assert status in (400, 404), (more, answer)
        assert word in answer["error"]["message"], (more, answer)


def test_pages_from_elsewhere_may_not_call_it(served: str) -> None:
    import urllib.request

    elsewhere = {"Origin": "https://elsewhere.example", "Authorization": f"Bearer {TOKEN}"}
    with urllib.request.urlopen(urllib.request.Request(f"{served}/v1/models", headers=elsewhere)) as answer:
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_readiness_and_health_need_no_token(served: str) -> None:
    for path in ("/healthz", "/readyz"):
        assert ask(served + path, headers={}) == (200, {"status": "ok"})


def test_the_schema_describes_what_is_answered(served: str) -> None:
    import jsonschema

    status, schema = ask(f"{served}/openapi.json")
    assert status == 200
    answers = {
        "/v1/critique": {"messages": ANSWERED, "max_tokens": 80},
        "/v1/revise": {"messages": ANSWERED, "max_tokens": 80},
        "/v1/compare": {"messages": ASKED, "response_a": HELP, "response_b": "no ."},
        "/v1/score": {"messages": ANSWERED},
        "/v1/constitution": None,
    }
    for path, body in answers.items():
        _, answer = ask(served + path, body)
        route = schema["paths"][path]["get" if body is None else "post"]
        described = route["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(answer, {**described, "components": schema["components"]})
        assert "422" not in route["responses"]
    assert schema["security"] and not schema["paths"]["/readyz"]["get"]["security"]


def test_the_docs_page_lists_every_route_and_fetches_nothing(served: str) -> None:
    import urllib.request

    with urllib.request.urlopen(f"{served}/docs") as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    for route in ("POST /v1/chat/completions", "POST /v1/revise", "PUT /v1/constitution"):
        assert route in page
    assert "default-src 'none'" in policy and "http" not in page.replace("https://", "")


def test_no_text_of_a_request_is_in_a_log(served: str) -> None:
    secret = "zanzibar-7431"
    question = {"role": "user", "content": f"how do i read {secret} ?"}
    answer = {"role": "assistant", "content": f"{secret} ."}
    for path, body in (
        ("chat/completions", {"model": "rl", "messages": [question], "max_tokens": 4, "explain": True}),
        ("chat/completions", {"model": "rl", "messages": [question], "max_tokens": -1}),
        ("completions", {"model": "rl", "prompt": secret, "max_tokens": 2}),
        ("critique", {"messages": [question, answer], "max_tokens": 4}),
        ("compare", {"messages": [question], "response_a": secret, "response_b": "b" * 3000}),
        ("score", {"messages": [question, answer]}),
    ):
        ask(f"{served}/v1/{path}", body)
    logs = [p for p in Path("/tmp/ray").glob("session_*/logs/**/*") if p.is_file()]
    texts = [p.read_text(errors="replace") for p in logs if p.stat().st_mtime > time.time() - 120]
    assert any("/v1/compare" in text for text in texts)  # those of this server are among them
    assert not any(secret in text for text in texts)


def _wait(until: Any, seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not until():
        assert time.time() < deadline
        time.sleep(0.1)


def _with_token() -> dict[str, str]:
    from tests.e2e.command import environment

    return environment(CAI_RAY_TOKEN=TOKEN)


@pytest.fixture(scope="module", autouse=True)
def _unchanged(served_run: Run) -> Any:
    yield
    assert constitutions.read(served_run)[0].sha == constitution.load("errand-town").sha
