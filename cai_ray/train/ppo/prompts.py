"""PPO's prompts: read from the sources, encoded, and drawn for each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cai_ray.config.ppo import PpoConfig
from cai_ray.data.sources import read_prompts
from cai_ray.errors import InputError, RowError
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.models import run_renderer
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage.run import Run
from cai_ray.train.ppo.experience import draw
from cai_ray.train.ppo.rewards import Reader

Prompt = dict[str, Any]
"""`id`, `messages`, `kind`, `family`, and `ids`, the tokens up to where the policy begins to write."""


def read_training_prompts(
    run: Run, renderer: Renderer, readers: Sequence[Reader] = ()
) -> tuple[list[Prompt], int]:
    """The training prompts with their token ids, and how many do not fit the context or cannot be encoded.

    Args:
        readers: readers of the reward models that read text (`rewards.make_readers`).

    Raises:
        InputError: no prompt is left, or a row would not fit a micro-batch.
    """
    config, cfg = run.config, run.config.ppo
    rows = [r for r in read_prompts(cfg.prompts or config.prompts, config.seed) if r["split"] == "train"]
    ready = encode_prompts(run, renderer, rows, readers)
    context = policy_context(run)
    if not ready:
        raise InputError(
            f"ppo: none of {len(rows)} training prompts can be encoded and fits the context of {context} tokens"
        )
    longest = min(context, max(len(r["ids"]) for r in ready) + cfg.max_tokens)
    if longest > cfg.micro_batch_tokens:
        raise InputError(
            f"ppo.micro_batch_tokens={cfg.micro_batch_tokens} is less than the longest row can be; "
            f"use {longest} or more"
        )
    return ready, len(rows) - len(ready)


def encode_prompts(
    run: Run, renderer: Renderer, rows: Sequence[Mapping[str, Any]], readers: Sequence[Reader]
) -> list[Prompt]:
    """Rows that the policy and every reward model can read."""
    templates, context = load_templates(run.config.templates), policy_context(run)
    ready = []
    for row in rows:
        try:
            ids = renderer.prompt_ids(templates.answer_messages(row["messages"]))
            for reader in readers:
                reader(row["messages"], (), False)
        except RowError:  # such as roles that a chat template refuses
            continue
        if len(ids) < context:
            ready.append({"ids": ids} | {key: row[key] for key in ("id", "messages", "kind", "family")})
    return ready


def policy_renderer(run: Run) -> Renderer:
    """Renders as the SL-CAI policy, which PPO starts from, was trained."""
    return run_renderer(run, "sl")


def policy_context(run: Run) -> int:
    """Tokens of the policy's context in the engines."""
    from cai_ray.engine.vllm import model_context

    return run.config.engine.max_model_len or model_context(run.model("sl"))


def step_prompts(prompts: list[Prompt], cfg: PpoConfig, step: int, seed: int) -> list[Prompt]:
    """The prompts of a step, each `ppo.group` times in a row."""
    start = step * cfg.rollout_batch
    drawn = draw(len(prompts), start // cfg.group, cfg.rollout_batch // cfg.group, seed)
    return [prompts[i] for i in drawn for _ in range(cfg.group)]
