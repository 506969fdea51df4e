"""Makes the engine that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai_ray.storage.models import ResolvedModel
from cai_ray.engine.protocol import Engine


def make_engine(model: ResolvedModel, gpu: bool) -> Engine:
    """Starts a model's engine on this process's node."""
    if model.engine.kind == "vllm":
        from cai_ray.engine.vllm import VllmEngine

        return VllmEngine(model, gpu)
    if model.engine.kind == "openai":
        from cai_ray.engine.openai import OpenaiEngine

        return OpenaiEngine(model)
    from cai_ray.engine.scripted import ScriptedEngine

    return ScriptedEngine()
