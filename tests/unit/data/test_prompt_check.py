"""What `--check` says of prompts: docs/method.md item 38."""

import time
from typing import Any

import pytest

from cai_ray.data.prompt_check import SAMPLE, PromptCheck
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from tests import tiny

STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    + tiny.CHATML.removeprefix("{% for m in messages %}")
)


def prompt(text: str, *before: str) -> dict[str, Any]:
    roles = [*before, "user"]
    return {"messages": [{"role": role, "content": text} for role in roles]}


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny.tokenizer()


def lines(words: Any, prompts: list[dict[str, Any]], context: int = 4096, written: int = 512) -> list[str]:
    check = PromptCheck(Renderer(words, STRICT), load_templates("general"), context)
    return list(check.lines("prompts", prompts, written))


def test_prompts_that_the_template_refuses_are_counted(words: Any) -> None:
    prompts = [prompt("a")] * 3 + [prompt("b", "system")] * 2 + [prompt("b", "system", "user", "assistant")]
    (refused, lengths) = lines(words, prompts)
    assert refused.startswith("prompts: 3 of 6 prompts cannot be rendered, most often: ")
    assert "no system turn" in refused
    assert lengths.startswith("prompts: 3 prompts; tokens in the middle")


def test_prompts_that_leave_too_little_of_the_context_are_counted(words: Any) -> None:
    renderer = Renderer(words, STRICT)
    long = prompt("why is it kind ? " * 40)
    length = len(renderer.prompt_ids(load_templates("general").answer_messages(long["messages"])))
    prompts = [prompt("a")] * 9 + [long]
    assert len(lines(words, prompts, length + 50, 50)) == 1, "it fits"
    (_, told) = lines(words, prompts, length + 49, 50)
    assert told == (
        f"prompts: 1 of 10 prompts are longer than {length - 1} tokens, which the context of {length + 49} leaves "
        f"beside 50 to be written; the longest has {length}"
    )


def test_texts_that_cannot_be_encoded_are_counted(words: Any) -> None:
    (told, _) = lines(words, [prompt("a"), prompt("half \ud800")])
    assert told.startswith("prompts: 1 of 2 prompts cannot be encoded, most often: text is not valid Unicode")


def test_many_prompts_take_seconds_and_a_sample_is_called_one(words: Any) -> None:
    """The one long prompt of 200,000 is found although the sample misses it."""
    prompts = [prompt(f"what is the way to number {n} ?") for n in range(200_000)]
    prompts[777] = prompt("word " * 5000)
    prompts[778] = prompt("b", "system")
    started = time.process_time()
    refused, lengths, long = lines(words, prompts)
    assert time.process_time() - started < 20
    assert "1 of 200000 prompts cannot be rendered" in refused
    assert "(a sample of " in lengths and int(lengths.split("a sample of ")[1].split()[0]) <= SAMPLE
    assert long.startswith("prompts: 1 of 199999 prompts are longer than")
