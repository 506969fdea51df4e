"""Rewards per token, generalised advantage estimation, and its normalisation over the global batch.

Shapes: B rows, T tokens. The mask is 1 on generated tokens (the end of a turn included); between two
generated spans there may be others (a user's turn, a tool's answer), which are nobody's actions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cai_ray.train.losses import masked


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """(B, T): -kl_coef · kl on each generated token, and the row's score (B,) added on its last one."""
    rewards = masked(-kl_coef * kl, mask)
    last = last_index(mask)
    spot = torch.zeros_like(rewards).scatter_(1, last[:, None], scores[:, None].to(rewards.dtype))
    return rewards + masked(spot, mask)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    delta_t = r_t + gamma V_{t'} - V_t and A_t = delta_t + gamma lam A_{t'}, where t' is the next generated
    token: tokens between are no steps, and what they carry is passed on unchanged.

    Args:
        rewards: (B, T).
        values: (B, T); values[:, t] is the value of the state before token t.
        bootstrap: (B,); the value after the last token of a truncated row, 0 after an end token.

    Returns:
        Advantages and returns (advantages + values), (B, T), 0 outside the mask.
    """
    advantages = torch.zeros_like(values)
    carried, following = torch.zeros_like(bootstrap), bootstrap.to(values.dtype)
    for t in range(values.shape[1] - 1, -1, -1):
        step = mask[:, t] != 0
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = torch.where(step, delta + gamma * lam * carried, carried)
        following = torch.where(step, values[:, t], following)
        advantages[:, t] = torch.where(step, carried, advantages[:, t])
    return advantages, masked(advantages + values, mask)


def group_baseline(rewards: Tensor, mask: Tensor, *, size: int, how: Literal["rloo", "grpo"]) -> Tensor:
    """(B, T): each row's whole reward against those of the other samples of its prompt, the same on all its tokens.

    rloo: less the mean of the others (Ahmadian et al. 2024, arXiv 2402.14740, section 3.2). grpo: less the mean of all,
    over their standard deviation (Shao et al. 2024, arXiv 2402.03300, section 4.1.2); the KL is in the reward here for
    both, not in the loss.

    Args:
        rewards: (B, T), of tokens; rows number size * i to size * (i + 1) are of one prompt.
    """
    whole = masked(rewards, mask).sum(1).view(-1, size)
    if how == "rloo":
        advantages = (whole - whole.mean(1, keepdim=True)) * size / (size - 1)
    else:
        advantages = (whole - whole.mean(1, keepdim=True)) / (whole.std(1, keepdim=True) + 1e-6)
    return masked(advantages.reshape(-1, 1).expand_as(rewards), mask)


def next_kl_coef(coef: float, kl: float, *, target: float | None, horizon: int, rows: int) -> float:
    """The coefficient for the next step: larger where the policy is too far away, by at most a fifth in `horizon` rows.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        kl: mean KL from the reference over the step's `rows` responses.
    """
    if target is None:
        return coef
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * rows / horizon)


def before_tokens(after: Tensor) -> Tensor:
    """Turns values after each token, as a model gives them, into values of the state before it: (B, T)."""
    return torch.nn.functional.pad(after[:, :-1], (1, 0))


def bootstrap_values(after: Tensor, mask: Tensor, truncated: Tensor) -> Tensor:
    """(B,): the value after the last generated token of truncated rows; 0 where the row ended by itself."""
    last = after.gather(1, last_index(mask)[:, None]).squeeze(1)
    return torch.where(truncated.bool(), last, torch.zeros_like(last))


def last_index(mask: Tensor) -> Tensor:
    """(B,): where each row's last set token stands, on whatever side the padding is; 0 for a row without."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask != 0, places, 0).amax(1)


def normalise(
    advantages: Tensor,
    mask: Tensor,
    how: Literal["none", "center", "whiten"],
    all_reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Centres (and scales to unit variance) over the valid tokens of the whole global batch.

    Args:
        all_reduce: the sum of a tensor over all ranks. Every rank calls it alike, also one without tokens.
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
