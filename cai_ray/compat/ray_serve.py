"""Parts of Ray Serve LLM that have no public interface: how it starts an engine, and how its ingress names models.

Written for Ray 2.60 with vLLM 0.29.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig
from ray.serve.llm.ingress import OpenAiIngress

from cai_ray.compat.vllm_cpu import UNIPROC, engine_from_fork_server


class ServedEngine(VLLMEngine):
    """On a CPU the engine runs as everywhere else here: in one process, which comes from a fork server."""

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


def skip_download(config: LLMConfig) -> None:
    """For a model whose files are here: leaves out Ray's task that would fetch them.

    The task leaves an idle process of half a GiB behind at every start.
    """
    config.get_or_create_callback().ctx.run_init_node = False


class NamedModels(OpenAiIngress):
    """Ray Serve LLM's OpenAI routes, for deployments by name. Of the models' cards only the names are used."""

    def __init__(self, handles: dict[str, Any]):
        super().__init__(handles, dict.fromkeys(handles))

    @property
    def model_names(self) -> list[str]:
        return list(self._model_cards)

    async def resolve_model(self, name: str | None) -> str:
        """The model that a request names, or the only one if it names none. Raises Ray Serve LLM's own exceptions."""
        model: str = await self._get_model_id(name)
        return model
