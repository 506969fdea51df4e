"""Ids are those of the model's own template tokenised as a whole, for real tokenizers: docs/prompts.md."""

from __future__ import annotations

from functools import cache

import pytest

from cai_ray.errors import RowError
from cai_ray.prompts.renderer import Renderer
from tests.tokenizers import CONVERSATIONS, FAMILIES, messages, tokenizer

SYSTEMS = {"without": None, "with": "Be kind.\n", "empty": ""}
WITHOUT_SYSTEM = ("mistral-v1", "gemma")
CASES = [
    (family, system, talk)
    for family in FAMILIES
    for system in SYSTEMS
    if system == "without" or family not in WITHOUT_SYSTEM
    for talk in CONVERSATIONS
]


@cache
def renderer(family: str) -> Renderer:
    return Renderer(tokenizer(family))


def whole(family: str, talk: list[dict[str, str]], **args: bool) -> list[int]:
    """What transformers gives for the conversation."""
    return tokenizer(family).apply_chat_template(talk, tokenize=True, return_dict=False, **args)


@pytest.mark.parametrize(("family", "system", "talk"), CASES)
def test_a_prompt_has_the_ids_of_the_whole_template(family: str, system: str, talk: str) -> None:
    turns = CONVERSATIONS[talk]
    turns = turns[: len(turns) - 1 + len(turns) % 2]  # the last turn is the user's
    asked = messages(turns, SYSTEMS[system])
    assert renderer(family).prompt_ids(asked) == whole(family, asked, add_generation_prompt=True)
