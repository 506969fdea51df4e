"""Answers that a token limit cut off within a character."""

from __future__ import annotations

from typing import Any

import pytest

from cai_ray.prompts.cut import decode_answer, without_incomplete_end
from cai_ray.prompts.renderer import Renderer
from tests import tiny

TEXTS = [
    "你好，北京。",
    "Happy birthday 🎉🎂🥳!",
    "naïve café – “quoted”",
    "👩‍👩‍👧‍👦 family, हिन्दी, العربية",
    "é" * 3 + "🎈" * 3,
    "plain words alone",
    "a mark � inside, and words after it 🎈",
    "at the end �",
    "�� two, and an emoji 🎉",
]


def byte_level() -> Any:
    return tiny.tokenizer()


def byte_fallback() -> Any:
    """As Llama 2 and Mistral v1: characters that are not in the vocabulary are bytes of their own."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", *map(chr, range(33, 127)), "�", "你", "é"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
    return made


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def renderer(request: pytest.FixtureRequest) -> Renderer:
    return Renderer(request.param())


@pytest.mark.parametrize("text", TEXTS)
def test_a_cut_answer_ends_with_a_complete_character(renderer: Renderer, text: str) -> None:
    ids = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert renderer.decode(ids) == text, "the test's tokenizer keeps the text"
    length = 0
    for end in range(1, len(ids) + 1):
        cut = decode_answer(renderer, ids[:end], truncated=True)
        assert text.startswith(cut), "nothing but what the model wrote"
        assert len(cut) >= length, "no complete character is lost"
        assert decode_answer(renderer, ids[:end], truncated=False) == renderer.decode(ids[:end])
        length = len(cut)
    assert length == len(text)


def test_a_character_that_the_model_wrote_itself_stays(renderer: Renderer) -> None:
    ids = renderer.tokenizer("the mark �", add_special_tokens=False)["input_ids"]
    assert decode_answer(renderer, ids, truncated=True) == "the mark �"


def test_an_answer_of_nothing_but_an_incomplete_character_is_empty(renderer: Renderer) -> None:
    ids = renderer.tokenizer("🎈", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1 and decode_answer(renderer, ids[:1], truncated=True) == ""
    assert decode_answer(renderer, [], truncated=True) == ""


@pytest.mark.parametrize(
    ("text", "kept"),
    [("北京�", "北京"), ("🎉���", "🎉"), ("a � b", "a � b"), ("", ""), ("line\n�", "line\n")],
)
def test_where_the_bytes_are_not_seen_the_marks_at_the_end_go(text: str, kept: str) -> None:
    assert without_incomplete_end(text) == kept
