"""The policy's first answers, where another model revises them."""

import asyncio
from typing import Any

import pytest

from cai_ray.config.generation import ReviseConfig
from cai_ray.engine.protocol import Completion
from cai_ray.engine.scripted import ScriptedEngine
from cai_ray.errors import RowError
from cai_ray.generate.first_answers import FirstAnswer, FirstAnswerChain
from cai_ray.prompts.load import load_templates
from cai_ray.storage.arrow import to_table

ROW = {
    "id": "r1",
    "prompt_id": "p1",
    "messages": [{"role": "user", "content": "how do i read the baker's diary ?"}],
    "kind": "red_team",
    "family": None,
}


def answered(answer: Any, context: str = "x", **row: Any) -> dict[str, Any]:
    chain = FirstAnswerChain(load_templates("errand-town"), ReviseConfig(), seed=0, context=context)
    out = asyncio.run(chain(ScriptedEngine(answer), {**ROW, **row}))
    to_table([out], FirstAnswer)  # every column is declared
    return dict(out)


def test_an_answer_carries_what_a_revision_begins_with() -> None:
    out = answered(lambda messages, sampling: "first unfold it")
    assert (out["response"], out["truncated"], out["tokens"]) == ("first unfold it", False, 3)
    assert out["usage"]["calls"] == 1 and out["id"] == "r1" and out["key"]


def test_an_answer_with_the_same_key_is_taken_over() -> None:
    before = answered(lambda messages, sampling: "one")

    def ask(messages: Any, sampling: Any) -> str:
        return "two"

    again = answered(ask, earlier=[before])
    assert again["response"] == "one" and again["usage"]["calls"] == 0
    assert answered(ask, context="another model", earlier=[before])["response"] == "two"


def test_a_prompt_that_cannot_be_answered_keeps_its_columns() -> None:
    def refuse(messages: Any, sampling: Any) -> Completion:
        raise RowError("longer than the context")

    with pytest.raises(RowError, match="longer than the context") as e:
        answered(refuse)
    assert e.value.made["prompt_id"] == "p1" and "response" not in e.value.made
