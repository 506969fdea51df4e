"""A rollout engine that tests share: its start costs 8 s, joining it costs nothing."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cai_ray.config.run import RunConfig
from cai_ray.prompts.renderer import Renderer
from cai_ray.town import BASE
from cai_ray.train.ppo.engine_owner import open_engines
from cai_ray.train.ppo.pool import Pool
from cai_ray.train.weights.state import state_items


class Shared(NamedTuple):
    folder: str
    renderer: Renderer
    owner: Any
    config: RunConfig

    def join(self, deadline_s: float = 120) -> Pool:
        return Pool(self.owner, deadline_s)


def town_config(**changes: Any) -> RunConfig:
    """One thread for each process: tests share few cores."""
    engine = {"max_model_len": 192, "max_num_seqs": 128, "kv_cache_mb": 64, "block_size": 32}
    top = {"name": "tests", "model": "town", "constitution": "errand-town", "templates": "errand-town"}
    settings = top | {"prompts": [{"path": "town:revise"}], "engine": engine} | changes
    for section in ("engine", "sft", "rm", "dpo", "ppo"):
        settings[section] = {"threads": 1, **settings.get(section, {})}
    return RunConfig.model_validate(settings)


@functools.cache
def shared() -> Shared:
    """Made once per session of tests; it ends with the cluster."""
    renderer, config = Renderer(BASE), town_config()
    return Shared(BASE, renderer, open_engines(config, BASE, renderer.end_id, gpu=False), config)


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of a model's tensors as they are sent."""
    return {name: tensor.detach().clone() for name, tensor in state_items(model)}


@torch.no_grad()
def logprobs(model: Any, sequences: list[list[int]], temperature: float = 1.0) -> list[Tensor]:
    """log p of each token after the first, one sequence at a time, from the plain definition."""
    out = []
    for ids in sequences:
        logits = model(torch.tensor([ids])).logits[0, :-1].float() / temperature
        out.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return out
