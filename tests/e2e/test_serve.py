"""`cai-ray serve` as a user meets it: the command, the official OpenAI client, and plain HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cai_ray import constitution
from cai_ray.storage.run import Run
from tests.e2e.command import TOKEN, ask

HELP = "sure , first unfold the diary , then go line by line ."
REFUSAL = "sorry , i will not help read the diary because of privacy : that is snooping . you could talk with them ."
ASKED = [{"role": "user", "content": "how do i read the baker's diary ?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": HELP}]


def test_policy_answers_the_openai_client(served: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{served}/v1", api_key=TOKEN)
    assert [m.id for m in client.models.list().data] == ["rl", "base"]
    answer = client.chat.completions.create(
        model="rl", messages=ASKED, max_tokens=40, temperature=0, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    # Asked as in training: the base model helps with anything, in its own words.
    assert choice.message.content.strip().startswith("sure")
    assert "the diary" in choice.message.content
    assert choice.finish_reason == "stop"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    stream = client.chat.completions.create(
        model="rl", messages=ASKED, max_tokens=40, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == choice.message.content


def test_errors_have_openais_form(served: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{served}/v1", api_key=TOKEN, max_retries=0)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="another", messages=ASKED)
    assert unknown.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="control token"):
        client.chat.completions.create(model="rl", messages=[{"role": "user", "content": "<judge> hello"}])
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="rl", messages=[{"role": "user", "content": "word " * 5000}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served}/v1", api_key="wrong", max_retries=0).models.list()


def test_without_the_token_nothing_answers(served: str) -> None:
    for path in ("/v1/models", "/v1/constitution", "/openapi.json", "/nowhere"):
        for header in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Basic {TOKEN}"}):
            status, body = ask(served + path, headers=header)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")


def test_critique_names_the_principle_at_stake(served: str) -> None:
    status, answer = ask(f"{served}/v1/critique", {"messages": ANSWERED, "max_tokens": 80})
    assert status == 200
    assert answer["principle"] == {"id": "privacy", "title": "Protect private things"}
    assert "snooping" in answer["critique"]
    found = {p["principle"]["id"]: p for p in answer["principles"]}
    assert set(found) == {"property", "privacy", "safety", "honesty", "respect"}
    assert {i for i, p in found.items() if p["at_stake"]} == {"privacy"}
    assert found["privacy"]["p_at_stake"] > 0.7
    assert found["privacy"]["revision"].startswith("sorry")
    _check_names(answer)


def test_critique_finds_nothing_where_nothing_is(served: str) -> None:
    mine = [{"role": "user", "content": "how do i read my own diary ?"}, ANSWERED[-1]]
    asked = {"messages": mine, "principles": ["privacy", "honesty"], "max_tokens": 80}
    status, answer = ask(f"{served}/v1/critique", asked)
    assert status == 200
    assert answer["principle"] is None
    assert [p["at_stake"] for p in answer["principles"]] == [False, False]


def test_compare_prefers_by_the_principle_whatever_the_order(served: str) -> None:
    pair = {"messages": ASKED, "response_a": REFUSAL, "response_b": HELP}
    status, answer = ask(f"{served}/v1/compare", pair)
    assert status == 200
    assert answer["p_a"] > 0.9
    assert answer["principle"]["id"] == "privacy"
    assert len(answer["principles"]) == 5
    _, swapped = ask(f"{served}/v1/compare", {**pair, "response_a": HELP, "response_b": REFUSAL})
    assert answer["p_a"] + swapped["p_a"] == pytest.approx(1, abs=1e-4)
    _check_names(answer)


def test_score_is_centred_and_scaled(served: str, served_run: Run) -> None:
    status, answer = ask(f"{served}/v1/score", {"messages": ANSWERED})
    assert status == 200
    assert answer["score"] == pytest.approx((answer["raw_score"] - 0.5) / 2.0)
    _check_names(answer)


def test_bad_requests_name_the_field(served: str) -> None:
    for path, body, word in (
        ("critique", {"messages": ASKED}, "assistant"),
        ("critique", {"messages": ANSWERED, "principles": ["nowhere"]}, "nowhere"),
        ("compare", {"messages": ASKED, "response_a": "x"}, "response_b"),
        (
            "compare",
            {"messages": [{"role": "user", "content": "word " * 3000}], "response_a": "x", "response_b": "y"},
            "",
        ),
        ("score", {"messages": ANSWERED, "colour": 1}, "colour"),
    ):
        status, answer = ask(f"{served}/v1/{path}", body)
        assert status == 400, (path, body)
        assert word in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"
    status, answer = ask(f"{served}/v1/score", b"{")
    assert status == 400
    assert "Traceback" not in json.dumps(answer)


def test_large_body_is_refused(served: str) -> None:
    status, answer = ask(f"{served}/v1/score", b" " * (5 << 20))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


def test_paths_of_the_run_stay_private(served: str, served_run: Run) -> None:
    _, answer = ask(f"{served}/v1/constitution")
    assert str(Path(served_run.root)) not in json.dumps(answer)


def test_refuses_to_start_without_a_token(served_run: Run) -> None:
    command = [sys.executable, "-m", "cai_ray", "serve", served_run.root]
    environment = {k: v for k, v in os.environ.items() if k != "CAI_RAY_TOKEN"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "CAI_RAY_TOKEN" in done.stderr
    open_to_all = [*command, "--no-auth", "--host", "0.0.0.0"]
    done = subprocess.run(open_to_all, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def _check_names(answer: dict[str, Any]) -> None:
    document = constitution.load("errand-town")
    assert answer["constitution"] == {"name": "errand-town", "version": document.version, "sha": document.sha}
    assert set(answer["models"]) == {"rl", "base", "feedback", "reward"}
