"""What a PPO step learns from, by hand: docs/method.md items 19, 20, 25 to 27, 30, 31."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from cai_ray.config.ppo import PpoConfig
from cai_ray.train.ppo.diagnostics import explained_variance
from cai_ray.train.ppo.experience import (
    Batch,
    Minibatch,
    Scores,
    draw,
    final_scores,
    make_batch,
    make_targets,
    minibatches,
)
from cai_ray.train.ppo.rollout_engine import Rollout
from cai_ray.train.ppo.scoring import keeps_graphs

PROMPTS = [[5, 6], [7], [8, 9, 10]]
ROLLOUTS = [
    Rollout([20, 21, 1], [-0.1, -0.2, -0.3], False, 4),
    Rollout([22, 1], [-0.4, -0.5], False, 4),
    Rollout([23, 24, 25, 26], [-0.6, -0.7, -0.8, -0.9], True, 4),
]


def config(**changes: object) -> PpoConfig:
    return PpoConfig.model_validate({"rollout_batch": 4, "minibatch": 2, "whiten": "none", **changes})


def some_scores(batch: Batch, seed: int = 0) -> Scores:
    torch.manual_seed(seed)
    tokens = [torch.randn(batch.mask.shape) for _ in range(3)]
    return Scores(*tokens, torch.randn(len(batch.rows)))


def test_item_19_rows_are_the_ids_that_the_engine_saw_and_produced() -> None:
    batch = make_batch(PROMPTS, ROLLOUTS)
    assert [row.ids for row in batch.rows] == [[5, 6, 20, 21, 1], [7, 22, 1], [8, 9, 10, 23, 24, 25, 26]]
    assert [row.mask for row in batch.rows] == [[0, 0, 1, 1, 1], [0, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert batch.mask[:, :7].tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert torch.allclose(batch.engine_logprobs[1], torch.tensor([0, -0.4, -0.5, 0, 0, 0, 0]))


def test_item_26_a_row_cut_off_earns_the_penalty_instead_of_a_score() -> None:
    batch = make_batch(PROMPTS, ROLLOUTS)
    # The penalty is not clipped: it is a setting, not a measurement.
    scores = final_scores(torch.full((3,), 3.0), batch, config(missing_eos_reward=-30.0, reward_clip=3.0))
    assert scores.tolist() == [3.0, 3.0, -30.0]


def test_item_26_without_a_penalty_a_row_cut_off_is_bootstrapped_with_the_value() -> None:
    batch = make_batch(PROMPTS, ROLLOUTS)
    scores = some_scores(batch)
    cut = make_targets(batch, scores, config(lam=1.0), 0.0)
    # Undiscounted returns are what comes at the end: the value after the last token, or the score.
    assert cut.returns[2, 3:].tolist() == pytest.approx([float(scores.values_after[2, 6])] * 4, abs=1e-5)
    ended = float(scores.reward[0])
    assert cut.returns[0, 2:5].tolist() == pytest.approx([ended] * 3, abs=1e-5)
    penalised = make_targets(batch, scores, config(lam=1.0, missing_eos_reward=-3.0), 0.0)
    assert penalised.returns[2, 3:].tolist() == pytest.approx([-3.0] * 4, abs=1e-5)


def test_targets_are_those_of_a_plain_loop() -> None:
    batch, cfg = (
        make_batch(PROMPTS, ROLLOUTS),
        config(gamma=0.9, lam=0.8, missing_eos_reward=-3.0),
    )
    scores = some_scores(batch)
    targets = make_targets(batch, scores, cfg, 0.3)
    for i, (prompt, rollout) in enumerate(zip(PROMPTS, ROLLOUTS, strict=True)):
        first, n = len(prompt), len(rollout.ids)
        places = range(first, first + n)
        reward = [-0.3 * float(scores.old_logprobs[i, t] - scores.ref_logprobs[i, t]) for t in places]
        reward[-1] += -3.0 if rollout.truncated else float(scores.reward[i])
        value = [float(scores.values_after[i, t - 1]) for t in places] + [0.0]
        advantage = 0.0
        for k in reversed(range(n)):
            advantage = reward[k] + 0.9 * value[k + 1] - value[k] + 0.9 * 0.8 * advantage
            assert float(targets.advantages[i, first + k]) == pytest.approx(advantage, abs=1e-4)
            assert float(targets.returns[i, first + k]) == pytest.approx(advantage + value[k], abs=1e-4)
            assert float(targets.values[i, first + k]) == pytest.approx(value[k])
        kl = sum(float(scores.old_logprobs[i, t] - scores.ref_logprobs[i, t]) for t in places)
        assert float(targets.kl[i]) == pytest.approx(kl, abs=1e-5)


@pytest.mark.parametrize("how", ["rloo", "grpo"])
def test_a_group_is_the_baseline_of_its_samples(how: str) -> None:
    """Two samples each of two prompts, by hand; the KL is in the reward, and a row cut off keeps its score."""
    batch = make_batch([PROMPTS[0]] * 2 + [PROMPTS[2]] * 2, [ROLLOUTS[i] for i in (0, 2, 1, 2)])
    scores = some_scores(batch)
    targets = make_targets(batch, scores, config(advantage=how, group=2), 0.3)
    kl = ((scores.old_logprobs - scores.ref_logprobs) * batch.mask).sum(1).tolist()
    reward = [r - 0.3 * k for r, k in zip(scores.reward.tolist(), kl, strict=True)]
    for i in range(4):
        other = reward[i ^ 1]
        apart = reward[i] - other
        want = apart if how == "rloo" else (apart / 2) / (abs(apart) / 2**0.5)
        assert targets.advantages[i][batch.mask[i] != 0].tolist() == pytest.approx(
            [want] * int(batch.mask[i].sum()), abs=1e-4
        )
        assert not targets.advantages[i][batch.mask[i] == 0].any()


def test_item_27_advantages_are_centred_over_the_global_batch() -> None:
    batch = make_batch(PROMPTS, ROLLOUTS)
    scores = some_scores(batch)
    plain = make_targets(batch, scores, config(whiten="none"), 0.05)
    for how in ("center", "whiten"):
        shaped = make_targets(batch, scores, config(whiten=how), 0.05)
        chosen = shaped.advantages[batch.mask != 0]
        assert float(chosen.mean()) == pytest.approx(0, abs=1e-6)
        assert torch.equal(shaped.returns, plain.returns), "returns are of the untouched advantages"
    assert float(chosen.std(unbiased=False)) == pytest.approx(1, abs=1e-4)


def test_item_21_weights_are_of_trainer_against_engine_and_clamped() -> None:
    batch = make_batch(PROMPTS, ROLLOUTS)
    scores = some_scores(batch)
    weights = make_targets(batch, scores, config(importance_cap=1.5), 0.05).weights
    wanted = (scores.old_logprobs - batch.engine_logprobs).exp().clamp(max=1.5) * batch.mask
    assert torch.allclose(weights, wanted) and float(weights.max()) == 1.5


def test_what_stands_outside_the_mask_does_not_matter() -> None:
    batch = make_batch(PROMPTS, ROLLOUTS)
    scores = some_scores(batch)
    targets = make_targets(batch, scores, config(whiten="whiten"), 0.05)
    # Not the values just before a response or after it: those are states of its own.
    noisy = Scores(*(s + (1 - batch.mask) * 7 for s in scores[:2]), scores.values_after, scores.reward)
    for a, b in zip(targets, make_targets(batch, noisy, config(whiten="whiten"), 0.05), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_item_30_minibatches_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    lengths = [3 + i % 7 for i in range(24)]
    cfg = config(rollout_batch=24, minibatch=12, micro_batch_tokens=20)
    alone = minibatches(lengths, cfg, 0, 5, 0, 0, 1)
    ranks = [minibatches(lengths, cfg, 0, 5, 0, r, world) for r in range(world)]
    for number, whole in enumerate(alone):
        parts = [plan[number] for plan in ranks]
        assert all(part.rows == whole.rows for part in parts)
        assert len({len(part.groups) for part in parts}) == 1, "every rank runs as many micro-batches"
        assert sorted(i for part in parts for g in part.groups for i in g) == sorted(whole.rows)
    assert sorted(i for m in alone for i in m.rows) == list(range(24))
    assert alone != minibatches(lengths, cfg, 0, 5, 1, 0, 1), "each epoch has an order of its own"


def test_prompts_are_drawn_by_shuffles_without_a_state() -> None:
    series = draw(10, 0, 35, seed=3)
    assert all(sorted(series[k : k + 10]) == list(range(10)) for k in (0, 10, 20))
    assert series[:10] != series[10:20]
    assert [i for step in range(5) for i in draw(10, step * 7, 7, seed=3)] == series
    assert draw(10, 0, 10, seed=4) != series[:10]
    assert max(Counter(draw(3, 0, 7, seed=0)).values()) == 3, "fewer prompts than a step wants come again"


def test_explained_variance() -> None:
    mask = torch.tensor([[1.0, 1, 1, 0]])
    returns = torch.tensor([[1.0, 2, 3, 99]])
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1)
    constant: Tensor = torch.zeros_like(returns)
    assert explained_variance(constant, returns, mask) == pytest.approx(0)
    assert math.isfinite(explained_variance(constant, constant, mask))


def test_graphs_are_kept_where_both_fit_a_micro_batch() -> None:
    minibatch, lengths = Minibatch([0, 1, 2], [[0, 1], [2], []]), [10, 5, 20]  # 40 tokens with their padding
    assert keeps_graphs(minibatch, lengths, PpoConfig(micro_batch_tokens=80))
    assert not keeps_graphs(minibatch, lengths, PpoConfig(micro_batch_tokens=79))
    assert not keeps_graphs(minibatch, lengths, PpoConfig(micro_batch_tokens=80, zero_stage=3))
