"""Fields and log-probabilities that endpoints refuse or lack: learned, or said in one line at the first answer."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cai_ray import pipeline
from cai_ray.cluster import holder
from cai_ray.config.engine import EngineConfig
from cai_ray.config.load import load_config
from cai_ray.engine.openai import OpenaiEngine
from cai_ray.engine.options import option_logprobs
from cai_ray.engine.protocol import Sampling
from cai_ray.engine.request_fields import NEUTRAL
from cai_ray.errors import Abstained, InputError, RowError
from tests.endpoint import (
    ASK,
    GREEDY,
    KEY,
    Reply,
    Server,
    ask,
    choose,
    completion,
    endpoint,
    likeliest,
    model,
)

FINE = {**likeliest(("A", 0.6), ("B", 0.3))}
STANDARD = {"model", "messages", "temperature", "max_tokens", "seed", "top_p"}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "_lines", [])
    monkeypatch.setattr(holder, "_left_out", {})


def error(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> Reply:
    return Reply(
        {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}, status
    )


def takes(*fields: str) -> Callable[[dict[str, Any]], Reply]:
    """A server that names the first field that it does not know."""

    def rule(body: dict[str, Any]) -> Reply:
        unknown = sorted(body.keys() - {*fields})
        message = (
            f"Unsupported parameter: '{unknown[0]}' is not supported with this model." if unknown else ""
        )
        return error(message, unknown[0], "unsupported_parameter") if unknown else Reply(FINE)

    return rule


def ask_by(server: Server, rule: Callable[[dict[str, Any]], Reply], call: Any = None, **more: Any) -> Any:
    server.rule = rule
    return ask(server, call=call, **more)


def many(count: int) -> Callable[[OpenaiEngine], Any]:
    async def call(engine: OpenaiEngine) -> Any:
        return await asyncio.gather(*(engine.chat(ASK, Sampling(0.7, 16, seed)) for seed in range(count)))

    return call


# ------------------------------------------------------------------------------------------------ refused fields


def test_a_reasoning_models_refusals_are_learned_one_by_one(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    async def call(engine: OpenaiEngine) -> None:
        await engine.chat(ASK, Sampling(0.7, 16, 1))
        tried = len(server.bodies)
        await engine.chat(ASK, Sampling(0.7, 16, 2))
        assert len(server.bodies) == tried + 1, "the second request knows"
        assert engine._fields.learned == {
            "max_tokens": "max_completion_tokens", "min_p": None, "repetition_penalty": None, "seed": None,
            "temperature=0.7": None, "top_k": None, "top_p": None,
        }  # fmt: skip

    ask_by(server, takes("model", "messages", "max_completion_tokens"), call)
    assert server.bodies[-1] == {"model": "judge-1", "messages": ASK, "max_completion_tokens": 16}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "sends max_tokens as max_completion_tokens" in said
    assert "leave_out: [min_p, repetition_penalty, seed, temperature, top_k, top_p]" in said


def test_a_refusal_amid_concurrent_requests_fails_none(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    done = ask_by(server, takes(*STANDARD - {"seed"}), many(30), max_num_seqs=10)
    assert [c.text for c in done] == ["fine"] * 30
    assert len(server.bodies) <= 30 + 10 * 4, "those in flight are repeated, and later ones know"
    assert capsys.readouterr().err.count("\n") == 1


def test_a_value_of_temperature_is_learned_by_itself(server: Server) -> None:
    def rule(body: dict[str, Any]) -> Reply:
        if body.get("temperature") == 0:
            return Reply({"error": "Input validation error: `temperature` must be strictly positive"}, 422)
        return Reply(FINE)

    async def call(engine: OpenaiEngine) -> None:
        await engine.chat(ASK, GREEDY)
        await engine.chat(ASK, Sampling(0.7, 16, 1))

    ask_by(server, rule, call)
    assert [b.get("temperature") for b in server.bodies] == [0, None, 0.7]


def test_of_two_fields_that_exclude_each_other_the_configured_one_stays(server: Server) -> None:
    def rule(body: dict[str, Any]) -> Reply:
        both = {"temperature", "top_p"} <= body.keys()
        return error("`temperature` and `top_p` cannot both be specified; use one.") if both else Reply(FINE)

    ask_by(server, rule)
    assert server.bodies[-1]["temperature"] == 0 and "top_p" not in server.bodies[-1]


def test_the_settings_say_it_from_the_start(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    left_out = ["seed", "top_k", "min_p", "repetition_penalty"]
    ask_by(server, takes(*STANDARD - {"seed"}), leave_out=left_out)
    ask_by(server, takes(*STANDARD - {"seed"}), extra=dict.fromkeys(left_out))
    assert len(server.bodies) == 2 and not capsys.readouterr().err
    ask_by(
        server, takes("model", "messages", "max_completion_tokens", "temperature", "seed", *NEUTRAL),
        extra={"max_tokens": None, "max_completion_tokens": 5},
    )  # fmt: skip
    assert server.bodies[2]["max_completion_tokens"] == 5 and len(server.bodies) == 3


def test_a_server_that_refuses_without_a_word_is_asked_with_what_all_know(server: Server) -> None:
    ask_by(server, lambda body: Reply(FINE) if not body.keys() - STANDARD else Reply(b"Bad Request", 400))
    assert len(server.bodies) == 2
    with pytest.raises(RowError, match=r"refused by the endpoint: 400 \(Bad Request\)"):
        ask_by(server, lambda body: Reply(b"Bad Request", 400))
    assert len(server.bodies) == 4


def failing(status: int, message: str, field: str = "min_p") -> Callable[[dict[str, Any]], Reply]:
    """A server that fails at a field instead of refusing it."""
    return lambda body: Reply({"error": {"message": message}}, status) if field in body else Reply(FINE)


@pytest.mark.parametrize(
    ("rule", "learned"),
    [
        (failing(500, "create() got an unexpected keyword argument 'min_p'"), {"min_p": None}),
        (failing(502, "Unsupported parameter: min_p"), {"min_p": None}),
        (failing(501, "max_tokens is not supported", "max_tokens"), {"max_tokens": "max_completion_tokens"}),
        (failing(200, "Unsupported parameter: min_p"), {"min_p": None}),
        (failing(500, "Internal Server Error"), dict.fromkeys(NEUTRAL)),
    ],
)
def test_a_server_that_fails_at_a_field_that_it_does_not_know_teaches_it(
    server: Server, rule: Callable[[dict[str, Any]], Reply], learned: dict[str, Any]
) -> None:
    async def call(engine: OpenaiEngine) -> None:
        await engine.chat(ASK, GREEDY)
        asked = len(server.bodies)
        assert engine._fields.learned == learned
        await engine.chat(ASK, GREEDY)
        assert len(server.bodies) == asked + 1

    ask_by(server, rule, call)


@pytest.mark.parametrize("status", [500, 503])
def test_a_failure_that_passes_teaches_nothing(server: Server, status: int) -> None:
    """Also where it passes just when fields are left out on a guess."""

    async def call(engine: OpenaiEngine) -> None:
        await engine.chat(ASK, GREEDY)
        assert not engine._fields.learned
        await engine.chat(ASK, GREEDY)
        assert NEUTRAL.keys() <= server.bodies[-1].keys()

    ask(server, *[Reply(b"Internal Server Error", status)] * 2, Reply(FINE), call=call)


def test_a_failure_after_an_answer_leaves_all_fields_in(server: Server) -> None:
    async def call(engine: OpenaiEngine) -> None:
        await engine.chat(ASK, GREEDY)
        with pytest.raises(
            RowError, match=r"answered 500 \(CUDA error; min_p is not supported\) \(4 attempts"
        ):
            await engine.chat(ASK, GREEDY)

    ask(server, Reply(FINE), error("CUDA error; min_p is not supported", status=500), call=call)
    assert all(NEUTRAL.keys() <= body.keys() for body in server.bodies)


def test_a_row_that_is_refused_teaches_nothing(server: Server) -> None:
    """What an endpoint says of one row, with a field's name in it, changes no other request."""

    def rule(body: dict[str, Any]) -> Reply:
        return Reply(FINE) if body["messages"] == ASK else error("seed: this text is invalid")

    async def call(engine: OpenaiEngine) -> None:
        with pytest.raises(RowError, match="this text is invalid"):
            await engine.chat([{"role": "user", "content": "odd"}], GREEDY)
        await engine.chat(ASK, GREEDY)
        assert engine._fields.learned == {}

    ask_by(server, rule, call)
    assert server.bodies[-1]["seed"] == 3


@pytest.mark.parametrize(
    ("field", "more", "says"),
    [
        ("max_tokens", {}, r"leave_out: \[max_tokens\] accepts that"),
        ("logprobs", {}, "use a model and an endpoint that give log-probabilities"),
        ("top_logprobs", {}, "use a model and an endpoint that give log-probabilities"),
        ("continue_final_message", {"continues": True}, "set continues: false"),
        ("best_of", {"extra": {"best_of": 3}}, "`extra` asks for best_of: take it out"),
    ],
)
def test_what_an_answer_needs_is_one_line_at_the_first_refusal(
    server: Server, field: str, more: dict[str, Any], says: str
) -> None:
    also = {"max_completion_tokens"} if field == "max_tokens" else set()

    def rule(body: dict[str, Any]) -> Reply:
        refused = next((f for f in {field} | also if f in body), None)
        return error(f"{refused} is not supported, says {KEY}", refused) if refused else Reply(FINE)

    begun = [*ASK, {"role": "assistant", "content": "The letter is:"}]
    with pytest.raises(InputError, match=rf"^endpoint {server.url}: 400 .*{says}") as e:
        ask_by(server, rule, lambda engine: engine.choose(begun, ["A", "B"]), **more)
    assert len(server.bodies) == 1 + len(also) and "\n" not in str(e.value) and KEY not in str(e.value)


def test_what_was_accepted_before_is_the_rows_error(server: Server) -> None:
    def rule(body: dict[str, Any]) -> Reply:
        return (
            Reply(FINE) if body["messages"] == ASK else error("logprobs are not supported here", "logprobs")
        )

    async def call(engine: OpenaiEngine) -> None:
        await choose(engine)
        with pytest.raises(RowError, match="logprobs are not supported here"):
            await engine.choose([{"role": "user", "content": "odd"}], ["A", "B"])

    ask_by(server, rule, call)


def test_a_model_that_is_not_there_is_one_line_with_any_status(server: Server) -> None:
    with pytest.raises(InputError, match=r"400 .*check base_url and the model's name, 'judge-1'"):
        ask_by(server, lambda body: error("The model `judge-1` does not exist", "model", "model_not_found"))
    assert len(server.bodies) == 1


def test_a_refused_model_of_log_probabilities_is_one_line(server: Server) -> None:
    said = Reply({"error": {"message": "You are not allowed to request logprobs from this model"}}, 403)
    with pytest.raises(InputError, match=r"403 .*use a model and an endpoint that give log-probabilities"):
        ask(server, said, call=choose)


@pytest.mark.parametrize("without", [{"leave_out": ["logprobs"]}, {"extra": {"top_logprobs": None}}])
def test_settings_without_log_probabilities_are_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, without: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="logprobs is left out, and the probabilities of the options"):
        ask(server, Reply(FINE), call=choose, **without)
    assert not server.bodies
    engine = json.dumps(
        {"kind": "openai", "base_url": "https://x.example/v1", "api_key_env": "TEST_KEY", **without}
    )
    config = load_config("errand-town", [f"label.judge.engine={engine}"], out=str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"^label\.judge\.engine: (top_)?logprobs is left out"):
        pipeline.check_inputs(config)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="messages: no request is one without it"):
        endpoint("http://x", leave_out=["messages"])
    with pytest.raises(ValueError, match="`leave_out` is not for kind=vllm"):
        EngineConfig(leave_out=("seed",))


def test_other_fields_are_other_answers() -> None:
    plain, without = endpoint("http://x"), endpoint("http://x", leave_out=["seed"])
    assert plain.answers_by != without.answers_by


# ------------------------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("limit", [2, 5])
def test_too_many_log_probabilities_become_as_many_as_there_are(server: Server, limit: int) -> None:
    def rule(body: dict[str, Any]) -> Reply:
        return (
            error(f"Cannot request more than {limit} logprobs.")
            if body["top_logprobs"] > limit
            else Reply(FINE)
        )

    async def call(engine: OpenaiEngine) -> None:
        for _ in range(2):
            assert (await choose(engine))[0] == pytest.approx([math.log(0.6), math.log(0.3)])

    ask_by(server, rule, call)
    assert [b["top_logprobs"] for b in server.bodies] == [20, limit, limit]


def first_token(top: Any, **position: Any) -> dict[str, Any]:
    return completion(logprobs={"content": [{"top_logprobs": top, **position}]})


def listed(*top: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"token": token, "logprob": p} for token, p in top]


@pytest.mark.parametrize(
    "answer",
    [
        completion(logprobs=None),
        completion(),
        completion(logprobs={"content": None}),
        first_token(listed(("A", -0.1))),
        first_token(listed(("A", -0.1), ("B", None))),
        first_token(listed(("A", -0.1), ("B", -math.inf))),
        first_token(listed(("A", -0.1), ("B", math.nan))),
        first_token(listed(("A", -0.1), ("B", -9999.0))),
        first_token([], token="A", logprob=-0.1),
        first_token(None, token="A", logprob=-0.1),
    ],
    ids=[
        "null",
        "none",
        "no content",
        "one",
        "null logprob",
        "-inf",
        "nan",
        "-9999",
        "empty list",
        "no list",
    ],
)
def test_too_few_log_probabilities_end_the_stage_at_the_first_answer(
    server: Server, answer: dict[str, Any]
) -> None:
    with pytest.raises(
        InputError, match=rf"^endpoint {server.url}: .*log-probabilit.*use a model and an endpoint"
    ):
        ask(server, Reply(answer), call=choose)
    assert len(server.bodies) == 1

    async def call(engine: OpenaiEngine) -> None:
        await choose(engine)
        with pytest.raises(RowError, match="log-probabilit"):
            await choose(engine)
        await choose(engine)

    ask(server, Reply(FINE), Reply(answer), Reply(FINE), call=call)


@pytest.mark.parametrize("top", [[], listed(("A", None)), listed(("A", -math.inf), ("B", -9999))])
def test_an_empty_list_is_asked_for_again_and_not_for_ever(server: Server, top: list[Any]) -> None:
    odd = Reply(first_token(top))
    assert ask(server, odd, Reply(FINE), call=choose)[0] == pytest.approx([math.log(0.6), math.log(0.3)])
    server.bodies.clear()
    with pytest.raises(InputError, match=r"empty list of log-probabilities \(3 attempts in .*use a model"):
        ask(server, odd, call=choose, attempts=10)
    assert len(server.bodies) == 3


def test_an_answer_that_was_filtered_is_the_rows_error(server: Server) -> None:
    with pytest.raises(RowError, match="finish_reason 'content_filter'"):
        ask(server, Reply(completion(None, "content_filter", logprobs=None)), call=choose)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (first_token(listed(("A", -0.1), ("The", -3.0), ("B", -math.inf))),
         [-0.1, math.log(1 - math.exp(-0.1) - math.exp(-3))]),
        (first_token(listed(("A", 0.0), ("B", -9999.0))), [0.0, math.log(1e-6)]),
        (first_token(listed((" A", -1.0), ("A", -1.0), ("B", -3.0))), [-1.0 + math.log(2), -3.0]),
        (first_token(listed(("\u2581A", -0.5), ("\u0120B", -1.5))), [-0.5, -1.5]),
        (first_token([{"token": "x", "bytes": [65], "logprob": -0.5},
                      {"token": "y", "bytes": [32, 66], "logprob": -1.5}]), [-0.5, -1.5]),
        (first_token([{"token": "A", "bytes": [255], "logprob": -0.5}, {"token": "B", "bytes": "no", "logprob": -1.5}]),
         [-0.5, -1.5]),
        (completion(logprobs={"tokens": ["A"], "token_logprobs": [-0.5], "top_logprobs": [{"A": -0.5, "B": -1.5}]}),
         [-0.5, -1.5]),
    ],
    ids=["cut off", "sure", "blanks", "vocabulary", "bytes", "odd bytes", "completions"],
)  # fmt: skip
def test_odd_lists_are_read_as_what_they_mean(server: Server, answer: Any, expected: list[float]) -> None:
    assert ask(server, Reply(answer), call=choose)[0] == pytest.approx(expected)


def test_a_vocabularys_spelling_of_blanks_is_a_blank() -> None:
    with pytest.raises(Abstained):
        option_logprobs([("\u0120The", -0.1), ("An", -2.0)], ["A", "B"])


# ------------------------------------------------------------------------------------------------ neutral sampling


def test_a_served_models_own_sampling_is_switched_off(server: Server) -> None:
    async def call(engine: OpenaiEngine) -> None:
        await engine.chat(ASK, GREEDY)
        await choose(engine)

    ask(server, Reply(FINE), call=call)
    for body in server.bodies:
        assert {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}.items() <= body.items()


# ------------------------------------------------------------------------------------------------ what is recorded


def test_what_was_learned_is_kept_for_the_manifest_without_the_key(server: Server) -> None:
    ask_by(server, takes("model", "messages", "temperature", "max_completion_tokens", *NEUTRAL))
    assert holder._left_out == {"max_tokens": "max_completion_tokens", "seed": None}
    assert len(holder._lines) == 1 and KEY not in holder._lines[0]
    assert OpenaiEngine(model("judge-1", endpoint(server.url)))._fields.learned == {}, "each engine learns"
