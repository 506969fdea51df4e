"""Rewards, advantages and their normalisation against loops of a few lines."""

import math

import pytest
import torch

from cai_ray.train.advantages import (
    before_tokens,
    bootstrap_values,
    gae,
    last_index,
    next_kl_coef,
    normalise,
    token_rewards,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_gae(rewards, values, mask, bootstrap, gamma, lam):
    """One row at a time: the generated tokens alone are the steps."""
    out = torch.zeros_like(values)
    for b in range(values.shape[0]):
        steps = [t for t in range(values.shape[1]) if mask[b, t]]
        after, carried = bootstrap[b].item(), 0.0
        for t in reversed(steps):
            carried = rewards[b, t].item() + gamma * after - values[b, t].item() + gamma * lam * carried
            after = values[b, t].item()
            out[b, t] = carried
    return out


MASK = torch.tensor([[0.0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]])


def test_item_25_score_on_the_last_generated_token():
    scores, kl = torch.tensor([3.0, -1.0, 2.0, 5.0]), draw(4, 6, seed=1)
    kl[MASK == 0] = math.nan  # nothing after the end counts, nor what stands before
    got = token_rewards(scores, kl, MASK, kl_coef=0.1)
    for b in range(4):
        last = max(t for t in range(6) if MASK[b, t])
        for t in range(6):
            want = (-0.1 * kl[b, t].item() if MASK[b, t] else 0.0) + (scores[b].item() if t == last else 0.0)
            assert got[b, t].item() == pytest.approx(want, abs=1e-6)
    nothing = token_rewards(torch.tensor([7.0]), torch.zeros(1, 3), torch.zeros(1, 3), kl_coef=0.1)
    assert (nothing == 0).all()

    # What stands after the end changes no advantage.
    values, rewards = draw(4, 6, seed=2), token_rewards(scores, kl.nan_to_num(), MASK, kl_coef=0.1)
    advantages, returns = gae(rewards, values, MASK, torch.zeros(4), gamma=1.0, lam=0.95)
    noisy = values + 100 * (MASK == 0)
    again, returns_again = gae(rewards + 100 * (MASK == 0), noisy, MASK, torch.zeros(4), gamma=1.0, lam=0.95)
    assert torch.equal(advantages, again)
    assert torch.equal(returns, returns_again)


def test_item_26_terminal_value_is_zero_only_after_eos():
    after = draw(2, 6, seed=3)
    mask = MASK[:2]
    truncated = torch.tensor([False, True])
    bootstrap = bootstrap_values(after, mask, truncated)
    torch.testing.assert_close(bootstrap, torch.tensor([0.0, after[1, 5].item()]))
    values, rewards = before_tokens(after), draw(2, 6, seed=4) * mask
    assert values[1, 3] == after[1, 2]  # the state before a token is the state after the one before
    advantages, _ = gae(rewards, values, mask, bootstrap, gamma=0.9, lam=0.8)
    want = rewards[0, 3] - values[0, 3]
    torch.testing.assert_close(advantages[0, 3], want)
    torch.testing.assert_close(advantages[1, 5], rewards[1, 5] + 0.9 * after[1, 5] - values[1, 5])
    torch.testing.assert_close(advantages, naive_gae(rewards, values, mask, bootstrap, 0.9, 0.8))


def test_item_27_gae_carries_across_masked_tokens():
    rewards, values, bootstrap = draw(4, 6, seed=5), draw(4, 6, seed=6), draw(4, seed=7)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)):
        advantages, returns = gae(rewards, values, MASK, bootstrap, gamma=gamma, lam=lam)
        want = naive_gae(rewards, values, MASK, bootstrap, gamma, lam)
        torch.testing.assert_close(advantages, want)
        torch.testing.assert_close(returns, (want + values) * MASK)
    assert advantages[2, 1] != 0
    assert (advantages[MASK == 0] == 0).all()


@pytest.mark.parametrize("how", ["none", "center", "whiten"])
def test_item_27_normalised_over_the_global_batch(how):
    """Ranks that share the rows, one of them with short ones, get what one rank with all rows gets."""
    advantages, mask = 5 + 2 * draw(4, 6, seed=8), MASK
    advantages[mask == 0] = math.nan
    valid = [advantages[b, t].item() for b in range(4) for t in range(6) if mask[b, t]]
    mean = sum(valid) / len(valid)
    std = math.sqrt(sum((v - mean) ** 2 for v in valid) / len(valid))
    shift, scale = {"none": (0.0, 1.0), "center": (mean, 1.0), "whiten": (mean, std)}[how]
    want = ((advantages.nan_to_num() - shift) / scale) * mask

    alone = normalise(advantages, mask, how, lambda x: x)
    torch.testing.assert_close(alone, want, atol=1e-6, rtol=1e-5)

    # Both ranks meet at each reduction: run them as threads with a barrier.
    torch.testing.assert_close(
        torch.cat(on_ranks(advantages, mask, how, [[0], [1, 2, 3]])), want, atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        torch.cat(on_ranks(advantages, mask, how, [[0, 1], [2], [3]])), want, atol=1e-6, rtol=1e-5
    )


def on_ranks(advantages, mask, how, shares):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    barrier, parts = Barrier(len(shares), timeout=20), [None] * len(shares)

    def work(rank):
        def all_reduce(x):
            parts[rank] = x
            barrier.wait()
            total = sum(p.clone() for p in parts)
            barrier.wait()
            return total

        return normalise(advantages[shares[rank]], mask[shares[rank]], how, all_reduce)

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(work, range(len(shares))))


def test_last_index_on_either_side():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    assert last_index(mask).tolist() == [1, 3, 3, 0]


def test_the_kl_coefficient_follows_its_target():
    def after(kl, **changes):
        return next_kl_coef(0.1, kl, **{"target": 2.0, "horizon": 1000, "rows": 100} | changes)

    assert after(2.0) == 0.1 and after(50.0, target=None) == 0.1
    assert after(2.2) == pytest.approx(0.1 * (1 + 0.1 * 100 / 1000))
    # However far away, a fifth in `horizon` rows at most.
    assert after(50.0, rows=1000) == pytest.approx(0.12) and after(-50.0, rows=1000) == pytest.approx(0.08)
