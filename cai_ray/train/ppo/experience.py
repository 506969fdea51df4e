"""What a PPO step learns from: its rollouts, their scores, and the targets of the losses.

Everything here is the same on every rank. A rank scores its share of the rows; after the sum over ranks every rank
has the whole batch. So rewards, advantages and their mean are those of the global batch, and a row may be on another
rank in the next epoch. That is a few numbers per token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cai_ray.config.ppo import PpoConfig
from cai_ray.storage.records import derive_seed
from cai_ray.train.advantages import (
    before_tokens,
    bootstrap_values,
    gae,
    group_baseline,
    normalise,
    token_rewards,
)
from cai_ray.train.batches import Example, rank_micro_batches
from cai_ray.train.losses import importance_weights, kl_k1, masked
from cai_ray.train.ppo.rollout_engine import Rollout
from cai_ray.train.runtime.ranks import rank, world_size


class Scores(NamedTuple):
    """What the models say of the rows before any update: (N, T) float32, rows padded at the right."""

    old_logprobs: Tensor
    """Log-probability of each token under the policy that the update starts from, computed by the trainer."""
    ref_logprobs: Tensor
    """The same under the reference."""
    values_after: Tensor
    """The value after each token."""
    reward: Tensor
    """(N,): the reward of each row (`rewards.combined`)."""


class Minibatch(NamedTuple):
    """The rows of one optimizer step, as indices in the batch."""

    rows: list[int]
    """Its rows on all ranks."""
    groups: list[list[int]]
    """Its micro-batches on this rank."""


class Batch(NamedTuple):
    """The rows of one step: N rollouts, each a prompt and a response; tensors are padded to T tokens."""

    rows: list[Example]
    truncated: Tensor
    """(N,) bool: whether the length limit ended the response."""
    mask: Tensor
    """(N, T) float32: the response mask, 1 on the tokens that the policy wrote."""
    engine_logprobs: Tensor
    """(N, T): log-probabilities as the engine gave them; 0 outside the mask."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.ids) for row in self.rows]


class Targets(NamedTuple):
    """What the losses compare with, (N, T) each, and the rewards behind it, (N,)."""

    old_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    score: Tensor
    """The reward, or the penalty of a missing end (`final_scores`)."""
    kl: Tensor
    """Sum over a row's tokens of log p - log p_ref."""


def make_batch(prompts: Sequence[Sequence[int]], rollouts: Sequence[Rollout]) -> Batch:
    """Joins prompts and responses: the ids that the engine saw and the ids that it produced."""
    rows = [
        Example([*prompt, *r.ids], [0] * len(prompt) + [1] * len(r.ids))
        for prompt, r in zip(prompts, rollouts, strict=True)
    ]
    shape = len(rows), max(len(row.ids) for row in rows)
    mask, logprobs = torch.zeros(shape), torch.zeros(shape)
    for i, (prompt, r) in enumerate(zip(prompts, rollouts, strict=True)):
        place = slice(len(prompt), len(prompt) + len(r.ids))
        mask[i, place] = 1.0
        logprobs[i, place] = torch.tensor(r.logprobs)
    return Batch(rows, torch.tensor([r.truncated for r in rollouts]), mask, logprobs)


def plan_epochs(lengths: Sequence[int], cfg: PpoConfig, seed: int, step: int) -> list[list[Minibatch]]:
    """The minibatches of each epoch of a step, with this rank's micro-batches."""
    return [minibatches(lengths, cfg, seed, step, epoch, rank(), world_size()) for epoch in range(cfg.epochs)]


def minibatches(
    lengths: Sequence[int], cfg: PpoConfig, seed: int, step: int, epoch: int, rank: int, world: int
) -> list[Minibatch]:
    """The step's rows in a random order, split into minibatches that do not depend on the number of ranks."""
    order = list(range(len(lengths)))
    random.Random(derive_seed(seed, "minibatches", step, epoch)).shuffle(order)
    out = []
    for start in range(0, len(order), cfg.minibatch):
        rows = order[start : start + cfg.minibatch]
        groups = rank_micro_batches([lengths[i] for i in rows], cfg.micro_batch_tokens, rank, world)
        out.append(Minibatch(rows, [[rows[i] for i in group] for group in groups]))
    return out


def make_targets(batch: Batch, scores: Scores, cfg: PpoConfig, kl_coef: float) -> Targets:
    """Rewards, advantages and returns of the global batch.

    Args:
        kl_coef: coefficient of the KL penalty in the rewards.
    """
    mask = batch.mask
    score = final_scores(scores.reward, batch, cfg)
    kl = masked(kl_k1(scores.old_logprobs, scores.ref_logprobs), mask)
    rewards = token_rewards(score, kl, mask, kl_coef=kl_coef)
    values = masked(before_tokens(scores.values_after), mask)
    if cfg.advantage == "gae":
        bootstrap = torch.zeros_like(score)
        if cfg.missing_eos_reward is None:
            bootstrap = bootstrap_values(scores.values_after, mask, batch.truncated)
        advantages, returns = gae(rewards, values, mask, bootstrap, gamma=cfg.gamma, lam=cfg.lam)
    else:
        advantages = group_baseline(rewards, mask, size=cfg.group, how=cfg.advantage)
        returns = torch.zeros_like(advantages)
    # Every rank has the whole batch here, so a sum over it is the sum over ranks.
    advantages = normalise(advantages, mask, cfg.whiten, lambda total: total)
    weights = masked(importance_weights(scores.old_logprobs, batch.engine_logprobs, cfg.importance_cap), mask)
    return Targets(masked(scores.old_logprobs, mask), values, advantages, returns, weights, score, kl.sum(1))


def final_scores(reward: Tensor, batch: Batch, cfg: PpoConfig) -> Tensor:
    """(N,): the rewards; for truncated rows, the penalty `ppo.missing_eos_reward`.

    Without a penalty, a truncated row earns nothing here: the value after its last token stands for the rest
    (`make_targets`). Without a value model too, it earns its reward.
    """
    if cfg.missing_eos_reward is None and cfg.advantage != "gae":
        return reward
    penalty = 0.0 if cfg.missing_eos_reward is None else cfg.missing_eos_reward
    return torch.where(batch.truncated, torch.full_like(reward, penalty), reward)


def draw(prompts: int, start: int, count: int, seed: int) -> list[int]:
    """Prompts `start` to `start + count` of an endless series of shuffles; it needs no state."""
    return [_shuffle(prompts, i // prompts, seed)[i % prompts] for i in range(start, start + count)]


@lru_cache(maxsize=2)
def _shuffle(prompts: int, epoch: int, seed: int) -> list[int]:
    order = list(range(prompts))
    random.Random(derive_seed(seed, "prompts", epoch)).shuffle(order)
    return order
