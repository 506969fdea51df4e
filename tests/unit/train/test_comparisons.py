"""Micro-batches of comparisons (docs/method.md, item 18): every response once, of like length in each pass."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_ray.config.training import TrainConfig
from cai_ray.errors import InputError
from cai_ray.train import comparisons, pairs
from cai_ray.train.batches import Example
from cai_ray.train.dialogues import pack
from cai_ray.train.pairs import MicroBatch, Pairs
from tests.ray import training

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=30)


def pairs_of(lengths: list[tuple[int, int]]) -> Pairs:
    rows = [Example([i % 7 + 1] * n, [1] * n) for i, n in enumerate(n for pair in lengths for n in pair)]
    count = len(lengths)
    return Pairs(pack(rows), np.linspace(0, 1, count), np.arange(count) % 2 == 1, 0)


def on_ranks(data: Pairs, batch: list[int], tokens: int, world: int, monkeypatch) -> list[list[MicroBatch]]:
    found = []
    monkeypatch.setattr(pairs, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(pairs, "rank", lambda rank=rank: rank)
        found.append(data.micro_batches(batch, TrainConfig(micro_batch_tokens=tokens)))
    return found


def padded(data: Pairs, rows: list[int]) -> int:
    return len(rows) * max(len(data.responses[i].ids) for i in rows) if rows else 0


@settings(deadline=None)  # a busy machine is no fault
@given(LENGTHS, st.integers(1, 3))
def test_every_response_is_in_one_pass_of_its_pairs_micro_batch(lengths, world):
    data = pairs_of(lengths)
    with pytest.MonkeyPatch.context() as patch:
        ranks = on_ranks(data, list(range(len(lengths))), 60, world, patch)
    for micro_batches in ranks:
        for own, passes in micro_batches:
            assert sorted(i for rows in passes for i in rows) == sorted(
                2 * i + s for i in own for s in (0, 1)
            )
            assert sum(padded(data, rows) for rows in passes) <= 60
    assert sorted(i for m in ranks for pairs, _ in m for i in pairs) == list(range(len(lengths)))
    # Collective calls of a pass would wait for ranks that do not run it.
    assert len({tuple(len(passes) for _, passes in m) for m in ranks}) == 1


@given(LENGTHS, st.integers(1, 2))
def test_a_pair_longer_than_a_micro_batch_has_one_of_its_own(lengths, world):
    data = pairs_of(lengths)
    with pytest.MonkeyPatch.context() as patch:
        ranks = on_ranks(data, list(range(len(lengths))), 20, world, patch)
    assert sorted(i for m in ranks for pairs, _ in m for i in pairs) == list(range(len(lengths)))
    assert len({tuple(len(passes) for _, passes in m) for m in ranks}) == 1
    for own, passes in (micro_batch for m in ranks for micro_batch in m):
        assert len(own) <= 1 or sum(padded(data, rows) for rows in passes) <= 20


@pytest.mark.parametrize("world", [1, 2])
def test_padding_is_at_most_a_twentieth_though_the_two_differ(world, monkeypatch):
    """Padded to the longer of the two, a quarter of these tokens would be padding."""
    draw = random.Random(0)
    lengths = [
        (int(draw.lognormvariate(5, 0.8)) + 1, int(draw.lognormvariate(5, 0.8)) + 1) for _ in range(64)
    ]
    data = pairs_of(lengths)
    ranks = on_ranks(data, list(range(64)), 8192, world, monkeypatch)
    passes = [rows for micro_batches in ranks for _, passes in micro_batches for rows in passes]
    tokens, real = sum(padded(data, rows) for rows in passes), sum(map(sum, lengths))
    assert tokens - real <= 0.05 * tokens
    assert len(passes) <= 60  # 128 responses


def test_what_is_read_goes_to_its_side_of_its_pair():
    lengths = [(60, 180), (160, 40), (100, 100), (20, 140)]
    data = pairs_of(lengths)
    (micro_batch,) = data.micro_batches([3, 1, 0], TrainConfig(micro_batch_tokens=4000))
    assert len(micro_batch.passes) > 1
    a, b, p_a, human = data.sides(micro_batch, lambda inputs: inputs["loss_mask"].sum(1))
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [lengths[i] for i in micro_batch.pairs]
    assert p_a.tolist() == pytest.approx([i / 3 for i in micro_batch.pairs])
    assert human.tolist() == [i % 2 == 1 for i in micro_batch.pairs]


def test_a_micro_batch_that_fills_up_has_a_gradient_of_zero():
    data = pairs_of([(2, 2)])
    weight = torch.ones(8, requires_grad=True)
    a, b, p_a, human = data.sides(MicroBatch([], [[], []]), lambda inputs: weight[inputs["input_ids"]].sum(1))
    assert [len(t) for t in (a, b, p_a, human)] == [0] * 4
    (a - b).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() == 0


def test_item_38_comparisons_that_say_nothing_or_are_too_long_are_left_out_and_counted(tmp_path, capsys):
    pairs = [("lie down", "run"), ("same", "same"), ("", "run"), ("lie down " * 99, "run"), ("sit", "run")]
    human = tmp_path / "human.jsonl"
    rows = [{"prompt": "how do i rest ?", "chosen": a, "rejected": b} for a, b in pairs]
    human.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "human": [{"path": str(human)}],
        "init": "base",
        "eval_fraction": 0,
        "max_length": 100,
        "micro_batch_tokens": 20,
    }
    run = training.make_run(tmp_path, rm=settings, max_error_rate=0.5)
    training.write(run, "label", training.labels(4))
    data = comparisons.load_comparisons(run, "rm", run.model("base"))
    assert data.counts["human_left_out"] == {"equal answers": 1, "an empty answer": 1}
    assert data.counts["left_out"]["too_long"] == 1
    assert (data.counts["rows_ai"], data.counts["rows_human"], len(data.train)) == (4, 2, 6)
    (longer,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rm: ")]
    assert "longer than rm.micro_batch_tokens=20" in longer
    strict = run.config.model_copy(update={"max_error_rate": 0.2})
    with pytest.raises(InputError, match=r"human\.jsonl: row 2: equal answers; 2 of the 5 rows"):
        comparisons.load_comparisons(type(run)(strict), "rm", run.model("base"))
