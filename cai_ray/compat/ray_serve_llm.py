"""Ray Serve LLM's engine and ingress, as this package uses them.

ray 2.60.0: the engine of an LLM deployment can only be replaced through a private class attribute, and it chooses
vLLM's executor itself. The ingress keeps its models and the resolution of a model's name in private attributes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress

from cai_ray.compat.vllm_process import UNIPROC, engine_from_fork_server


class _Engine(VLLMEngine):
    """On a CPU, vLLM in one process that comes from a fork server, as the other engines of this package."""

    def _prepare_engine_config(self, callback_ctx: Any) -> Any:
        args, frontend, config = super()._prepare_engine_config(callback_ctx)
        if _on_cpu(config):
            config.parallel_config.distributed_executor_backend = UNIPROC
        return args, frontend, config

    def _start_async_llm_engine(self, args: Any, config: Any, placement_group: Any) -> Any:
        with engine_from_fork_server() if _on_cpu(config) else nullcontext():
            return super()._start_async_llm_engine(args, config, placement_group)


def _on_cpu(config: Any) -> bool:
    return config.device_config.device_type == "cpu" and config.parallel_config.world_size == 1


class EngineServer(LLMServer):
    """An LLM deployment with this package's engine."""

    _default_engine_cls = _Engine


class ModelIngress(OpenAiIngress):
    """The OpenAI-compatible ingress, with its models' names."""

    @property
    def model_names(self) -> list[str]:
        """The models and adapters that a request may name."""
        return list(self._model_cards)

    async def model_id(self, model: str | None) -> str:
        """The model that a request's `model` means.

        Raises:
            HTTPException: there is no such model.
        """
        name: str = await self._get_model_id(model)
        return name
