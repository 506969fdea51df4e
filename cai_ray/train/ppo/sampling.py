"""PPO's prompts, and the responses to them: which, when, and by which weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from cai_ray.config.ppo import PpoConfig
from cai_ray.data.sources import read_prompts
from cai_ray.errors import InputError, RowError
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage.records import derive_seed
from cai_ray.storage.run import Run
from cai_ray.train.ppo.experience import draw
from cai_ray.train.ppo.rewards import Reader
from cai_ray.train.ppo.rollout import Pool, Request, Rollout

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

    The engines sample while the trainer goes on: from `start`, when they hold new weights, to `wait`, before they are
    sent the next ones. What they sample is the next step, behind the value model's update; with `ppo.async_steps` the
    one after it, behind a whole step, which is then one version old when it is used (`losses.importance_weights`).

    Args:
        total: the steps of the run.
        step: the first one from here.
        ahead: its responses, where a checkpoint holds them.
    """

    def __init__(
        self,
        pool: Pool,
        prompts: list[Prompt],
        cfg: PpoConfig,
        seed: int,
        total: int,
        step: int = 0,
        ahead: list[Rollout] | None = None,
    ):
        self._pool, self._prompts, self._cfg, self._seed, self._total = pool, prompts, cfg, seed, total
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._sampled: dict[int, Future[list[Rollout]]] = {}
        if ahead is not None:
            self._sampled[step] = Future()
            self._sampled[step].set_result(ahead)
        self._seconds: dict[int, float] = {}
        self.seconds = 0.0
        """How long the engines took for the step taken last."""

    def start(self, version: int) -> None:
        """The engines hold weights number `version`, and sample what is to be sampled by these."""
        for step in range(version, min(version + self._cfg.async_steps + 1, self._total)):
            if step not in self._sampled:
                self._sampled[step] = self._thread.submit(self._sample, step, version)

    def take(self, step: int) -> tuple[list[Prompt], list[Rollout]]:
        """The step's prompts and one response for each, as soon as they are there."""
        rollouts = self._sampled.pop(step).result()
        self.seconds = self._seconds.pop(step, 0.0)
        return step_prompts(self._prompts, self._cfg, step, self._seed), rollouts

    def wait(self) -> None:
        """Until the engines are idle.

        Raises:
            Exception: what sampling has failed with.
        """
        for sampled in self._sampled.values():
            sampled.result()

    def ahead(self, step: int) -> list[Rollout] | None:
        """The responses to go into the checkpoint before a step: those by weights that no engine has any more.

        Those by the weights that the checkpoint holds are sampled again, and are the same.
        """
        return self._sampled[step].result() if self._cfg.async_steps and step in self._sampled else None

    def _sample(self, step: int, version: int) -> list[Rollout]:
        started = time.perf_counter()
        rollouts = sample(self._pool, self._prompts, self._cfg, step, self._seed, version)
        self._seconds[step] = time.perf_counter() - started
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
