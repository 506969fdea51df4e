"""Makes the engine that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai_ray.config.engine import EngineConfig
    from cai_ray.prompts.templates import TemplateSet
from cai_ray.engine.protocol import Engine


def make_engine(model: str, templates: TemplateSet, config: EngineConfig, gpu: bool) -> Engine:
    """Starts the engine on this process's node."""
    if config.kind == "vllm":
        from cai_ray.engine.vllm import VllmEngine

        return VllmEngine(model, templates, config, gpu)
    if config.kind == "openai":
        from cai_ray.engine.openai import OpenaiEngine

        return OpenaiEngine(model, config)
    from cai_ray.engine.scripted import ScriptedEngine

    return ScriptedEngine()
