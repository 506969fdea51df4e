"""Exact ids for tokenizers whose licence or size keeps their packages out of the development dependencies."""

from __future__ import annotations

import pytest

from cai_ray.prompts.renderer import Renderer
from tests.tokenizers import CONVERSATIONS, messages, tokenizer

pytestmark = pytest.mark.real


def test_llama_3_has_the_ids_of_the_whole_template() -> None:
    pytest.importorskip("llama_models", reason="pip install --no-deps llama-models==0.3.0")
    words = tokenizer("llama-3")
    made = Renderer(words)
    for system in (None, "Be kind.\n", ""):
        for turns in CONVERSATIONS.values():
            talk = messages(turns[:1], system)
            asked = words.apply_chat_template(
                talk, tokenize=True, return_dict=False, add_generation_prompt=True
            )
            assert made.prompt_ids(talk) == asked, talk
            answered = messages(turns[:2], system)
            right = words.apply_chat_template(answered, tokenize=True, return_dict=False)
            assert made.dialogue_ids(answered)[0] == right, answered
