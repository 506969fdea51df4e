"""PPO's reward: one reward model or several with weights, each in units of its own reference set.

A reward model with the policy's tokenizer reads the very tokens that the policy wrote (docs/method.md, item 14). One
with another tokenizer reads the text, rendered by its own chat template. If that is longer than its context, the
beginning of the conversation is dropped, never the end of the response.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cai_ray.config.ppo import PpoConfig
from cai_ray.errors import InputError
from cai_ray.prompts.cut import decode_answer
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import Message
from cai_ray.prompts.models import run_renderer
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.models import context_length
from cai_ray.storage.run import Run
from cai_ray.train.batches import Example, pad, rank_micro_batches
from cai_ray.train.models import RewardScale, load_reward_model, reward_scale
from cai_ray.train.ppo.experience import Batch
from cai_ray.train.runtime.ranks import device, global_sum, rank, to_device, world_size
from cai_ray.train.sequences import score_last, sequence_values


@dataclass
class Reader:
    """Renders a response for a reward model that has another tokenizer than the policy."""

    policy: Renderer
    renderer: Renderer
    templates: TemplateSet
    limit: int
    """Most tokens: those of its context or of a micro-batch, whichever are fewer."""

    def __call__(self, conversation: Sequence[Message], response: Sequence[int], truncated: bool) -> Example:
        """A conversation and a response in the reward model's tokens.

        Args:
            response: the tokens that the policy wrote.
            truncated: whether the length limit ended it.

        Raises:
            RowError: its chat template refuses the conversation.
        """
        messages = [
            *self.templates.answer_messages(conversation),
            Message(role="assistant", content=decode_answer(self.policy, response, truncated)),
        ]
        ids, mask = self.renderer.dialogue_ids(messages, truncated)
        return Example(ids[-self.limit :], mask[-self.limit :])


@dataclass
class Reward:
    """A frozen reward model and how its scores count."""

    name: str
    model: nn.Module
    scale: RewardScale
    weight: float
    pad_id: int
    reader: Reader | None
    """None if the model has the policy's tokenizer."""


def load_rewards(run: Run, cfg: PpoConfig, policy: Renderer) -> list[Reward]:
    """The reward models of `ppo.rewards`, on this rank's device."""
    return [load_reward(run, cfg, policy, source.model, source.weight) for source in cfg.rewards]


def load_reward(run: Run, cfg: PpoConfig, policy: Renderer, model: str, weight: float = 1.0) -> Reward:
    """A reward model on this rank's device.

    Args:
        policy: the policy's renderer.
        model: a role, folder or id.
    """
    path = run.model(model)
    reader = make_reader(run, cfg, policy, model)
    return Reward(
        name=Path(model).name.partition("@")[0],  # the commit of a hub's model is no part of a metric's name
        model=load_reward_model(path, cfg, trainable=False).to(device()),
        scale=reward_scale(path),
        weight=weight,
        pad_id=(reader.renderer if reader else policy).pad_id,
        reader=reader,
    )


def make_reader(run: Run, cfg: PpoConfig, policy: Renderer, model: str) -> Reader | None:
    """The reader of a reward model; None if it reads the policy's own tokens."""
    templates = load_templates(run.config.templates)
    path = run.model(model)
    renderer = run_renderer(run, model, path)
    if same_tokens(policy, renderer):
        return None
    return Reader(
        policy, renderer, templates, min(context_length(path) or sys.maxsize, cfg.micro_batch_tokens)
    )


def make_readers(run: Run, cfg: PpoConfig, policy: Renderer) -> list[Reader]:
    """Readers of those models of `ppo.rewards` that have another tokenizer than the policy.

    Raises:
        InputError: values are to start from a reward model that reads other tokens than the policy writes.
    """
    readers = [make_reader(run, cfg, policy, source.model) for source in cfg.rewards]
    if cfg.advantage == "gae" and cfg.value_init == "rm" and readers[0] is not None:
        raise InputError(
            f"ppo.value_init=rm: the first of ppo.rewards, {cfg.rewards[0].model}, has another tokenizer than the "
            "policy; use ppo.value_init: policy"
        )
    return [reader for reader in readers if reader is not None]


def same_tokens(one: Renderer, other: Renderer) -> bool:
    """Says whether two models get the same ids for the same conversation."""
    return (
        (one.template, one.template_args) == (other.template, other.template_args)
        and one.end_id == other.end_id
        and one.tokenizer.backend_tokenizer.to_str() == other.tokenizer.backend_tokenizer.to_str()
    )


@torch.no_grad()
def raw_scores(
    rewards: Sequence[Reward],
    batch: Batch,
    conversations: Sequence[Sequence[Message]],
    groups: Sequence[Sequence[int]],
    cfg: PpoConfig,
) -> Tensor:
    """(N, reward models): each model's raw score at each row's last token; the same on every rank.

    Args:
        conversations: each row's messages without the response, for models that read text.
        groups: this rank's micro-batches, for models that read the policy's tokens.
    """
    scores = torch.zeros(len(batch.rows), len(rewards))
    for column, reward in enumerate(rewards):
        rows, shares = batch.rows, groups
        if reward.reader is not None:
            truncated = batch.truncated.tolist()
            written = [list(compress(row.ids, row.mask)) for row in batch.rows]
            rows = [reward.reader(*row) for row in zip(conversations, written, truncated, strict=True)]
            lengths = [len(row.ids) for row in rows]
            shares = rank_micro_batches(lengths, cfg.micro_batch_tokens, rank(), world_size())
        for group in shares:
            if group:
                inputs = to_device(pad([rows[i] for i in group], reward.pad_id))
                last = score_last(sequence_values(reward.model, inputs), inputs["attention_mask"])
                scores[list(group), column] = last.cpu()
    return global_sum(scores)


def combined(raw: Tensor, rewards: Sequence[Reward], clip: float) -> Tensor:
    """(N,): the weighted sum of the scores, each centred, scaled and clipped to ±clip.

    Args:
        raw: (N, reward models), from `raw_scores`.
    """
    mean, std, weight = (
        torch.tensor(column)
        for column in zip(*((r.scale.mean, r.scale.std, r.weight) for r in rewards), strict=True)
    )
    return (((raw - mean) / std).clamp(-clip, clip) * weight).sum(1)


def describe(raw: Tensor, rewards: Sequence[Reward]) -> dict[str, Any]:
    """Each model's mean normalised score as metrics; nothing for a single model."""
    if len(rewards) < 2:
        return {}
    return {
        f"reward/{r.name}": float(((raw[:, i] - r.scale.mean) / r.scale.std).mean())
        for i, r in enumerate(rewards)
    }
