"""Scores a batch with PPO's four models: log-probabilities, values and rewards of token sequences.

The trainer recomputes old log-probabilities in the micro-batches of the update, so that the ratio is 1 before the first
step and differs from 1 by the update alone. The engine's are compared with them and only serve as importance weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cai_ray.config.ppo import PpoConfig
from cai_ray.errors import Stopped
from cai_ray.prompts.messages import Message
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage.run import Run
from cai_ray.train.batches import micro_batches, pad
from cai_ray.train.models import load_policy, load_reference, load_value_model
from cai_ray.train.ppo.experience import Batch, Minibatch, Scores
from cai_ray.train.ppo.rewards import Reward, combined, describe, load_rewards, raw_scores
from cai_ray.train.runtime.engine import Trained, distribute
from cai_ray.train.runtime.ranks import device, global_sum, to_device
from cai_ray.train.sequences import sequence_logprobs, sequence_values

RATIO_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclass
class Models:
    """PPO's models on a rank: policy and value model under DeepSpeed, reference and reward models frozen."""

    policy: Trained
    value: Trained | None
    """None if the advantages need no values (`ppo.advantage`)."""
    reference: nn.Module | None
    """None with LoRA: then the reference is the policy with its adapter off."""
    rewards: list[Reward]

    @property
    def trained(self) -> dict[str, Trained]:
        """What a checkpoint holds, by its folder's name there."""
        return {"policy": self.policy} | ({"value": self.value} if self.value else {})


def load_models(run: Run, cfg: PpoConfig, renderer: Renderer) -> Models:
    """Loads the four kinds of models; policy and value model with their optimizers."""
    sl = run.model("sl")
    updates = cfg.epochs * (cfg.rollout_batch // cfg.minibatch)
    value = None
    if cfg.advantage == "gae":
        from_reward = cfg.value_init == "rm"
        # Values chase a policy that moves until the end: their learning rate stays.
        steady = cfg.model_copy(update={"schedule": "constant"})
        value = distribute(
            load_value_model(run.model(cfg.rewards[0].model) if from_reward else sl, cfg, from_reward),
            steady,
            (cfg.value_warmup_steps + cfg.steps) * updates,
            cfg.value_learning_rate,
        )
    return Models(
        policy=distribute(load_policy(sl, cfg), cfg, cfg.steps * updates),
        value=value,
        reference=None if cfg.lora else load_reference(sl, cfg).to(device()),
        rewards=load_rewards(run, cfg, renderer),
    )


class Forward(NamedTuple):
    """One forward pass of policy and value model over a micro-batch before any update, (B, T) each."""

    logprobs: Tensor
    values_after: Tensor | None
    """The value after each token."""


@torch.no_grad()
def score(
    models: Models,
    batch: Batch,
    conversations: Sequence[Sequence[Message]],
    plan: list[Minibatch],
    cfg: PpoConfig,
    pad_id: int,
    keep: bool = False,
) -> tuple[Scores, dict[str, float], list[Forward]]:
    """Scores the whole batch: each rank its micro-batches, zeros elsewhere, and then the sum over ranks.

    Args:
        conversations: each row's messages without the response, for reward models that read text.
        plan: the minibatches of the first epoch.
        keep: whether an update of policy and value model follows, which may reuse these passes (`keeps_graphs`).

    Returns:
        The scores; the mean of each reward model, if there are several, as metrics; and the forward passes over the
        first minibatch's micro-batches with their graphs, or none.
    """
    groups = [group for minibatch in plan for group in minibatch.groups]
    first = len(plan[0].groups) if keep and keeps_graphs(plan[0], batch.lengths, cfg) else 0
    cached_forwards: list[Forward] = []
    sums = torch.zeros(3, *batch.mask.shape)
    for number, group in enumerate(groups):
        inputs = to_device(pad([batch.rows[i] for i in group], pad_id))
        with torch.set_grad_enabled(number < first):
            forward = Forward(
                sequence_logprobs(models.policy.engine, inputs, cfg.temperature),
                sequence_values(models.value.engine, inputs) if models.value else None,
            )
        if number < first:
            cached_forwards.append(forward)
        columns = forward.logprobs, reference_logprobs(models, inputs, cfg.temperature), forward.values_after
        width = inputs["input_ids"].shape[1]
        for i, column in enumerate(columns):
            if group and column is not None:
                sums[i, group, :width] = column.detach().float().cpu()
    raw = raw_scores(models.rewards, batch, conversations, groups, cfg)
    reward = combined(raw, models.rewards, cfg.reward_clip)
    old_logprobs, ref_logprobs, values_after = global_sum(sums)
    return (
        Scores(old_logprobs, ref_logprobs, values_after, reward),
        describe(raw, models.rewards),
        cached_forwards,
    )


def keeps_graphs(minibatch: Minibatch, lengths: Sequence[int], cfg: PpoConfig) -> bool:
    """Says whether scoring keeps the graphs of the first minibatch, which saves the update its first forward passes.

    It does if the graphs of both models take no more memory than one full micro-batch of one model. Under ZeRO-3 it
    does not: there, other forward passes may only follow after the backward pass.
    """
    tokens = sum(len(group) * max(lengths[i] for i in group) for group in minibatch.groups if group)
    return cfg.zero_stage < 3 and 2 * tokens <= cfg.micro_batch_tokens


def reference_logprobs(models: Models, inputs: dict[str, Tensor], temperature: float) -> Tensor:
    """(B, T): the reference's log-probabilities (`sequences.sequence_logprobs`)."""
    if models.reference is not None:
        return sequence_logprobs(models.reference, inputs, temperature)
    with models.policy.module.disable_adapter():  # type: ignore[operator]
        return sequence_logprobs(models.policy.engine, inputs, temperature)


@torch.no_grad()
def probe_logprobs(policy: Trained, probes: list[list[int]], cfg: PpoConfig, pad_id: int) -> list[Tensor]:
    """For each probe, log p of its tokens after the first, at temperature 1. Every rank computes all."""
    out: list[Tensor] = [torch.zeros(0)] * len(probes)
    for group in micro_batches([len(ids) for ids in probes], cfg.micro_batch_tokens):
        logprobs = sequence_logprobs(
            policy.engine, to_device(pad([probes[i] for i in group], pad_id)), 1.0
        ).cpu()
        for i, row in zip(group, logprobs, strict=True):
            out[i] = row[1 : len(probes[i])]
    return out


def logprob_gap(scores: Scores, batch: Batch) -> float:
    """Mean |log p of the engine - log p of the trainer| over the sampled tokens."""
    gaps = ((scores.old_logprobs - batch.engine_logprobs) * batch.mask).abs()
    return float(gaps.sum() / batch.mask.sum())


def check_gap(scores: Scores, batch: Batch, fresh: bool, cfg: PpoConfig) -> dict[str, float]:
    """Compares the engine's log-probabilities with the trainer's; returns the metric.

    Args:
        fresh: whether the engine sampled with the very weights that the trainer has. If not, the two may differ.

    Raises:
        Stopped: fresh ones differ by more than `ppo.max_logprob_gap`.
    """
    gap = logprob_gap(scores, batch)
    if not fresh:
        return {"rollout/stale_gap": gap}
    if not gap <= cfg.max_logprob_gap:
        raise Stopped(
            f"engine and trainer differ by {gap:.3g} in mean log-probability, more than ppo.max_logprob_gap="
            f"{cfg.max_logprob_gap:g}; see that both run in the same dtype"
        )
    return {"rollout/logprob_gap": gap}


def difference(new: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """The largest |new - old| over the tokens of the mask, as a tensor: to read it, the host waits for the GPU."""
    return ((new.detach() - old) * mask).abs().max()


def check_ratio(worst: float, cfg: PpoConfig) -> None:
    """Checks that, before the first step of an update, the policy still gives the old log-probabilities.

    Args:
        worst: the largest `difference` between the two.

    Raises:
        RuntimeError: it is more than rounding.
    """
    if not worst <= RATIO_TOLERANCE[cfg.precision]:
        raise RuntimeError(
            f"the ratio is not 1 at the first minibatch: log-probabilities differ by {worst:.3g}"
        )
