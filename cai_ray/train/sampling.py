"""PPO's prompts, and the responses to them: which, when, and by which weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from cai_ray.config import PpoConfig
from cai_ray.errors import InputError, RowError
from cai_ray.generate.sources import read_prompts
from cai_ray.prompts import Renderer, load_templates
from cai_ray.records import derive_seed
from cai_ray.storage import Run
from cai_ray.train.experience import draw
from cai_ray.train.rewards import Reader
from cai_ray.train.rollout import Pool, Request, Rollout

Prompt = dict[str, Any]
"""`id`, `messages`, `kind`, `family`, and `ids`, the tokens up to where the policy writes."""


def read(run: Run, renderer: Renderer, readers: Sequence[Reader] = ()) -> tuple[list[Prompt], int]:
    """The training prompts with their token ids, and how many do not fit the context or cannot be encoded.

    Args:
        readers: of the reward models that read text (`rewards.read_by`).

    Raises:
        InputError: none is left, or a row would not fit a micro-batch.
    """
    config, cfg = run.config, run.config.ppo
    rows = [r for r in read_prompts(cfg.prompts or config.prompts, config.seed) if r["split"] == "train"]
    ready = encoded(run, renderer, rows, readers)
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


def encoded(
    run: Run, renderer: Renderer, rows: list[dict[str, Any]], readers: Sequence[Reader]
) -> list[Prompt]:
    """Rows that the policy and every reward model can read."""
    templates, context = load_templates(run.config.templates), policy_context(run)
    ready = []
    for row in rows:
        try:
            ids = renderer.prompt_ids(templates.answer_messages(row["messages"]))
            for reader in readers:
                reader(row["messages"], (), False)
        except RowError:  # such as roles that the chat template refuses
            continue
        if len(ids) < context:
            ready.append({"ids": ids} | {key: row[key] for key in ("id", "messages", "kind", "family")})
    return ready


def policy_context(run: Run) -> int:
    from cai_ray.engine.vllm import model_context

    return run.config.engine.max_model_len or model_context(run.model("sl"))


class Sampler:
    """Rank 0's: gives the loop the prompts of each step and the responses to them.

    With `ppo.async_steps` the next step's responses are sampled while this step's are trained on, by the weights that
    this step starts from: one step old when they are used (`losses.importance_weights`). The engines are then busy from
    `take` to `wait`, and must not be sent weights in between.

    Args:
        total: the steps of the run.
        ahead: responses of the first step, where a checkpoint holds them.
    """

    def __init__(
        self,
        pool: Pool,
        prompts: list[Prompt],
        cfg: PpoConfig,
        seed: int,
        total: int,
        ahead: list[Rollout] | None = None,
    ):
        self._pool, self._prompts, self._cfg, self._seed, self._total = pool, prompts, cfg, seed, total
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._pending: Future[list[Rollout]] | None = None
        self.ahead = ahead
        """Responses that are sampled and not taken yet: part of a checkpoint."""
        self.seconds = 0.0
        """Of the last call of the engines."""

    def take(self, step: int) -> tuple[list[Prompt], list[Rollout]]:
        """The step's prompts and one response for each. The engines hold weights number `step`."""
        rollouts, self.ahead = self.ahead, None
        if rollouts is None:
            rollouts = self._sample(step, version=step)
        if self._cfg.async_steps and step + 1 < self._total:
            self._pending = self._thread.submit(self._sample, step + 1, step)
        return step_prompts(self._prompts, self._cfg, step, self._seed), rollouts

    def wait(self) -> None:
        """Until the engines are idle.

        Raises:
            Exception: what sampling ahead has failed with.
        """
        if self._pending is not None:
            self.ahead, self._pending = self._pending.result(), None

    def _sample(self, step: int, version: int) -> list[Rollout]:
        started = time.perf_counter()
        rollouts = sample(self._pool, self._prompts, self._cfg, step, self._seed, version)
        self.seconds = time.perf_counter() - started
        return rollouts


def step_prompts(prompts: list[Prompt], cfg: PpoConfig, step: int, seed: int) -> list[Prompt]:
    start = step * cfg.rollout_batch
    drawn = draw(len(prompts), start // cfg.group, cfg.rollout_batch // cfg.group, seed)
    return [prompts[i] for i in drawn for _ in range(cfg.group)]


def sample(
    pool: Pool, prompts: list[Prompt], cfg: PpoConfig, step: int, seed: int, version: int
) -> list[Rollout]:
    """One response for each prompt of a step."""
    start, rows = step * cfg.rollout_batch, step_prompts(prompts, cfg, step, seed)
    requests = [
        Request(row["ids"], derive_seed(seed, "rollout", row["id"], start + i)) for i, row in enumerate(rows)
    ]
    return pool.sample(requests, version, cfg.temperature, cfg.max_tokens)
