"""The policies behind the OpenAI API: Ray Serve LLM's deployment, with the engine settings of the run."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.llm import LLMConfig

from cai_ray.cluster.connect import prepare_engine, uses_gpu
from cai_ray.cluster.threads import Crowd
from cai_ray.compat.ray_serve_llm import EngineServer
from cai_ray.compat.vllm_process import import_for_engine
from cai_ray.config.run import RunConfig
from cai_ray.engine.vllm import engine_args
from cai_ray.errors import InputError
from cai_ray.prompts.models import run_renderer
from cai_ray.serve.settings import ServeSettings
from cai_ray.storage import files
from cai_ray.storage.models import model_sha
from cai_ray.storage.run import Run

# The ranks that vLLM (0.29) makes room for. An adapter of another rank uses the next one.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Policy(EngineServer):
    """One policy and its adapters. Its files are fetched to the node where it runs, from wherever the run is."""

    async def __init__(  # type: ignore[misc]  # as its base class
        self, llm_config: LLMConfig, run: Run, role: str, settings: ServeSettings, crowd: Crowd
    ) -> None:
        gpu = uses_gpu(run.config)
        prepare_engine(run.config.engine, gpu, crowd)
        if not gpu:
            import_for_engine()
        model = await asyncio.to_thread(run.model, role)
        renderer = await asyncio.to_thread(run_renderer, run, role, model)
        self.identity = {
            "sha": await asyncio.to_thread(model_sha, run.locate(role)),
            "control": renderer.control_texts(),
        }
        # This description also has what only the model's files say, which the driver could not read.
        llm_config = await asyncio.to_thread(
            describe_policy, run, role, settings, model, runtime_env=llm_config.runtime_env
        )
        # The files are here. Ray's task that would fetch them leaves an idle process of half a GiB at every start.
        llm_config.get_or_create_callback().ctx.run_init_node = False
        await super().__init__(llm_config)

    def describe(self) -> dict[str, Any]:
        """Content hash of the model, and its control tokens as text."""
        return self.identity


def adapters_of(role: str, settings: ServeSettings) -> dict[str, str]:
    """A policy's adapters. All adapters belong to the first policy."""
    return settings.adapters if role == settings.models[0] else {}


def describe_policy(
    run: Run,
    role: str,
    settings: ServeSettings,
    model: str | None = None,
    *,
    runtime_env: dict[str, Any] | None = None,
) -> LLMConfig:
    """Ray Serve LLM's description of a policy.

    Args:
        model: a local folder or an id, on the node where the policy runs; None on the machine that places it.
        runtime_env: that of the replicas; None on a cluster that was started with their environment.
    """
    config = run.config
    gpu = uses_gpu(config)
    bundle = {"CPU": config.engine.cpus_per_actor, **({"GPU": 1} if gpu else {})}
    engine: dict[str, Any] = {
        "tensor_parallel_size": config.engine.tensor_parallel,
        "pipeline_parallel_size": config.engine.pipeline_parallel,
    }
    if model is not None:
        engine = _engine(model, config) | _template(run, role, model)
        # vLLM limits every answer to this, and to what the context has room for.
        engine["override_generation_config"] = {"max_new_tokens": settings.max_tokens}
        if adapters := adapters_of(role, settings):
            engine |= _lora(adapters)
    return LLMConfig(
        model_loading_config={"model_id": role, "model_source": model or role},
        accelerator_config={"kind": "gpu" if gpu else "cpu"},
        placement_group_config={"bundles": [bundle] * config.engine.span},
        engine_kwargs=engine,
        deployment_config={
            **settings.policy.options(),
            "max_ongoing_requests": 4 * config.engine.max_num_seqs,
            "graceful_shutdown_timeout_s": settings.drain_s,
        },
        runtime_env=runtime_env,
    )


def _engine(model: str, config: RunConfig) -> dict[str, Any]:
    args = engine_args(model, config.engine, uses_gpu(config))
    del args["model"]
    args.pop("distributed_executor_backend", None)  # Ray Serve LLM chooses it
    args["disable_log_stats"] = False  # these are the engine's metrics
    return args


def _template(run: Run, role: str, model: str) -> dict[str, Any]:
    """The chat template with the run's arguments and date, unless it is the model's own as it is."""
    renderer = run_renderer(run, role, model)
    template = renderer.served_template()
    return {} if template == renderer.tokenizer.chat_template else {"chat_template": template}


def _lora(adapters: dict[str, str]) -> dict[str, Any]:
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    folders = {name: files.local_folder(path) for name, path in adapters.items()}
    return {
        "enable_lora": True,
        # One slot more than adapters: if all slots are filled, vLLM's CPU kernels (0.29) use the last slot's adapter
        # for rows without one.
        "max_loras": len(folders) + 1,
        "max_lora_rank": next(r for r in _RANKS if r >= max(map(adapter_rank, folders.values()))),
        "lora_modules": [LoRAModulePath(name=name, path=path) for name, path in folders.items()],
    }


def adapter_rank(folder: str) -> int:
    """Rank of an adapter, from PEFT's adapter_config.json.

    Raises:
        InputError: the folder does not hold a LoRA adapter in safetensors.
    """
    config = files.join(folder, "adapter_config.json")
    if not files.exists(config):
        raise InputError(f"adapter {folder}: has no adapter_config.json; give a folder as PEFT saves it")
    if not files.exists(files.join(folder, "adapter_model.safetensors")):
        raise InputError(f"adapter {folder}: has no adapter_model.safetensors; save it as safetensors")
    try:
        rank = int(files.read_json(config)["r"])
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"adapter {folder}: adapter_config.json has no rank `r`; give a LoRA adapter") from e
    if not 1 <= rank <= _RANKS[-1]:
        raise InputError(f"adapter {folder}: has rank {rank}; vLLM serves ranks up to {_RANKS[-1]}")
    return rank
