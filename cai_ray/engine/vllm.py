"""The engine of real runs: vLLM's AsyncLLM, driven by this process."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from cai_ray.cluster.usage import Usage
from cai_ray.compat.vllm_process import UNIPROC, engine_from_fork_server, import_for_engine
from cai_ray.config.engine import EngineConfig
from cai_ray.engine.protocol import Completion, Sampling
from cai_ray.errors import RowError
from cai_ray.prompts.cut import decode_answer
from cai_ray.prompts.messages import Messages
from cai_ray.prompts.models import make_renderer
from cai_ray.storage.models import ResolvedModel, context_length


def engine_args(model: str, config: EngineConfig, gpu: bool) -> dict[str, Any]:
    """vLLM's arguments, shared by the generation engine, the rollout engine and the server."""
    args: dict[str, Any] = {
        "model": model,
        "dtype": config.dtype if config.dtype != "auto" or gpu else "float32",
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "quantization": config.quantization,
        "disable_log_stats": True,
        "trust_remote_code": False,
        "enable_prefix_caching": True,
    }
    if config.max_model_len:
        args["max_model_len"] = config.max_model_len
    if config.block_size:
        args["block_size"] = config.block_size
    if not gpu:
        # Compiling costs more than it saves on CPU. A seeded request whose prefill is chunked kills the CPU engine
        # (0.29), so a prefill is never chunked; the batch must then hold the longest prompt.
        context = config.max_model_len or model_context(model)
        if config.span == 1:
            # The engine's own process does the work. vLLM would start one more process for it, to bind its threads to
            # cores; here the environment sets the threads (OMP_NUM_THREADS), and a start takes a third less time.
            args["distributed_executor_backend"] = UNIPROC
        args |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": config.kv_cache_mb << 20,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, context),
        }
    return args | config.extra


def model_context(model: str) -> int:
    """The context length of a model, or 4096 if its config.json names none."""
    return context_length(model) or 4096


class VllmEngine:
    """Renders messages itself (cai_ray.prompts) and gives vLLM token ids.

    Raises:
        InputError: the model has no tokenizer or chat template.
        RowError: from a call, the prompt leaves no room in the context.
    """

    def __init__(self, model: ResolvedModel, gpu: bool = False):
        if not gpu:
            import_for_engine()
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind

        from cai_ray.compat.vllm_engine import AsyncLLM

        folder = model.fetch()
        self.renderer = make_renderer(model, folder)
        args = AsyncEngineArgs(**engine_args(folder, model.engine, gpu), skip_tokenizer_init=True)
        with nullcontext() if gpu else engine_from_fork_server():
            self.llm = AsyncLLM.from_engine_args(args)
        self.context: int = self.llm.model_config.max_model_len
        self._params = SamplingParams
        self._final = RequestOutputKind.FINAL_ONLY
        self._numbers = itertools.count()
        self._generated = 0

    async def chat(self, messages: Messages, sampling: Sampling) -> Completion:
        output, finished = await self._generate(self.renderer.prompt_ids(messages), sampling)
        written = decode_answer(self.renderer, output.outputs[0].token_ids, truncated=not finished)
        # With the beginning of the thought, whoever wrote it: what is read is the whole turn.
        text = self.renderer.begun_thought(messages) + written
        return Completion(text.strip(), finished, _usage(output))

    async def choose(self, messages: Messages, options: Sequence[str]) -> tuple[list[float], Usage]:
        ids = self.renderer.option_ids(options, after=messages)
        # The options are asked for by id, so none can be missing from a list of the likeliest tokens.
        output = await self._request(
            self.renderer.question_ids(messages), max_tokens=1, allowed_token_ids=ids, logprob_token_ids=ids
        )
        logprobs = output.outputs[0].logprobs[0]
        return [logprobs[i].logprob for i in ids], _usage(output)

    def tokens(self) -> int:
        from cai_ray.compat.vllm_engine import tokens_under_way

        return self._generated + tokens_under_way(self.llm)

    async def close(self) -> None:
        self.llm.shutdown()

    async def _generate(self, ids: list[int], sampling: Sampling, **params: Any) -> tuple[Any, bool]:
        room = self.context - len(ids)
        output = await self._request(
            ids,
            temperature=sampling.temperature,
            seed=sampling.seed,
            max_tokens=max(1, min(sampling.max_tokens, room)),
            stop_token_ids=[self.renderer.end_id],
            **params,
        )
        return output, output.outputs[0].finish_reason == "stop"

    async def _request(self, ids: list[int], **params: Any) -> Any:
        from cai_ray.compat.vllm_engine import EngineDeadError

        if len(ids) >= self.context:
            raise RowError(f"prompt of {len(ids)} tokens does not fit the context of {self.context}")
        request = self._params(detokenize=False, output_kind=self._final, **params)
        output = None
        try:
            stream = self.llm.generate({"prompt_token_ids": ids}, request, f"r{next(self._numbers)}")
            async for answer in stream:  # only one, since only the final output is asked for
                output = answer
        except EngineDeadError:
            # An exception would be retried on the same dead engine. When the process ends, Ray starts another.
            os._exit(1)
        except ValueError as e:
            raise RowError(f"refused by the engine: {e}") from e
        if output is None:
            raise RowError("the engine gave no output")
        self._generated += len(output.outputs[0].token_ids)
        return output


def _usage(output: Any) -> Usage:
    return Usage(
        len(output.prompt_token_ids), output.num_cached_tokens or 0, len(output.outputs[0].token_ids), 1
    )
