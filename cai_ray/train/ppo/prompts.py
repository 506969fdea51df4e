"""PPO's prompts: read from the sources, encoded, and drawn for each step."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cai_ray.config.ppo import PpoConfig
from cai_ray.data.left_out import LeftOut
from cai_ray.data.training import training_prompts
from cai_ray.errors import InputError, RowError
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.models import run_renderer
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run
from cai_ray.train.dialogues import tell_long_rows
from cai_ray.train.ppo.experience import draw
from cai_ray.train.ppo.rewards import Reader

Prompt = dict[str, Any]
"""`id`, `messages`, `kind`, `family`, and `ids`, the tokens up to where the policy begins to write."""


class Prompts:
    """Prompts whose ids are one array: as lists of numbers they would take several times the memory of their texts."""

    def __init__(self, prompts: Iterable[Prompt]):
        self._rows: list[Prompt] = []
        ids, ends = array("i"), array("q", [0])
        for prompt in prompts:
            self._rows.append({key: value for key, value in prompt.items() if key != "ids"})
            ids.extend(prompt["ids"])
            ends.append(len(ids))
        self._ids, self._ends = np.array(ids), np.array(ends)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Prompt:
        ids = self._ids[self._ends[place] : self._ends[place + 1]].tolist()
        return {"ids": ids, **self._rows[place]}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return np.diff(self._ends).tolist()

    @property
    def sha(self) -> str:
        """A hash of the prompts' own ids and their token ids."""
        arrays = [hashlib.sha256(a.tobytes()).hexdigest() for a in (self._ids, self._ends)]
        return derive_id([row["id"] for row in self._rows], arrays)


def read_training_prompts(
    run: Run, renderer: Renderer, readers: Sequence[Reader] = (), left_out: LeftOut | None = None
) -> tuple[Prompts, int]:
    """The training prompts with their token ids, and how many do not fit the context or cannot be encoded.

    Args:
        readers: readers of the reward models that read text (`rewards.make_readers`).
        left_out: counts these prompts (`encode_prompts`), and the rows that are left out before (`training_prompts`).

    Raises:
        InputError: no prompt is left.
    """
    config, cfg = run.config, run.config.ppo
    left_out = LeftOut(config.max_error_rate) if left_out is None else left_out
    rows = training_prompts(config, cfg.prompts, left_out)
    ready = Prompts(encode_prompts(run, renderer, rows, readers, left_out))
    if not ready:
        raise InputError(
            f"ppo: none of {len(rows)} training prompts can be encoded and fits the context of {policy_context(run)} "
            f"tokens and ppo.max_length (left out: {dict(left_out)})"
        )
    tell_long_rows("ppo", [length + cfg.max_tokens for length in ready.lengths], cfg.micro_batch_tokens)
    return ready, len(rows) - len(ready)


def encode_prompts(
    run: Run,
    renderer: Renderer,
    rows: Sequence[Mapping[str, Any]],
    readers: Sequence[Reader],
    left_out: Counter[str] | None = None,
) -> Iterator[Prompt]:
    """Rows that the policy and every reward model can read.

    Args:
        left_out: counts the others: those that are `too_long` for the context, or with `ppo.max_tokens` for
            `ppo.max_length`; and those that a tokenizer or chat template `refused`.
    """
    cfg, templates, context = run.config.ppo, load_templates(run.config.templates), policy_context(run)
    room = min(context - 1, (cfg.max_length or sys.maxsize) - cfg.max_tokens)
    left_out = Counter() if left_out is None else left_out
    for row in rows:
        try:
            ids = renderer.prompt_ids(templates.answer_messages(row["messages"]))
            for reader in readers:
                reader(row["messages"], (), False)
        except RowError:  # such as roles that a chat template refuses
            left_out["refused"] += 1
            continue
        if len(ids) > room:
            left_out["too_long"] += 1
            continue
        yield {"ids": ids} | {key: row[key] for key in ("id", "messages", "kind", "family")}


def policy_renderer(run: Run) -> Renderer:
    """Renders as the SL-CAI policy, which PPO starts from, was trained."""
    return run_renderer(run, "sl")


def policy_context(run: Run) -> int:
    """Tokens of the policy's context in the engines."""
    from cai_ray.engine.vllm import model_context

    return run.config.engine.max_model_len or model_context(run.model("sl"))


def step_prompts(prompts: Prompts, cfg: PpoConfig, step: int, seed: int) -> list[Prompt]:
    """The prompts of a step, each `ppo.group` times in a row."""
    start = step * cfg.rollout_batch
    drawn = draw(len(prompts), start // cfg.group, cfg.rollout_batch // cfg.group, seed)
    return [prompts[i] for i in drawn for _ in range(cfg.group)]
