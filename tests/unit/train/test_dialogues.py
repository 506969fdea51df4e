"""Conversations as training reads them: docs/method.md items 14, 16, 38."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cai_ray.config.training import TrainConfig
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.files import open_new
from cai_ray.storage.models import context_length
from cai_ray.train.batches import Example
from cai_ray.train.dialogues import Packer, longest_row, pack, render, shuffled, tell_long_rows
from tests import tiny

PLAIN = TemplateSet(
    name="plain",
    transcript={"user": "{content}", "assistant": "{content}"},
    answer=("conversation",),
    critique=("conversation",),
    revision=("conversation",),
    feedback=("conversation",),
    options=("A", "B"),
)
ASK = [{"role": "user", "content": "why is it kind ?"}]


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


def test_rows_come_out_of_the_pack_as_they_went_in():
    rows = [Example([5, 6, 7], [0, 1, 1]), Example([8, 9], [0, 1]), Example([1, 2, 3, 4], [0, 0, 0, 1])]
    data = pack(rows)
    assert [data[i] for i in range(len(data))] == rows
    assert data.lengths == [3, 2, 4]
    assert data.sha == pack(rows).sha != pack(rows[:2]).sha
    assert data.sha != pack([rows[0]._replace(mask=[0, 0, 1]), *rows[1:]]).sha
    assert len(pack([])) == 0


def test_rows_in_a_file_are_mapped_in_the_order_that_is_asked_for(far, tmp_path, monkeypatch):
    """Each node maps the file itself: what travels to a worker are the places of the rows."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    rows = [Example([n] * (n + 2), [0] + [1] * (n + 1)) for n in range(300)]
    for uri in (str(tmp_path / "ids.bin"), f"{far}/tokens/ids.bin"):
        with open_new(uri) as f:
            packer = Packer(f.write)
            for row in rows:
                packer.add(row)
        data = packer.dialogues(uri).ordered(np.arange(300)[::-1])
        assert [data[i] for i in range(300)] == rows[::-1]
        travelled = pickle.dumps(data)
        assert len(travelled) < 10_000 + 20 * len(rows) < 4 * data.tokens
        arrived = pickle.loads(travelled)
        assert [arrived[i] for i in range(300)] == rows[::-1] and isinstance(arrived.ids, np.memmap)
        assert (data.longest, data.tokens) == (301, sum(len(row.ids) for row in rows))
        assert data.sha == arrived.sha != packer.dialogues(uri).sha


def test_item_14_a_response_ends_with_the_token_that_ends_a_turn(words):
    """The tokens after the prompt are those that a policy emits: its text and the end of its turn."""
    renderer = Renderer(words)
    example = render(renderer, PLAIN, ASK, "ask her first", 4096)
    prompt = renderer.prompt_ids(PLAIN.answer_messages(ASK))
    answer = words("ask her first", add_special_tokens=False)["input_ids"]
    assert example.ids == prompt + answer + [words.convert_tokens_to_ids("<|im_end|>")]
    assert example.mask == [0] * len(prompt) + [1] * (len(answer) + 1)
    assert pack([example])[0] == example


def test_item_14_a_truncated_response_has_no_end_token(words):
    """The policy ran into the length limit: it wrote no end, and the reward model reads none."""
    whole, cut = (
        render(Renderer(words), PLAIN, ASK, "ask her first", 4096, truncated) for truncated in (False, True)
    )
    assert cut == Example(whole.ids[:-1], whole.mask[:-1])


def test_item_14_training_reads_the_prompt_that_sampling_saw():
    """A template may write an assistant's turn that is past otherwise than it asks for one."""
    made = tiny.tokenizer()
    turn = "'<|im_start|>' + m['role'] + '\\n'"
    assert turn in tiny.CHATML
    made.chat_template = tiny.CHATML.replace(
        turn, f"{turn} + ('<think>\\n\\n</think>\\n\\n' if m['role'] == 'assistant' else '')"
    )
    renderer = Renderer(made)
    example = render(renderer, PLAIN, ASK, "ask her first", 4096)
    prompt = renderer.prompt_ids(PLAIN.answer_messages(ASK))
    assert example.ids[: len(prompt)] == prompt and example.mask.index(1) == len(prompt)
    assert "think" in made.apply_chat_template([*ASK, {"role": "assistant", "content": ""}], tokenize=False)


def test_item_16_one_bos_where_the_tokenizer_and_the_template_both_add_one(words):
    from tokenizers import processors

    made = tiny.tokenizer()
    bos = made.convert_tokens_to_ids("<|endoftext|>")
    made.bos_token = "<|endoftext|>"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    made.chat_template = "<|endoftext|>" + tiny.CHATML
    assert made("kind")["input_ids"][0] == bos, "the tokenizer adds one by itself"
    example = render(Renderer(made), PLAIN, ASK, "ask her first", 4096)
    assert example.ids.count(bos) == 1
    assert example.ids[0] == bos


def test_item_38_a_row_longer_than_the_context_is_left_out(words):
    renderer = Renderer(words)
    length = len(render(renderer, PLAIN, ASK, "ask her first", 4096).ids)
    assert render(renderer, PLAIN, ASK, "ask her first", length) is not None
    left_out: Counter[str] = Counter()
    assert render(renderer, PLAIN, ASK, "ask her first", length - 1, left_out=left_out) is None
    assert left_out == {"too_long": 1}
    assert render(renderer, PLAIN, ASK, "a lone surrogate \ud800", 4096, left_out=left_out) is None
    assert left_out == {"too_long": 1, "refused": 1}


def test_the_context_is_the_models(tmp_path: Path):
    model = str(tiny.save_model(tmp_path / "model"))
    assert context_length(model) == 4096
    lengths = [longest_row(model, TrainConfig(max_length=n)) for n in (None, 100, 9999)]
    assert lengths == [4096, 100, 4096]


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"model_type": "gemma3", "text_config": {"hidden_size": 64}}, 131072),  # the default of its class
        ({"model_type": "gpt2", "n_positions": 512}, 512),
    ],
)
def test_the_context_of_a_model_that_also_reads_images_is_that_of_its_language_model(
    tmp_path: Path, config: dict, context: int
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(str(tmp_path)) == context


def test_item_38_rows_longer_than_a_micro_batch_are_told_with_the_remedy(capsys):
    tell_long_rows("sft", [9, 3], 9)
    assert capsys.readouterr().err == ""
    tell_long_rows("rm", [9, 3, 10], 8)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rm: 2 of 3 rows are longer than rm.micro_batch_tokens=8 (at most 10 tokens)")
    assert "set rm.max_length" in line


def test_an_epochs_order_is_its_own_and_always_the_same():
    first, second = shuffled(50, 0, "sft", 0), shuffled(50, 0, "sft", 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    shuffled.cache_clear()
    assert shuffled(50, 0, "sft", 0) == first
