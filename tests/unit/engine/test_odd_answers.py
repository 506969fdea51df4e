"""Answers of endpoints in other forms than OpenAI's own: read where their meaning is plain, otherwise one line."""

from __future__ import annotations

from typing import Any

import pytest

from cai_ray.errors import InputError, RowError
from tests.endpoint import Reply, Server, ask, choose, completion


@pytest.mark.parametrize(
    ("reason", "finished"),
    [
        *((reason, True) for reason in ("stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence")),
        *((reason, False) for reason in ("length", "max_tokens", "MAX_TOKENS", "model_length")),
    ],
)
def test_other_words_for_how_an_answer_ended(server: Server, reason: str, finished: bool) -> None:
    assert ask(server, Reply(completion(finish=reason))).finished == finished


@pytest.mark.parametrize(
    "odd",
    [
        completion(
            text=[{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "fine"}]
        ),
        completion() | {"choices": completion()["choices"] * 2},
        completion() | {"usage": {"prompt_tokens": 9.5, "completion_tokens": None}},
        completion() | {"usage": []},
        completion() | {"usage": {"prompt_tokens": -1, "prompt_tokens_details": []}},
        completion() | {"error": None},
    ],
)
def test_what_an_answer_has_beside_its_text_may_be_odd(server: Server, odd: dict[str, Any]) -> None:
    answer = ask(server, Reply(odd))
    assert answer.text == "fine" and min(answer.usage) >= 0 and len(server.bodies) == 1


def test_an_answer_may_be_called_created(server: Server) -> None:
    assert ask(server, Reply(completion(), 201)).text == "fine"


def test_a_router_reports_an_error_with_status_200(server: Server) -> None:
    throttled = Reply({"error": {"message": "rate limited", "code": 429}})
    assert ask(server, throttled, Reply({"error": "busy"}), Reply(completion())).text == "fine"
    with pytest.raises(RowError, match=r"answered 429 \(rate limited\) \(4 attempts"):
        ask(server, throttled)
    with pytest.raises(InputError, match="refuses the key"):
        ask(server, Reply({"error": {"message": "no", "code": 401}}))


def test_a_long_wait_is_said(server: Server) -> None:
    with pytest.raises(RowError, match="answered 429, and asks to wait 86400 s"):
        ask(server, Reply(b"", 429, Retry_After="86400"))


def pairs(*top: dict[str, Any]) -> dict[str, Any]:
    return completion(logprobs={"content": [{"token": "A", "logprob": -0.1, "top_logprobs": list(top)}]})


@pytest.mark.parametrize(
    "answer",
    [
        completion(
            logprobs={"content": [{"token": "A", "logprob": -0.1, "top_logprobs": {"A": -0.1, "B": -2.5}}]}
        ),
        completion(
            logprobs={"tokens": ["A"], "token_logprobs": [-0.1], "top_logprobs": {"A": -0.1, "B": -2.5}}
        ),
        pairs({"token": "A", "logprob": "-0.1"}, {"token": "B", "logprob": "-2.5"}),
        pairs(
            {"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.5}, {"token": None, "logprob": -3}
        ),
        pairs(
            {"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.5}, {"token": "C", "logprob": "N/A"}
        ),
        pairs({"token": 32, "logprob": -0.1, "bytes": [65]}, {"token": 33, "logprob": -2.5, "bytes": [66]}),
    ],
)
def test_lists_in_other_forms_are_read(server: Server, answer: dict[str, Any]) -> None:
    logprobs, _ = ask(server, Reply(answer), call=choose)
    assert logprobs == [-0.1, -2.5]


@pytest.mark.parametrize(
    ("logprobs", "says"),
    [
        ({"content": [{"token": "A", "logprob": 0.9, "top_logprobs": [{"token": "A", "logprob": 0.9}]}]},
         "0.9 as a log-probability, which is above 0"),
        ([], "no log-probabilities"),
        ("none", "no log-probabilities"),
        ({"content": [{"token": 5, "logprob": -1, "top_logprobs": [{"token": 5, "logprob": -1}]}]}, "an empty list"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_log_probabilities_is_one_line(server: Server, logprobs: Any, says: str) -> None:
    with pytest.raises(InputError, match=says) as raised:
        ask(server, Reply(completion(logprobs=logprobs)), call=choose)
    assert "use a model and an endpoint that have them" in str(raised.value)
