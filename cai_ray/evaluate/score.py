"""Rewards of given answers, centred and scaled, in a process of its own."""

from __future__ import annotations

from typing import Any

from cai_ray.cluster import uses_gpu
from cai_ray.storage import Run


def rewards(run: Run, rows: list[dict[str, Any]]) -> list[float]:
    """The run's reward model on `messages` and `response` of each row, in units of its reference deviation."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if uses_gpu(run.config) else 0)(_score)
    return ray.get(task.remote(run, [(r["messages"], r["response"], r["truncated"]) for r in rows]))


def _score(run: Run, rows: list[tuple[list[dict[str, str]], str, bool]]) -> list[float]:
    import torch

    from cai_ray.prompts import Renderer, load_templates
    from cai_ray.train.batches import micro_batches, pad
    from cai_ray.train.models import load_reward_model, reward_scale, score_last, sequence_values

    folder, config = run.model("rm"), run.config
    templates = load_templates(config.templates)
    renderer = Renderer(folder, templates.chat_template)
    device = "cuda" if uses_gpu(config) else "cpu"
    model = load_reward_model(folder, config.rm, trainable=False).to(device)
    scale = reward_scale(folder)
    ids = [
        renderer.dialogue_ids(
            [*templates.answer_messages(messages), {"role": "assistant", "content": response}], truncated
        )[0]
        for messages, response, truncated in rows
    ]
    out = [0.0] * len(rows)
    longest = max((len(i) for i in ids), default=1)
    with torch.inference_mode():
        for group in micro_batches([len(i) for i in ids], max(config.rm.micro_batch_tokens, longest)):
            batch = {k: v.to(device) for k, v in pad([ids[i] for i in group], renderer.pad_id).items()}
            scores = score_last(sequence_values(model, batch), batch["attention_mask"])
            for i, score in zip(group, scores.tolist(), strict=True):
                out[i] = (score - scale.mean) / scale.std
    return out
