"""Introductions and afterwords that models write around a revision: docs/method.md item 6."""

from __future__ import annotations

import time

import pytest

from cai_ray.judging.quality import revision_alone
from cai_ray.prompts.load import load_templates

GENERAL = load_templates("general")
TEXTS = (
    "I won't help with that, her letters are private.",
    "Here is a list:\n- one\n- two",
    "Ask her first.\n\nThen wait (it may take a while).",
)


@pytest.mark.parametrize(
    "introduction",
    [
        "Here is the new response:\n\n",
        "Here's a revised version of my answer that removes the threat:\n\n",
        "Sure! Here is a revised response:\n",
        "Sure! Here is the rewritten response, with the dangerous parts removed:\n\n",
        "Certainly! Below is the revised response:\n\n",
        "The revised response is:\n\n",
        "My revised response would be:\n",
        "Here is my revised answer:\n\n",
        "Here's my attempt at a revised response:\n\n",
        "I've revised the response to remove harmful content:\n\n",
        "I have rewritten the response as follows:\n\n",
        "Here is a possible revision:\n\n",
        "Here is one way to revise the response:\n\n",
        "A revised response could be:\n\n",
        "Here is a revised version:\n\n",
        "New response:\n",
        "Assistant (revised):\n",
        "**Revised response:**\n\n",
        "### New response\n\n",
        "Final revised response:\n\n",
        "Thank you for pointing that out. Here's a revised response:\n\n",
        "You're right, that was rude. Here is a more respectful revised response:\n\n",
        "Here is a revised response that is more ethical:\n\n",
        "Here’s how I would revise the response:\n\n",
        "**Here is the revised response:**\n\n",
        "Here is the revised response:\n\n---\n\n",
        "Okay, here is an updated answer that keeps her mail private:\n\n",
        "Here is the revision you asked for:\n\n",
        "Here is my response:\n\n",
        "Here's the response:\n\n",
        "I apologize for my previous response. Here is a revised response:\n\n",
        "Here is the revised response: ",
        "Here is a rewritten, kinder response:\n\n",
        "Here is a safer and more helpful revised response:\n\n",
        "Here is a version of the response that avoids blame:\n\n",
        "Updated response:\n\n",
        "Here is the response rewritten to be kind:\n\n",
        "Here's a new response that doesn't help with the lock:\n\n",
        "I'd rewrite the response as follows:\n\n",
        "Revision #2:\n\n",
        "Of course! I'd be happy to help. Here is a revised response:\n\n",
        "Here is my attempt to revise the response:\n\n",
        "Here's a rewrite of my answer:\n\n",
        "A revised version of the response might be:\n\n",
        "Suggested revision:\n",
        "[Revised response]\n\n",
        "My response:\n",
        "Here is the response I would give instead:\n\n",
        "Revised:\n\n",
        "Here is the new response, written to the person and nothing else:\n\n",
        "Here is the rewritten answer (without the threat):\n\n",
        "Understood. Here is the improved response, which respects your flatmate:\n\n",
        "Here is a revised response to your question about locks:\n\n",
    ],
)
def test_an_introduction_is_removed(introduction: str) -> None:
    for text in TEXTS:
        assert revision_alone(introduction + text, GENERAL) == text


@pytest.mark.parametrize(
    "afterword",
    [
        "\n\n(Note: I removed the part about the lock.)",
        "\n\nNote: I have removed the harmful instructions.",
        "\n\n(I removed the instructions for picking the lock.)",
        "\n\nI hope this helps; I removed the threat.",
        "\n\nI hope this revised response is better.",
        "\n\n*Note: The revised response no longer explains how to guess a password.*",
        "\n\nThis revised response avoids giving harmful advice.",
        "\n\nThis response acknowledges the person's worry without harm.",
        "\n\nChanges made:\n- Removed the harmful advice\n- Added a kinder tone",
        "\n\n---\n\nNote: I rephrased the answer.",
        "\n\nPlease note that I have removed the unethical suggestion.",
        "\n\nI have revised the response to be more respectful.",
        "\n\nExplanation: The revised response protects her privacy.",
        "\n\nLet me know if you would like any further revisions.",
        " (Note: I removed the threat.)",
        "\n\n[Note: This response was rewritten to avoid harmful content.]",
        "\n\n**Note:** I've removed the offensive language and added a suggestion.",
        "\n\nIn this revised response, I have removed any mention of violence.",
        "\n\nNote: I removed the joke about her weight.\n\nI hope this response helps!",
        "\n(Revised to remove harmful content.)",
        "\n\n(This response is more respectful.)",
        "\n\nI have made the response more respectful.",
        "\n\nI've rephrased my answer so that it does not blame her.",
        "\n\n(I left out the details of the lock.)",
        "\n\nLet me know if you'd like me to revise it further!",
        "\n\nThis revision removes the unsafe advice.",
        "\n\nThe new response does not contain harmful content.",
        "\n\nI hope this helps! I've removed the offensive language.",
        "\n\n(I have rewritten the response so that it is kinder.)",
        "\n\n(Note: In this revision, the instructions were removed.)",
    ],
)
def test_an_afterword_is_removed(afterword: str) -> None:
    for text in TEXTS:
        assert revision_alone(text + afterword, GENERAL) == text
        assert revision_alone("Here is the revised response:\n\n" + text + afterword, GENERAL) == text


@pytest.mark.parametrize(
    "written",
    [
        'Here is the revised response:\n\n"{}"',
        "Here is the new response: “{}”",
        "**Revised response:** **{}**",
        "Revised response:\n\n> {}",
        "Here is the revised response:\n\n---\n\n{}\n\n---\n\n(Note: I removed the threat.)",
    ],
)
def test_what_sets_an_introduced_revision_apart_goes_with_the_introduction(written: str) -> None:
    assert revision_alone(written.format(TEXTS[0]), GENERAL) == TEXTS[0]


@pytest.mark.parametrize(
    "text",
    [
        "Here is a recipe:\n- eggs",
        "Here is a list of what to check:\n- tyres",
        "Here is a revised version of your letter:\n\nDear Ms Gray,",
        "Here is a revised reply you could send to your landlord:\n\nDear Sir,",
        "Here is the answer to your riddle: a towel.",
        "Here is a response time chart:\n10 ms",
        "Here's the new answer key for chapter 3:\n1. b",
        "Here is an improved version of your paragraph:\n\nIt rained.",
        "Here is a better way to ask her:\n\nMay I?",
        "Here is a new version of the song:\n\nLa la",
        "Sure, here is a plan:\n1. Rest.",
        "The new response team will meet: on Monday.",
        "Response times are measured in milliseconds:\n10",
        "My answer is: no.",
        "New answers are welcome.",
        "I have revised my opinion of him: he is kind.",
        "Here's a response letter template:\n\nDear X,",
        "This is a new answer to an old problem: wait.",
        "Here is my answer: no.",
        "Use two eggs. (It serves four.)",
        "Bring a coat.\n\nNote: it may rain.",
        "Whisk it.\n\n(Note: I used almond milk.)",
        "Mix it.\n\nNote: this dish contains nuts.",
        "He looked at me.\n\nI removed the old parts and walked away.",
        "She was gone.\n\nI changed the tone of my voice and walked away.",
        "I have revised my opinion of him.",
        "It is kept secret.\n\nI hope this helps!",
        "Wait a day.\n\nLet me know if you have any questions.",
        "Ask her.\n\nThe answer is yes.",
        "It swells.\n\nThe response of the immune system is quick.",
        "Call them.\n\nPlease note that the office is closed on Sunday.",
        "Run it.\n\n(See also the manual.)",
        "Sort it.\n\nThe new version is faster.",
        "Dear Ms Gray,\n\nI have removed the details that you asked me to remove from your letter.",
        "I won't help with that. Here is a revised response:\nno",
        "“Quoted.”",
        '"To be or not to be."',
        "(An aside as a whole.)",
        "Note: I removed the threat.",
        "**Bold.**",
        "Write to him.\n\nNote: Keep a copy of his answer.",
        "Cook it.\n\n(I removed the seeds, so it is less hot.)",
        "Sign it.\n\nThis version replaces all earlier ones.",
        "Yes.\n\nExplanation: water boils at 100 degrees.",
        "A list:\n\n---",
        "I made a statement.\n\nI have made a statement to the police.",
        "Dear editor,\n\nI have removed the second paragraph, as you asked.",
        "Dear Tom,\n\nI have changed my answer: I will come.",
        "Boil it.\n\nI have updated the details on the page.",
        "Tell him so.\n\nLet me know if he answers.",
        "Revised rules apply from May:\n1. Knock.",
        "(This is an aside.)",
        "A poem:\n\n(This is not a response.)",
    ],
)
def test_what_belongs_to_a_revision_stays_whole(text: str) -> None:
    assert revision_alone(text, GENERAL) == text


@pytest.mark.parametrize(
    "text",
    ["Here is the new response:", "Sure! Here is my response:\n", "I have revised my answer to be kind:"],
)
def test_a_revision_that_is_all_introduction_is_empty(text: str) -> None:
    assert revision_alone(text, GENERAL) == ""


def test_long_texts_take_no_time() -> None:
    started = time.process_time()
    for text in (
        "(" * 20_000 + ")" * 20_000,
        "Note: " + "i removed " * 20_000,
        "\n".join(["I hope this helps"] * 5_000),
        "Here is a " + "revised, " * 20_000,
        "Sure " * 20_000,
        "> " * 20_000,
    ):
        revision_alone(text, GENERAL)
    assert time.process_time() - started < 5
