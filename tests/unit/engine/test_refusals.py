"""Which fields an error response refuses: the shapes in which servers say it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cai_ray.engine.refusals import read_refusals, refuses_model, refuses_something

SENT: dict[str, Any] = {
    "model": "m", "messages": [{"role": "user", "content": "hello ?"}], "temperature": 0.7, "max_tokens": 64, "seed": 3,
    "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": True, "top_logprobs": 20,
    "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip


def openai(message: str, param: str | None = None, code: Any = None) -> dict[str, Any]:
    """The shape of OpenAI and Azure, which most servers have in common."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def pydantic(
    *fields: str, kind: str = "extra_forbidden", msg: str = "Extra inputs are not permitted"
) -> list[Any]:
    return [{"type": kind, "loc": ["body", f], "msg": msg, "input": SENT[f]} for f in fields]


NOT_WITH_THIS_MODEL = "Unsupported parameter: '{}' is not supported with this model."
REFUSED: dict[str, tuple[Any, set[str]]] = {
    "parameter of a reasoning model": (
        openai(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
            "instead.",
            "max_tokens",
            "unsupported_parameter",
        ),
        {"max_tokens"},
    ),
    "value of a reasoning model": (
        openai(
            "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is "
            "supported.",
            "temperature",
            "unsupported_value",
        ),
        {"temperature"},
    ),
    "what to use instead": (openai("Please use `max_completion_tokens` instead of `max_tokens`."), {"max_tokens"}),
    "param alone": (openai("Invalid request.", "top_p"), {"top_p"}),
    "message alone": (openai(NOT_WITH_THIS_MODEL.format("seed")), {"seed"}),
    "several in one message": (
        openai("Unrecognized request arguments supplied: min_p, repetition_penalty, top_k"),
        {"min_p", "repetition_penalty", "top_k"},
    ),
    "unknown parameter": (openai("Unknown parameter: 'top_k'.", "top_k", "unknown_parameter"), {"top_k"}),
    "the code says it": (openai("Bad value for seed", None, "unsupported_parameter"), {"seed"}),
    "param None as text": (openai("seed is not supported", "None", "400"), {"seed"}),
    "detail of pydantic": ({"detail": pydantic("seed", "min_p")}, {"seed", "min_p"}),
    "detail in a message": (
        {"object": "error", "message": {"detail": pydantic("seed")}, "type": "invalid_request_error", "code": None},
        {"seed"},
    ),
    "detail as text in a message": (
        {"object": "error", "message": json.dumps({"detail": pydantic("top_k")}), "code": "1000"},
        {"top_k"},
    ),
    "detail as Python's text": (
        {"object": "error", "message": str(pydantic("seed")).replace("['body', 'seed']", "('body', 'seed')")},
        {"seed"},
    ),
    "an error of pydantic as text": (
        openai(
            "1 validation error for ChatCompletionRequest\nmin_p\n  Extra inputs are not permitted "
            "[type=extra_forbidden, input_value={'seed': 'logprobs'}, input_type=dict]"
        ),
        {"min_p"},
    ),
    "path as param": (openai("Input should be greater than or equal to 0", "body.top_k"), {"top_k"}),
    "field after a comma": (openai("Extra inputs are not permitted, field: 'min_p', value: 0"), {"min_p"}),
    "property": ({"error": {"message": "property 'chat_template_kwargs' is unsupported, did you mean 'seed'?"}},
                 {"chat_template_kwargs"}),
    "error is text": (
        {"error": "Input validation error: `top_p` must be > 0.0 and < 1.0", "error_type": "validation"},
        {"top_p"},
    ),
    "camel case": (
        {"code": "Client specified an invalid argument", "error": "Argument not supported on this model: topK"},
        {"top_k"},
    ),
    "a list of errors": (
        [{"error": {"code": 400, "status": "INVALID_ARGUMENT", "message":
          'Invalid JSON payload received. Unknown name "top_k": Cannot find field.\n'
          'Invalid JSON payload received. Unknown name "min_p": Cannot find field.'}}],
        {"top_k", "min_p"},
    ),
    "fields that would be right": (
        "Failed to deserialize the JSON body into the target type: unknown field `min_p`, expected one of `model`, "
        "`messages`, `temperature`, `seed` at line 1 column 99",
        {"min_p"},
    ),
    "a router's list": (
        openai(
            "litellm.UnsupportedParamsError: x does not support parameters: ['logprobs', 'top_logprobs'], for model=y. "
            "To drop these, set `litellm.drop_params=True`",
            "None",
            "400",
        ),
        {"logprobs", "top_logprobs"},
    ),
    "a router's model": (
        openai("gpt-5 models don't support temperature=0.7. Only temperature=1 is supported."),
        {"temperature"},
    ),
    "what a provider told a router": (
        {"error": {"message": "Provider returned error", "code": 400, "metadata":
                   {"raw": json.dumps(openai(NOT_WITH_THIS_MODEL.format("seed"), "seed")), "provider_name": "x"}}},
        {"seed"},
    ),
    "a provider's JSON in a sentence": (
        openai('Error from provider (x): {"error":{"message":"property \'top_k\' is unsupported"}}'),
        {"top_k"},
    ),
    "plain text": ("temperature is not supported", {"temperature"}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_refused_fields_are_read_from_any_shape(name: str) -> None:
    body, fields = REFUSED[name]
    text = body if isinstance(body, str) else json.dumps(body)
    assert set(read_refusals(text, SENT)) == fields
    assert not refuses_model(text)


OF_THE_ROW: dict[str, Any] = {
    "too long": openai(
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens. Please "
        "reduce the length of the messages.",
        "messages",
        "context_length_exceeded",
    ),
    "filtered": {"error": {"message": "The response was filtered due to the prompt triggering the content management "
                           "policy.", "type": None, "param": "prompt", "code": "content_filter", "status": 400}},
    "a message's field": {"detail": [{"type": "extra_forbidden", "loc": ["body", "messages", 0, "name"], "msg":
                                      "Extra inputs are not permitted", "input": "seed"}]},
    "a message's content": {"error": {"message": "'messages.0' : for 'role:user' the following must be satisfied"
                                      "[('messages.0.content' : value must be a string)]"}},
    "what was sent": {"detail": [{"type": "value_error", "loc": ["body"], "input": SENT,
                                  "msg": "Value error, the roles must alternate"}]},
    "a role": openai("Unsupported value: 'messages[0].role' does not support 'system' with this model.",
                     "messages[0].role", "unsupported_value"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_ROW)
def test_what_concerns_the_row_refuses_no_field(name: str) -> None:
    text = json.dumps(OF_THE_ROW[name])
    assert read_refusals(text, SENT) == {}
    assert not refuses_something(text)


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 64. This model supports at most 32 completion tokens, whereas you provided 64.",
        "'max_tokens' or 'max_completion_tokens' is too large: 64. This model's maximum context length is 32 tokens "
        "and your request has 30 input tokens (64 > 32 - 30).",
        "max_tokens may not be more than 32",
    ],
)
def test_an_answer_that_would_be_too_long_is_no_refusal_of_the_field(message: str) -> None:
    refused = read_refusals(json.dumps(openai(message)), SENT)
    assert set(refused) == {"max_tokens"} and not refused["max_tokens"].unsupported


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        (openai("Cannot request more than 5 logprobs."), 5),
        (openai("Requested sample logprobs of 20, which is greater than max allowed: 8 (parameter=logprobs, value=20)",
                "logprobs", 400), 8),
        (openai("Invalid 'top_logprobs': integer above maximum value. Expected a value <= 11, but got 20 instead.",
                "top_logprobs", "integer_above_max_value"), 11),
        (openai("20 is greater than the maximum of 5 - 'top_logprobs'", "top_logprobs"), 5),
        (openai("gpt-4-0613: top_logprobs must be between 0 and 5"), 5),
        (openai("top_logprobs must be in range 0-5."), 5),
        ({"detail": pydantic("top_logprobs", kind="less_than_equal",
                             msg="Input should be less than or equal to 5")}, 5),
        (openai("top_logprobs is too large"), None),
        (openai("Unsupported parameter: 'top_logprobs' is not supported with model x-3.1."), None),
    ],
)  # fmt: skip
def test_the_most_log_probabilities_are_read_from_the_message(
    body: dict[str, Any], limit: int | None
) -> None:
    refused = read_refusals(json.dumps(body), SENT)
    assert {r.limit for r in refused.values()} == {limit} and refused.keys() <= {"logprobs", "top_logprobs"}


def test_an_unknown_model_and_a_word_about_nothing() -> None:
    assert refuses_model(json.dumps(openai("The model `m` does not exist", None, "model_not_found")))
    for vague in (
        "",
        "Bad Request",
        json.dumps({"detail": "invalid parameters"}),
        "<html>400 Bad Request</html>",
    ):
        assert refuses_something(vague) and read_refusals(vague, SENT) == {}


@pytest.mark.parametrize(
    "hostile", ["[" * 50_000, '{"error": ' * 40 + "1" + "}" * 40, "\x00", '{"error": null}', "[1, 2]", "3"]
)
def test_nonsense_refuses_nothing(hostile: str) -> None:
    assert read_refusals(hostile, SENT) == {}
