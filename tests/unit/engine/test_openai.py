"""The engine of endpoints, against a server on this machine that throttles, drops, hangs and talks nonsense."""

import asyncio
import json
import logging
import math
import pickle
import time
import traceback
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from cai_ray import pipeline
from cai_ray.cli import main
from cai_ray.cluster.usage import Usage
from cai_ray.config.engine import EngineConfig
from cai_ray.config.fingerprint import result_settings
from cai_ray.config.load import load_config
from cai_ray.config.run import RunConfig
from cai_ray.engine import openai as module
from cai_ray.engine.chat_completion import read_retry_after
from cai_ray.engine.make import make_engine
from cai_ray.engine.openai import OpenaiEngine
from cai_ray.engine.options import option_logprobs
from cai_ray.engine.protocol import Completion
from cai_ray.engine.request_fields import NEUTRAL
from cai_ray.errors import Abstained, InputError, RowError
from cai_ray.prompts.load import load_templates
from cai_ray.provenance.inputs import own_inputs
from cai_ray.storage.run import Run
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

GENERAL = load_templates("general")


# ------------------------------------------------------------------------------------------------ what is asked


def test_chat_sends_what_it_is_given_and_reads_text_end_and_usage(server: Server) -> None:
    done = ask(server, Reply(completion(" fine . ")), extra={"top_p": 0.5})
    assert done == Completion("fine .", True, Usage(9, 4, 2, 1))
    assert server.paths == ["/v1/chat/completions"] and server.keys == [f"Bearer {KEY}"]
    asked = {"model": "judge-1", "messages": ASK, "temperature": 0, "max_tokens": 8, "seed": 3, "top_p": 0.5}
    assert server.bodies == [NEUTRAL | asked], "extra stands above what would be sent"
    assert not ask(server, Reply(completion("cut", "length"))).finished
    bare = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}
    assert ask(server, Reply(bare)).usage == Usage(calls=1), "not every endpoint counts"


def test_choose_asks_for_the_first_token_with_the_likeliest(server: Server) -> None:
    logprobs, usage = ask(server, Reply(likeliest(("B", 0.6), ("A", 0.3), ("The", 0.05))), call=choose)
    assert logprobs == pytest.approx([math.log(0.3), math.log(0.6)]) and usage == Usage(9, 4, 2, 1)
    body = server.bodies[0]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["temperature"]) == (
        1,
        True,
        20,
        1,
    )


def test_a_begun_answer_is_gone_on_with_or_left_out(server: Server) -> None:
    begun = [*ASK, {"role": "assistant", "content": "The letter is:\n"}]
    top = Reply(likeliest(("A", 0.9), ("B", 0.1)))
    ask(server, top, call=lambda e: e.choose(begun, ["A", "B"]))
    ask(server, top, call=lambda e: e.choose(begun, ["A", "B"]), continues=True)
    left_out, gone_on = server.bodies
    assert left_out["messages"] == ASK and "continue_final_message" not in left_out
    assert gone_on["messages"] == begun
    assert gone_on["continue_final_message"] is True and gone_on["add_generation_prompt"] is False


# ------------------------------------------------------------------------------------------------ options


def test_an_option_that_is_missing_is_given_the_most_it_can_have() -> None:
    least = option_logprobs([("A", math.log(0.7)), ("The", math.log(0.1))], ["A", "B"])
    assert least == pytest.approx([math.log(0.7), math.log(0.1)]), "no likelier than the list's last"
    left = option_logprobs([("A", math.log(0.7)), ("The", math.log(0.29))], ["A", "B"])
    assert left == pytest.approx([math.log(0.7), math.log(0.01)]), "no more than the list leaves over"
    sure = option_logprobs([("A", 0.0), ("The", -9999.0)], ["A", "B"])
    assert sure[0] == 0.0 and -1e5 < sure[1] < -10, "finite, and hardly anything"


def test_tokens_that_differ_in_spaces_are_one_choice() -> None:
    top = [("A", math.log(0.4)), (" A", math.log(0.2)), ("B", math.log(0.3)), ("a", math.log(0.05))]
    assert option_logprobs(top, ["A", "B"]) == pytest.approx([math.log(0.6), math.log(0.3)])


def test_both_options_missing_is_an_abstention(server: Server) -> None:
    with pytest.raises(Abstained, match=r"abstention: none of \['A', 'B'\] is among the likeliest"):
        ask(server, Reply(likeliest(("I", 0.6), ("The", 0.3))), call=choose)
    assert len(server.bodies) == 1, "another attempt would say the same"


def test_options_that_differ_in_spaces_alone_are_an_input_error(server: Server) -> None:
    with pytest.raises(InputError, match="differ in spaces alone; choose others"):
        ask(server, Reply(), call=lambda e: e.choose(ASK, ["A", " A"]))


# ------------------------------------------------------------------------------------------------ trouble that passes


def test_throttling_is_waited_out_as_long_as_the_endpoint_says(server: Server) -> None:
    throttled = Reply({"error": {"message": "slow down"}}, 429, Retry_After="1")
    assert ask(server, throttled, Reply(completion())).text == "fine"
    assert len(server.times) == 2 and server.times[1] - server.times[0] >= 1.0


def test_retry_after_may_be_a_date() -> None:
    assert 3 < read_retry_after(formatdate(time.time() + 5, usegmt=True)) <= 5
    assert [read_retry_after(v) for v in ("soon", "nan", "inf", "-3", None, "2")] == [0, 0, 0, 0, 0, 2]


def test_waiting_grows_and_jitters(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.1)
    with pytest.raises(RowError, match=r"answered 503 \(4 attempts in"):
        ask(server, Reply(b"", 503))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 3 and all(0.05 * 2**i <= gap < 0.1 * 2**i + 1 for i, gap in enumerate(gaps))


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(b"oops", 500),
        Reply(b"", 502),
        Reply(b"", 408),
        Reply(drop=True),
        Reply(completion(), seconds=2),
        Reply(b'{"choi', Content_Length="99"),
        Reply(b"<html>gateway</html>"),
        Reply(b"\xff\xfe{"),
        Reply(b"[" * 50_000),
        Reply({"choices": []}),
        Reply({"choices": [{"message": "text"}]}),
        Reply(b'{"choices": [{"message": {"content": "cut off'),
    ],
    ids=[
        "500",
        "502",
        "408",
        "dropped",
        "hangs",
        "stalls",
        "html",
        "bytes",
        "deep",
        "no choice",
        "no fields",
        "half",
    ],
)
def test_trouble_is_tried_again_and_then_the_rows_error(server: Server, trouble: Reply) -> None:
    assert ask(server, trouble, Reply(completion()), timeout_s=0.8).text == "fine"
    assert len(server.bodies) == 2
    with pytest.raises(RowError, match=rf"endpoint {server.url}: .*\(3 attempts in"):
        ask(server, trouble, timeout_s=0.8, attempts=3)
    assert len(server.bodies) == 2 + 3


def test_all_attempts_together_have_a_bound(server: Server) -> None:
    started = time.monotonic()
    with pytest.raises(RowError, match=r"answered 429, .* \(1 attempt in"):
        ask(server, Reply(b"", 429, Retry_After="3600"), give_up_s=5)
    with pytest.raises(RowError, match="no answer in time"):
        ask(server, Reply(completion(), seconds=2), give_up_s=0.5)
    assert time.monotonic() - started < 30, "nobody waits an hour"


def test_no_more_requests_are_open_than_configured(server: Server) -> None:
    async def many(engine: OpenaiEngine) -> list[Completion]:
        return await asyncio.gather(*(engine.chat(ASK, GREEDY) for _ in range(30)))

    done = ask(server, Reply(completion(), seconds=0.03), call=many, max_num_seqs=5)
    assert len(done) == len(server.bodies) == 30 and server.most == 5


# ------------------------------------------------------------------------------------------------ whose fault it is


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_is_the_rows_error(server: Server, status: int) -> None:
    said = {
        "error": {
            "message": "This model's maximum context length is 8192 tokens",
            "code": "context_length_exceeded",
        }
    }
    with pytest.raises(RowError, match=rf"refused by the endpoint: {status} \(This model's maximum context"):
        ask(server, Reply(said, status))
    assert len(server.bodies) == 1


@pytest.mark.parametrize("text", ["", "  ", None])
def test_an_empty_answer_is_the_rows_error_and_has_cost_something(server: Server, text: str | None) -> None:
    with pytest.raises(RowError, match="empty answer") as failed:
        ask(server, Reply(completion(text)))
    assert failed.value.spent == Usage(9, 4, 2, 1)


@pytest.mark.parametrize(
    ("text", "kept"), [("北京\ufffd", "北京"), ("a \ufffd b", "a \ufffd b"), ("", ""), (None, "")]
)
def test_an_answer_that_was_cut_ends_with_a_complete_character(
    server: Server, text: str | None, kept: str
) -> None:
    """One that is empty was cut within a thought that the endpoint keeps to itself."""
    done = ask(server, Reply(completion(text, "length")))
    assert (done.text, done.finished) == (kept, False)
    assert ask(server, Reply(completion("the mark \ufffd"))).text == "the mark \ufffd", "it was not cut"


def test_text_that_is_no_unicode_is_the_rows_error(server: Server) -> None:
    with pytest.raises(RowError, match="a lone surrogate"):
        ask(server, Reply(), call=lambda e: e.chat([{"role": "user", "content": "\ud800"}], GREEDY))


def test_a_withheld_answer_is_the_rows_error(server: Server) -> None:
    with pytest.raises(RowError, match="ended the answer with finish_reason 'content_filter'"):
        ask(server, Reply(completion("sorry", "content_filter")))


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (
            Reply({"error": {"message": f"bad key {KEY}"}}, 401),
            r"refuses the key in TEST_KEY \(401\); export",
        ),
        (
            Reply({"error": {"message": f"{KEY} may not"}}, 403),
            r"403 \(\*\*\* may not\); allow the key in TEST_KEY",
        ),
        (Reply({"error": {"message": "no model"}}, 404), r"404 \(no model\); check base_url .*'judge-1'"),
        (Reply(b"", 307, Location="http://127.0.0.1:1/"), r"307; check base_url"),
        (
            Reply({"error": {"message": "pay", "code": "insufficient_quota"}}, 429),
            r"429 \(pay\); .*quota is used up",
        ),
        (Reply({"error": {"message": "no balance"}}, 402), r"402 \(no balance\); .*quota is used up"),
    ],
    ids=["key", "right", "model", "redirect", "quota", "balance"],
)
def test_what_no_row_can_help_ends_the_stage(server: Server, reply: Reply, says: str) -> None:
    with pytest.raises(InputError, match=rf"^endpoint {server.url}: {says}") as e:
        ask(server, reply)
    assert len(server.bodies) == 1 and "\n" not in str(e.value)


def test_an_endpoint_that_is_not_there_ends_the_stage(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(
        InputError, match=r"nothing answers there \(4 attempts in .*; start it, or correct base_url"
    ):
        ask(server, Reply())


# ------------------------------------------------------------------------------------------------ the key


def test_a_missing_key_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match=r"environment variable OPENAI_API_KEY is not set, but https://x"):
        make_engine(model("m", EngineConfig(kind="openai", base_url="https://x.example/v1")), gpu=False)
    without = EngineConfig(kind="openai", base_url="https://x.example", api_key_env="")
    make_engine(model("m", without), gpu=False)


def test_no_key_goes_over_http_unless_it_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ask(server, Reply(completion()), api_key_env=None)
    ask(server, Reply(completion()), api_key_env="OPENAI_API_KEY")
    assert server.keys == [None, f"Bearer {KEY}"]
    with pytest.raises(InputError, match=r"needs a key \(401\); name its variable with api_key_env"):
        ask(server, Reply(b"", 401), api_key_env=None)


@pytest.mark.parametrize("bad", [f"{KEY}\nX: y", f"Bearer {KEY}", f"{KEY}é"])
def test_a_key_that_is_none_is_not_repeated(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setenv("TEST_KEY", bad)
    with pytest.raises(InputError, match="variable TEST_KEY holds characters that no key has") as e:
        OpenaiEngine(model("m", endpoint("http://127.0.0.1:1")))
    assert KEY not in str(e.value)


def test_the_key_is_nowhere(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Not in logs at their most talkative, in errors with what they are chained to, in reprs, or in what is sent."""
    caplog.set_level(logging.DEBUG)
    echo = {"error": {"message": f"you sent Authorization: Bearer {KEY} and that is wrong"}}
    errors: list[Exception] = []
    for reply in (
        *(Reply(echo, status) for status in (200, 400, 401, 403, 404, 418, 429, 500)),
        Reply(KEY.encode()),
        Reply(drop=True),
        Reply(completion(), seconds=0.5),
    ):
        with pytest.raises((RowError, InputError)) as e:
            ask(server, reply, timeout_s=0.3, attempts=2)
        errors.append(e.value)
    shown = [caplog.text, *("".join(traceback.format_exception(e)) for e in errors)]
    shown += [str(pickle.dumps(e)) for e in errors]
    engine = OpenaiEngine(model("judge-1", endpoint(server.url)))
    shown += [repr(engine), repr(engine.config), engine.config.model_dump_json()]
    assert server.keys and set(server.keys) == {f"Bearer {KEY}"}
    assert not [text for text in shown if KEY in text]
    assert all(e.__cause__ is None for e in errors), "the HTTP library's errors hold the request's headers"
    assert not any(KEY in json.dumps(body) for body in server.bodies)


# ------------------------------------------------------------------------------------------------ configuration


def load(out: Path, *overrides: str) -> RunConfig:
    return load_config("errand-town", list(overrides), out=str(out))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine={kind: openai, base_url: 'http://x'}", "the policy is trained here.*label.judge.engine"),
        ("label.judge.engine={kind: openai}", "kind=openai needs `base_url`"),
        ("label.judge.engine={base_url: 'http://x'}", "`base_url` is not for kind=vllm; set kind: openai"),
        ("label.judge.engine={kind: openai, base_url: x.example/v1}", r"give http\(s\)://host"),
        (
            f"label.judge.engine={{kind: openai, base_url: 'https://me:{KEY}@x'}}",
            "a key goes to `api_key_env`",
        ),
        (
            f"label.judge.engine={{kind: openai, base_url: 'https://x/v1?key={KEY}'}}",
            "a key goes to `api_key_env`",
        ),
        (f"label.judge.engine={{kind: openai, base_url: 'https://x:{KEY}'}}", "a key goes to `api_key_env`"),
        (
            f"label.judge.engine={{kind: openai, base_url: 'https://x', api_key_env: {KEY}}}",
            "never the key itself",
        ),
        (
            f"label.judge.engine={{kind: openai, base_url: 'https://x', api_key: {KEY}}}",
            "did you mean 'api_key_env'",
        ),
        (
            "label.judge={model: sl, engine: {kind: openai, base_url: 'http://x'}}",
            "label.judge.model=sl is made by this run",
        ),
        ("revise.reviser={engine: {kind: openai}}", "kind=openai needs `base_url`"),
    ],
)
def test_what_an_endpoint_cannot_be_is_said_without_its_secrets(
    tmp_path: Path, override: str, says: str
) -> None:
    with pytest.raises(InputError, match=says) as e:
        load(tmp_path, override)
    assert KEY not in str(e.value)


ENDPOINT = "label.judge.engine={kind: openai, base_url: 'https://x.example/v1/', api_key_env: TEST_KEY}"


def test_check_looks_for_the_key_and_not_for_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "errand-town", "--check", "--out", str(tmp_path / "run")]
    command += ["--set", ENDPOINT, "--set", "label.judge.model=gpt-9"]
    monkeypatch.delenv("TEST_KEY", raising=False)
    assert main(command) == 2
    assert "environment variable TEST_KEY is not set" in capsys.readouterr().err
    monkeypatch.setenv("TEST_KEY", KEY)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "ok: nothing was started" in out and KEY not in out
    assert not [line for line in out.splitlines() if line.startswith("label")], "it needs no memory here"


def test_check_looks_for_the_revisers_key_if_it_is_about_to_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reviser = ENDPOINT.replace("label.judge.engine=", "revise.reviser.engine=")
    config = load(tmp_path / "run", reviser, "revise.reviser.model=gpt-9")
    monkeypatch.delenv("TEST_KEY", raising=False)
    pipeline.check_inputs(config, ["sft"])
    with pytest.raises(InputError, match="environment variable TEST_KEY is not set"):
        pipeline.check_inputs(config, ["revise"])


def test_item_38_scores_that_an_endpoint_cannot_tell_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    (tmp_path / "own.yaml").write_text(
        'name: own\nextends: general\nscores: ["0", " 0", "2", "3", "4", "5", "6", "7", "8", "9"]\n'
    )
    set_ = f"templates={tmp_path}/own.yaml"
    pipeline.check_inputs(load(tmp_path / "run", ENDPOINT, set_))  # which no vote asks for
    with pytest.raises(InputError, match=r"'0', ' 0'.* differ in spaces alone"):
        pipeline.check_inputs(load(tmp_path / "run", ENDPOINT, set_, "label.judge.ask=response"))


def test_a_stage_with_an_endpoint_is_hashed_by_what_answers(tmp_path: Path) -> None:
    def label(*overrides: str) -> str:
        return own_inputs(Run(load(tmp_path, *overrides)), "label")["label"]

    plain = load(tmp_path)
    named = {"model", "engine", "templates", "constitution"}
    assert set(result_settings(plain.label.judge)) == set(plain.label.judge.model_dump()) - named
    own = (
        f"label.judge.engine={{dtype: float32, kv_cache_mb: 99, max_model_len: {plain.engine.max_model_len}}}"
    )
    assert label(own) == label(), "an engine here is how, not what"
    assert label("label.judge.engine={max_model_len: 99}") != label(), "other prompts fit its context"
    assert label("label.judge.engine={quantization: fp8}") != label(), "rounded weights say something else"
    here, there = label(ENDPOINT), label(ENDPOINT.replace("x.example", "y.example"))
    assert len({label(), here, there}) == 3
    assert label(ENDPOINT, "label.judge.engine.max_num_seqs=3", "label.judge.engine.timeout_s=9") == here


def test_the_feedback_model_alone_is_elsewhere(tmp_path: Path) -> None:
    run = Run(load(tmp_path, ENDPOINT, "label.judge.model=gpt-9"))
    judge = run.resolve_model(run.config.label.judge)
    assert judge.fetch() == "gpt-9" and judge.engine.base_url == "https://x.example/v1"
    assert run.resolve_model("base").engine.kind == "vllm" and Path(run.model("base")).is_dir()


def test_template_arguments_are_sent_only_where_they_are_given(server: Server) -> None:
    server.replies = [Reply(completion())]

    async def go(**template_args: Any) -> None:
        engine = OpenaiEngine(model("m", endpoint(server.url), **template_args))
        await engine.chat(ASK, GREEDY)
        await engine.close()

    asyncio.run(go())
    asyncio.run(go(enable_thinking=False))
    plain, given = server.bodies
    assert "chat_template_kwargs" not in plain
    assert given == plain | {"chat_template_kwargs": {"enable_thinking": False}}
