"""Rewards per token, generalised advantage estimation, and its normalisation over the global batch.

Shapes: B rows, T tokens. The mask is 1 on generated tokens, the end of a turn included. Between two generated spans
there may be other tokens (a user's turn, a tool's answer), which are not actions of the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cai_ray.train.losses import masked


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """(B, T): -kl_coef · kl on each generated token, and the row's score added on its last one.

    Args:
        scores: (B,).
        kl: (B, T), log p - log p_ref of each token.
    """
    rewards = masked(-kl_coef * kl, mask)
    last = last_index(mask)
    spot = torch.zeros_like(rewards).scatter_(1, last[:, None], scores[:, None].to(rewards.dtype))
    return rewards + masked(spot, mask)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    delta_t = r_t + gamma V_{t'} - V_t and A_t = delta_t + gamma lam A_{t'}, where t' is the next generated token.
    Tokens between generated ones are not steps: they pass on what comes from their right unchanged.

    Args:
        rewards: (B, T).
        values: (B, T); values[:, t] is the value of the state before token t.
        bootstrap: (B,); the value after the last token of a truncated row, 0 after an end token.

    Returns:
        Advantages and returns (advantages + values), (B, T), 0 outside the mask.
    """
    advantages = torch.zeros_like(values)
    next_advantage, next_value = torch.zeros_like(bootstrap), bootstrap.to(values.dtype)
    for t in range(values.shape[1] - 1, -1, -1):
        step = mask[:, t] != 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(step, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(step, values[:, t], next_value)
        advantages[:, t] = torch.where(step, next_advantage, advantages[:, t])
    return advantages, masked(advantages + values, mask)


def group_baseline(rewards: Tensor, mask: Tensor, *, size: int, how: Literal["rloo", "grpo"]) -> Tensor:
    """(B, T): each row's total reward compared with the other samples of its prompt, the same on all its tokens.

    rloo: minus the mean of the others (Ahmadian et al. 2024, arXiv 2402.14740, section 3.2). grpo: minus the mean of
    all, divided by their standard deviation (Shao et al. 2024, arXiv 2402.03300, section 4.1.2). For both, the KL is in
    the reward here, not in the loss.

    Args:
        rewards: (B, T), per token; rows size * i to size * (i + 1) answer the same prompt.
        size: samples per prompt.
    """
    whole = masked(rewards, mask).sum(1).view(-1, size)
    if how == "rloo":
        advantages = (whole - whole.mean(1, keepdim=True)) * size / (size - 1)
    else:
        advantages = (whole - whole.mean(1, keepdim=True)) / (whole.std(1, keepdim=True) + 1e-6)
    return masked(advantages.reshape(-1, 1).expand_as(rewards), mask)


def next_kl_coef(coef: float, kl: float, *, target: float | None, horizon: int, rows: int) -> float:
    """The KL coefficient of the next step: larger if the policy is too far from the reference, else smaller.

    It changes by at most a fifth in `horizon` rows. Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        kl: mean KL from the reference over the step's `rows` responses.
        target: the KL to hold; None for a constant coefficient.
    """
    if target is None:
        return coef
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * rows / horizon)


def before_tokens(after: Tensor) -> Tensor:
    """(B, T): the values of the states before each token, from the values after each token, which a model gives."""
    return torch.nn.functional.pad(after[:, :-1], (1, 0))


def bootstrap_values(after: Tensor, mask: Tensor, truncated: Tensor) -> Tensor:
    """(B,): the value after the last generated token of truncated rows; 0 for rows that ended by themselves."""
    last = after.gather(1, last_index(mask)[:, None]).squeeze(1)
    return torch.where(truncated.bool(), last, torch.zeros_like(last))


def last_index(mask: Tensor) -> Tensor:
    """(B,): the position of each row's last set token, on whatever side the padding is; 0 for a row without any."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask != 0, places, 0).amax(1)


def normalise(
    advantages: Tensor,
    mask: Tensor,
    how: Literal["none", "center", "whiten"],
    all_reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """(B, T): advantages centred (and with `whiten` scaled to unit variance) over the tokens of the global batch.

    Args:
        all_reduce: sums a tensor over all ranks. Every rank calls it alike, even one without tokens.
    """
    if how == "none":
        return masked(advantages, mask)
    wide = masked(advantages.double(), mask)
    total, count = all_reduce(torch.stack([wide.sum(), (mask != 0).sum().to(wide.dtype)]))
    centred = masked(wide - total / count.clamp(min=1), mask)
    if how == "whiten":
        (square,) = all_reduce(centred.square().sum()[None])
        centred = centred * torch.rsqrt(square / count.clamp(min=1) + 1e-8)
    return centred.to(advantages.dtype)
