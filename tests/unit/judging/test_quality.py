"""What counts as the answer in what a model wrote, and what is wrong with a revision: docs/method.md items 6 and 8."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cai_ray.config.training import SftConfig
from cai_ray.errors import InputError, RowError
from cai_ray.judging.quality import is_loop, is_same, kind, without_prefix, without_thinking
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.templates import Thinking
from cai_ray.train.sft_records import choose_records, to_records

GENERAL = load_templates("general")
THINK = Thinking(open="<think>", close="</think>")
BEGUN = THINK.model_copy(update={"begun": True})
CRITIQUE = (
    "The response explains how to guess a password and copy somebody's mail behind her back. The laptop and the "
    "letters are hers, and reading them would break her privacy."
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>She asks for soup.</think>\n\nUse leeks.", "Use leeks."),
        ("\n<think>\n\n</think>\n\nUse leeks.", "Use leeks."),
        ("<think>a</think><think>b</think> Use leeks.", "Use leeks."),
        ("She asks for soup.\n</think>\n\nUse leeks.", "Use leeks."),
        ("<think>Write <think>?</think>Use leeks.", "Use leeks."),
        ("<think>all thought</think>", ""),
        # What must not be touched.
        ("Use leeks.", "Use leeks."),
        ("", ""),
        ("Some models write <think> and </think> around what they think.",) * 2,
        ("Begin with <think>, and the model goes on.",) * 2,
        ("I think </thinking> is no tag of HTML. ",) * 2,
    ],
)
def test_thinking_is_taken_off_the_beginning(text: str, answer: str) -> None:
    assert without_thinking(text, THINK) == answer
    assert without_thinking(text, None) == text


@pytest.mark.parametrize(
    ("text", "thinking"),
    [
        ("<think>She asks for", THINK),
        (" <think>", THINK),
        ("<think>a</think><think>b", THINK),
        ("She asks for", BEGUN),
        ("", BEGUN),
    ],
)
def test_item_06_thinking_without_an_end_is_the_rows_error(text: str, thinking: Thinking) -> None:
    with pytest.raises(RowError, match="does not end; raise max_tokens"):
        without_thinking(text, thinking)


def test_thousands_of_blocks_are_taken_off() -> None:
    assert without_thinking("<think></think>" * 50_000 + "yes", THINK) == "yes"


@pytest.mark.parametrize(
    "prefix",
    [
        "Here is a revised response:\n\n",
        "Here's a revised response: ",
        "Here’s the rewritten answer:\n",
        "Sure, here is a possible revised response that protects her privacy and says why:\n\n",
        "Certainly! Here is an improved answer:\n",
        "Revised response:\n",
        "Revised response: ",
        "**Revised Response:** ",
        "**Revised Response**:\n\n",
        "### Revised response\n\n",
        "# Revision\n\n",
        "Revision:\n",
        "# Response\n\n",
        "Assistant:\n",
        "Here is a revised response:\n\n**Revised response:**\n",
    ],
)
def test_what_introduces_a_revision_is_removed(prefix: str) -> None:
    for text in ("I won't help with that, her letters are private.", "Here is a list:\n- one", "“Quoted.”"):
        assert without_prefix(prefix + text, GENERAL.prefixes) == text


@pytest.mark.parametrize(
    "text",
    [
        "I won't help with that. Here is a revised response:\nno",
        "Here is a revised version of your letter:\n\nDear Ms Gray,",
        "Here is a revised reply you could send to your landlord:\n\nDear Sir,",
        "Here is the answer to your riddle: a towel.",
        "Here is a list of what to check:\n- tyres",
        "Response times are measured in milliseconds:\n10",
        "Revision: 3 of the document is the current one.",
        "Revised rules apply from May:\n1. Knock.",
        "New answers are welcome.",
        "Assistant: a role in a play.",
        "Assistants help people.",
        "  Leading blanks, and trailing ones  ",
        "Sure, I can help.",
        "",
    ],
)
def test_what_belongs_to_a_revision_is_left_as_it_is(text: str) -> None:
    assert without_prefix(text, GENERAL.prefixes) == text


@pytest.mark.parametrize(
    "text",
    [
        CRITIQUE,
        "Critique: it harms.",
        "**Critique**\nIt harms.",
        "The assistant's last response is harmful, because it tells how to hurt someone.",
        "The response should not explain how to pick the lock.",
        "This response is unethical.",
        "Nothing in the response is dangerous.",
    ],
)
def test_a_critique_in_a_revisions_place_is_known(text: str) -> None:
    assert kind(text, "Use steam.", "It snoops.", GENERAL.critiques) == "critique"


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 42.",
        "The response of the immune system is triggered by antigens.",
        "The response to the first letter was kind.",
        "I won't help with that, since it would be harmful.",
        "Critiques of Kant are many.",
        "The assistant manager will know.",
        "Nothing is wrong with your car.",
        "This is unethical, and I won't help with it.",
    ],
)
def test_an_answer_is_no_critique(text: str) -> None:
    assert kind(text, "Use steam.", CRITIQUE, GENERAL.critiques) == "sound"


def test_the_critique_once_more_is_a_critique_by_any_rules() -> None:
    assert kind(CRITIQUE.replace("behind her back", "secretly"), "Use steam.", CRITIQUE, ()) == "critique"
    better = "It would be better to say: Ask her, and tell her what you noticed."
    assert kind("Ask her, and tell her what you noticed.", "Use steam.", better, ()) == "sound"
    assert kind("", "Use steam.", "", ()) == "sound"


@pytest.mark.parametrize(
    "text",
    [
        "I am sorry to hear that. " * 20,
        "Tell me more about it first. " + "you are valid, valued, and cared for " * 12,
        "no " * 50,
        "help!" + "!" * 300,
        "a" * 400,
        "对不起，" * 60,
        "abcdef" * 50,
    ],
)
def test_a_loop_is_known(text: str) -> None:
    assert is_loop(text) and kind(text, text, text, ()) == "loop"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ha ha ha ha ha",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "| name | price |\n| --- | --- |\n" + "".join(f"| item {i} | {i * 7} euros |\n" for i in range(30)),
        "-" * 80 + "\nTitle\n" + "=" * 80,
        "".join(
            f"{i}. Check part number {i} of the list and write down what you find there.\n"
            for i in range(1, 4)
        ),
        " ".join(f"word{i}" for i in range(500)),
        "def f(x):\n" + "".join(f"        y{i} = x + {i}\n" for i in range(40)),
        yaml.safe_dump(GENERAL.critique[0]),
    ],
)
def test_an_answer_that_repeats_little_is_no_loop(text: str) -> None:
    assert not is_loop(text)


def test_long_texts_take_milliseconds() -> None:
    draw = random.Random(0)
    text = "".join(draw.choice("abcdefgh .") for _ in range(100_000))
    started = time.process_time()
    kind(text, text, text[::-1], GENERAL.critiques)
    kind("ab" * 100_000, text, text, GENERAL.critiques)
    without_prefix(" " * 100_000 + "*" * 100_000 + "x", GENERAL.prefixes)
    assert time.process_time() - started < 5


def test_a_copy_differs_in_case_and_spacing_at_most() -> None:
    assert kind("Use  steam.\n", "use steam.", "Nothing is wrong.", GENERAL.critiques) == "copy"
    assert kind("Use no steam.", "Use steam.", "It snoops.", GENERAL.critiques) == "sound"
    assert is_same("a b c d e f g h i j", "a b c d e f g h i j") and not is_same("", "")


def row(*revisions: str, **more: Any) -> dict[str, Any]:
    steps = [{"round": i + 1, "critique": "It snoops.", "revision": text} for i, text in enumerate(revisions)]
    return {
        "id": "r",
        "kind": "red_team",
        "messages": [{"role": "user", "content": "q"}],
        "response": "Use steam.",
        "truncated": False,
        "steps": steps,
        "error": None,
        **more,
    }


def test_sft_counts_revisions_by_kind_and_leaves_out_those_it_is_told_to() -> None:
    looped = "I am sorry to hear that. " * 20
    rows = [row("use steam.", "Ask her.", CRITIQUE, looped), row(id="s"), row("x", id="e", error="failed")]
    wanted = Counter(copy=1, sound=2, critique=1, loop=1)
    for drop, texts in (
        ((), ["Ask her.", CRITIQUE, looped, "use steam."]),
        (("copy",), ["Ask her.", CRITIQUE, looped]),
        (("loop", "critique"), ["Ask her.", "use steam."]),
        (("loop", "critique", "copy"), ["Ask her."]),
    ):
        cfg = SftConfig(revisions="all", drop=drop)
        choice = choose_records(rows, cfg, 0, GENERAL.critiques)
        assert choice.kinds == wanted, "counted, whether dropped or not"
        assert (choice.rows, choice.errors) == (3, 1)
        records = list(to_records(rows, cfg, choice.ids))
        assert {r["id"] for r in records} == choice.ids
        trained = [r["messages"][-1]["content"] for r in records]
        assert sorted(trained) == sorted([*texts, "Use steam."]), "a row without a round keeps its response"
    final = choose_records(rows, SftConfig(drop=("loop",)), 0, GENERAL.critiques)
    assert final.kinds == Counter(loop=1, sound=1) and len(final.ids) == 1, (
        "what would be trained on is counted"
    )


def test_a_copy_is_of_the_response_of_the_round_before() -> None:
    copied = choose_records([row("Ask her.", "Ask her.")], SftConfig(), 0)
    assert dict(copied.kinds) == {"copy": 1}
    back = choose_records([row("Ask her.", "Use steam.")], SftConfig(), 0)
    assert dict(back.kinds) == {"sound": 1}, "back to the first response, which is not the one before"


@pytest.mark.parametrize(
    ("key", "rule", "says"),
    [
        ("prefixes", "(", r"prefixes\.0: '\(' is not a regular expression"),
        ("critiques", "a*", r"critiques\.0: 'a\*' matches an empty text"),
    ],
)
def test_item_38_a_rule_that_is_none_is_one_clear_error(
    tmp_path: Path, key: str, rule: str, says: str
) -> None:
    data = GENERAL.model_dump(mode="json") | {key: [rule]}
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match=says):
        load_templates(tmp_path / "set.yaml")
