"""The updates of policy and value model in a PPO step: the losses and their sums over minibatches.

A loss is this rank's share times the number of ranks, since DeepSpeed averages gradients over ranks. Sums are read
after the last backward pass only: to read one earlier, the host would wait for the GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cai_ray.config.ppo import PpoConfig
from cai_ray.train.advantages import before_tokens
from cai_ray.train.batches import pad
from cai_ray.train.losses import policy_loss, value_loss
from cai_ray.train.ppo.experience import Batch, Minibatch, Targets
from cai_ray.train.ppo.scoring import (
    Forward,
    check_ratio,
    difference,
)
from cai_ray.train.runtime.engine import Trained
from cai_ray.train.runtime.ranks import device, global_sums, to_device, world_size
from cai_ray.train.sequences import sequence_logprobs, sequence_values


def update_policy(
    policy: Trained,
    batch: Batch,
    targets: Targets,
    plan: Sequence[Minibatch],
    cfg: PpoConfig,
    pad_id: int,
    cached_forwards: Sequence[Forward] = (),
) -> dict[str, float]:
    """Takes an optimizer step on every minibatch, or until one leaves the policy too far from the old one.

    Args:
        plan: the minibatches of all epochs.
        cached_forwards: forward passes over the first micro-batches by the policy as it is (`scoring.score`).

    Returns:
        Sums over the tokens of all ranks and minibatches (`losses.policy_loss`; `first_…` of the first minibatch
        alone), the mean `policy_norm` of the gradient, and `minibatches`, the number of steps taken.

    Raises:
        RuntimeError: the ratio is not 1 at the first minibatch.
    """
    sums: dict[str, Any] = defaultdict(float)
    grad_norms = []
    worst = torch.zeros((), device=device())
    cached = iter(cached_forwards)
    for number, minibatch in enumerate(plan):
        global_tokens = float(batch.mask[minibatch.rows].sum())
        divergence: dict[str, Any] = defaultdict(float)
        for group in minibatch.groups:
            inputs = to_device(pad([batch.rows[i] for i in group], pad_id))
            mask = inputs["loss_mask"]
            micro = slice_targets(targets, group, mask)
            forward = next(cached, None)
            logprobs = (
                forward.logprobs if forward else sequence_logprobs(policy.engine, inputs, cfg.temperature)
            )
            if number == 0:
                worst = torch.maximum(worst, difference(logprobs, micro.old_logprobs, mask))
            loss, metrics = policy_loss(
                logprobs, micro.old_logprobs, micro.advantages, mask,
                clip=cfg.clip, global_tokens=global_tokens, weights=micro.weights,
            )  # fmt: skip
            policy.backward(loss * world_size())
            add(sums, metrics | {"policy_loss": loss.detach()})
            add(divergence, {name: metrics[name] for name in ("approx_kl", "tokens")})
            if number == 0:
                add(sums, {"first_ratio": metrics["ratio"], "first_tokens": metrics["tokens"]})
        if number == 0:
            check_ratio(float(worst), cfg)
        grad_norms.append(policy.step())
        if too_far(divergence, cfg):
            break
    return global_sums(sums) | {"policy_norm": sum(grad_norms) / len(grad_norms), "minibatches": number + 1}


def update_value(
    value: Trained,
    batch: Batch,
    targets: Targets,
    plan: Sequence[Minibatch],
    cfg: PpoConfig,
    pad_id: int,
    clip: float | None,
    cached_forwards: Sequence[Forward] = (),
) -> dict[str, float]:
    """Takes an optimizer step of the value model on every minibatch.

    Args:
        clip: how far a value may move from its old one; None for any distance.
        cached_forwards: as in `update_policy`.

    Returns:
        Sums over the tokens of all ranks and minibatches (`losses.value_loss`), and the mean `value_norm` of the
        gradient.
    """
    sums: dict[str, Any] = defaultdict(float)
    grad_norms = []
    cached = iter(cached_forwards)
    for minibatch in plan:
        global_tokens = float(batch.mask[minibatch.rows].sum())
        for group in minibatch.groups:
            inputs = to_device(pad([batch.rows[i] for i in group], pad_id))
            mask = inputs["loss_mask"]
            micro = slice_targets(targets, group, mask)
            forward = next(cached, None)
            values_after = forward.values_after if forward else sequence_values(value.engine, inputs)
            loss, metrics = value_loss(
                before_tokens(values_after),
                micro.values,
                micro.returns,
                mask,
                clip=clip,
                global_tokens=global_tokens,
            )
            value.backward(cfg.value_coef * loss * world_size())
            add(sums, metrics | {"value_loss": loss.detach(), "value_tokens": mask.sum()})
        grad_norms.append(value.step())
    return global_sums(sums) | {"value_norm": sum(grad_norms) / len(grad_norms)}


def too_far(divergence: dict[str, Any], cfg: PpoConfig) -> bool:
    """Says whether the policy is farther from the old one than `ppo.max_update_kl` allows, over all ranks.

    Args:
        divergence: sums over the last minibatch: `approx_kl` and `tokens`.
    """
    if cfg.max_update_kl is None:
        return False
    sums = global_sums(divergence)
    return sums["approx_kl"] > cfg.max_update_kl * sums["tokens"]


def slice_targets(targets: Targets, group: Sequence[int], mask: Tensor) -> Targets:
    """The targets of a micro-batch, as wide as it is; zeros where it is empty."""
    if not group:
        return Targets(*[torch.zeros_like(mask)] * len(Targets._fields))
    rows = list(group)
    return Targets(
        *[
            (t[rows, : mask.shape[1]] if t.ndim == 2 else t[rows]).to(mask.device, non_blocking=True)
            for t in targets
        ]
    )


def add(sums: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Adds values to the sums of the same names."""
    for name, value in values.items():
        sums[name] += value.detach()
