"""Rewards of answers, centred and scaled, computed in a process of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from cai_ray.cluster.connect import uses_gpu
from cai_ray.cluster.holder import holding
from cai_ray.cluster.threads import use_threads
from cai_ray.storage.records import Turn
from cai_ray.storage.run import Run

CANNOT_ENCODE = "the reward model cannot encode it"
"""The error of a row without a reward."""


class Dialogue(NamedTuple):
    """A conversation and the response that is to be scored."""

    messages: list[Turn]
    response: str
    truncated: bool


def rewards(run: Run, dialogues: Sequence[Dialogue]) -> list[float | None]:
    """The run's reward of each dialogue, in units of the reward model's reference deviation.

    None where a dialogue cannot be encoded.
    """
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if uses_gpu(run.config) else 0)(_metered)
    return ray.get(task.remote(run, list(dialogues)))


def _metered(run: Run, dialogues: list[Dialogue]) -> list[float | None]:
    with holding():
        use_threads(1 if uses_gpu(run.config) else run.config.rm.threads)
        return _score(run, dialogues)


def _score(run: Run, dialogues: list[Dialogue]) -> list[float | None]:
    import torch

    from cai_ray.prompts.load import load_templates
    from cai_ray.prompts.models import run_renderer
    from cai_ray.train.batches import micro_batches, pad
    from cai_ray.train.dialogues import render
    from cai_ray.train.models import load_reward_model, reward_scale
    from cai_ray.train.sequences import score_last, sequence_values

    folder, config = run.model("rm"), run.config
    templates = load_templates(config.templates)
    renderer = run_renderer(run, "rm", folder)
    device = "cuda" if uses_gpu(config) else "cpu"
    model = load_reward_model(folder, config.rm, trainable=False).to(device)
    scale = reward_scale(folder)
    ids: dict[int, list[int]] = {}
    for i, (messages, response, truncated) in enumerate(dialogues):
        if example := render(renderer, templates, messages, response, sys.maxsize, truncated):
            ids[i] = example.ids
    places, lengths = list(ids), [len(row) for row in ids.values()]
    out: list[float | None] = [None] * len(dialogues)
    with torch.inference_mode():
        for group in micro_batches(lengths, config.rm.micro_batch_tokens):
            chosen = [places[n] for n in group]
            batch = {k: v.to(device) for k, v in pad([ids[i] for i in chosen], renderer.pad_id).items()}
            scores = score_last(sequence_values(model, batch), batch["attention_mask"])
            for i, score in zip(chosen, scores.tolist(), strict=True):
                out[i] = (score - scale.mean) / scale.std
    return out
