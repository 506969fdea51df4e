"""Exact ids for tokenizers whose licence or size keeps their packages out of the development dependencies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cai_ray.prompts.renderer import Renderer
from tests.real import gguf, smollm2
from tests.real.packages import GEMMA_3, LLAMA_3, SMOLLM2, fetched, file_in
from tests.tokenizers import CONVERSATIONS, messages, tokenizer

pytestmark = pytest.mark.real

_GEMMA_3 = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""A short form of our own of the template of google/gemma-3-4b-it, for plain conversations."""


def llama_3(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(fetched(LLAMA_3)))
    return tokenizer("llama-3")


def smollm2_words(monkeypatch: pytest.MonkeyPatch) -> Any:
    return smollm2.tokenizer(gguf.read(file_in(SMOLLM2, "*.gguf")).values)


def gemma_3(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A SentencePiece vocabulary of 262,144 pieces, as transformers converts it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    values = gguf.read(file_in(GEMMA_3, "*.gguf.part00")).values
    pieces, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    scores = dict(zip(pieces, values["tokenizer.ggml.scores"], strict=True))
    merges = generate_merges(vocab, scores)
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    named = zip(pieces, kinds, strict=True)
    # 3: control tokens; 4: pieces that stand for themselves, such as runs of line breaks.
    added = [(piece, kind) for piece, kind in named if kind in (3, 4)]
    backend.add_special_tokens([AddedToken(p, normalized=False) for p, kind in added if kind == 3])
    backend.add_tokens([AddedToken(p, normalized=False) for p, kind in added if kind == 4])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<end_of_turn>", unk_token="<unk>"
    )
    made.chat_template = _GEMMA_3
    return made


@pytest.mark.parametrize("build", [llama_3, smollm2_words, gemma_3])
def test_a_real_tokenizer_has_the_ids_of_the_whole_template(
    build: Callable[[pytest.MonkeyPatch], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = build(monkeypatch)
    made = Renderer(words)
    for talk in talks("user"):
        asked = words.apply_chat_template(talk, tokenize=True, return_dict=False, add_generation_prompt=True)
        assert made.prompt_ids(talk) == asked, talk
    equal = merged = 0
    for talk in talks("assistant"):
        ids, prompt = made.dialogue_ids(talk)[0], made.prompt_ids(talk[:-1])
        right = words.apply_chat_template(talk, tokenize=True, return_dict=False)
        right = right[: len(right) - right[::-1].index(made.end_id)]  # some write on behind the end
        if right[: len(prompt)] == prompt:
            assert ids == right, talk
            equal += 1
        else:  # the border lies within a token of the whole text; what sampling saw is what counts
            assert words.decode(ids) == words.decode(right), talk
            merged += 1
    assert equal >= 2 * merged


def talks(last: str) -> list[list[dict[str, str]]]:
    """All conversations that end with a turn of `last`."""
    every = (messages(turns, s) for s in (None, "Be kind.\n", "") for turns in CONVERSATIONS.values())
    return [talk[: i + 1] for talk in every for i, m in enumerate(talk) if m["role"] == last]
