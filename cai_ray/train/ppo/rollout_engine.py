"""The rollout engine: vLLM in a Ray actor, token ids in and token ids out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from cai_ray.cluster.holder import Holder
from cai_ray.storage.models import local_model
from cai_ray.train.weights.object_store import Packed
from cai_ray.train.weights.proof import EngineWeights
from cai_ray.train.weights.send import Way

WORKER = "cai_ray.train.weights.receive.SyncWorker"
"""The class whose methods vLLM's worker gains (`worker_extension_cls`)."""


class StaleError(RuntimeError):
    """An engine was asked for an epoch or version that it does not have."""


class Rollout(NamedTuple):
    """One sampled response."""

    ids: list[int]
    """The response's tokens as the engine produced them, the end of the turn included."""
    logprobs: list[float]
    """Log-probability of each token under the distribution it was drawn from (temperature applied)."""
    truncated: bool
    """Whether the length limit ended it."""
    version: int
    """The weights it was sampled with."""


class Request(NamedTuple):
    """A prompt to sample one response for."""

    ids: list[int]
    seed: int


class RolloutEngine:
    """vLLM in this process. It is deterministic: a response depends on its request and the weights alone.

    Args:
        model: the folder that the policy starts from, on any file system.
        arguments: vLLM's arguments (`engine.vllm.engine_args`).
        end_id: the token that ends a turn (`Renderer.end_id`).
        way: how weights arrive (weights/send.py).
        prepare: prepares this process for an engine (`cluster.connect.prepare_engine`).

    Raises:
        StaleError: from a call, the engine does not have the epoch or version that was asked for.
    """

    def __init__(
        self,
        model: str,
        arguments: dict[str, Any],
        end_id: int,
        way: Way,
        prepare: Callable[[], None],
    ):
        self.held = Holder()
        prepare()
        # Before vllm is imported. One process, one batch at a time: that is what makes it deterministic.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        if way != "ray":
            from vllm.config import WeightTransferConfig

            from cai_ray.compat.vllm_gloo import register_gloo

            register_gloo()
            arguments = arguments | {"weight_transfer_config": WeightTransferConfig(backend=way)}
        self.llm = LLM(
            **(
                arguments
                | {
                    "model": local_model(model),
                    "skip_tokenizer_init": True,
                    # Those of the distribution sampled from: raw ones ignore the temperature.
                    "logprobs_mode": "processed_logprobs",
                    "worker_extension_cls": WORKER,
                }
            )
        )
        self.end_id = end_id
        self.context: int = self.llm.llm_engine.model_config.max_model_len
        self.epoch = 0
        self.version: int | None = None

    def join(self, epoch: int) -> None:
        """Enters an epoch; the engine has no weights until it is sent some."""
        if epoch < self.epoch:
            raise StaleError(f"epoch {epoch} is over; the engine is in {self.epoch}")
        self.epoch, self.version = epoch, None

    def update(self, epoch: int, version: int, chunks: list[Any]) -> None:
        """Loads weights number `version` from object references; until all are loaded, the engine has none."""
        import ray

        self.load(epoch, version, map(ray.get, chunks))

    def load(self, epoch: int, version: int, chunks: Iterable[list[Packed]]) -> None:
        """Loads weights number `version`, packed as `object_store.pack` does; until all are loaded, it has none."""
        self._expect(epoch)
        self.version = None
        self.llm.collective_rpc("sync_start")
        for chunk in chunks:
            self.llm.collective_rpc("sync_load", args=(chunk,))
        self.llm.collective_rpc("sync_finish")
        self._weights_changed(version)

    def connect(self, epoch: int, init_info: dict[str, Any]) -> None:
        """Joins the trainer's communication group; returns when all have joined."""
        self._expect(epoch)
        self.llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def begin(self, epoch: int) -> None:
        """Begins to receive weights; until `finish` the engine has none."""
        self._expect(epoch)
        self.version = None
        self.llm.collective_rpc("sync_record_loads")
        self.llm.collective_rpc("start_weight_update")

    def receive(self, epoch: int, update_info: Any) -> None:
        """Receives the tensors that vLLM's `update_info` describes."""
        self._expect(epoch)
        self.llm.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def finish(self, epoch: int, version: int) -> None:
        """Ends the load: from now on the engine has weights number `version`."""
        self._expect(epoch)
        self.llm.collective_rpc("finish_weight_update")
        self._weights_changed(version)

    def sample(
        self, epoch: int, version: int, requests: list[Request], temperature: float, max_tokens: int
    ) -> list[Rollout]:
        """One response per request, in their order."""
        from vllm import SamplingParams

        self._expect(epoch, version)
        params = [
            SamplingParams(
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                seed=r.seed,
                max_tokens=min(max_tokens, self.context - len(r.ids)),
                logprobs=0,
                stop_token_ids=[self.end_id],
                detokenize=False,
            )
            for r in requests
        ]
        outputs = self.llm.generate([{"prompt_token_ids": r.ids} for r in requests], params, use_tqdm=False)
        rollouts = []
        for output in outputs:
            out = output.outputs[0]
            ids = list(out.token_ids)
            logprobs = [step[i].logprob for step, i in zip(out.logprobs, ids, strict=True)]
            rollouts.append(Rollout(ids, logprobs, out.finish_reason != "stop", version))
        self._check_numbers(r.logprobs for r in rollouts)
        return rollouts

    def report(
        self, epoch: int, version: int, probes: list[list[int]]
    ) -> tuple[EngineWeights, list[list[float]]]:
        """The weights that the engine holds, and log p of the probes' tokens after the first, at temperature 1."""
        from vllm import SamplingParams

        self._expect(epoch)
        answers = self.llm.collective_rpc("sync_report")
        digests = dict(answers[0][0])
        for other, _ in answers[1:]:  # if workers differ, none is right
            digests |= {name: -1 for name, value in other.items() if digests.get(name) != value}
        held = EngineWeights(
            self.epoch, self.version, digests, sorted({n for _, names in answers for n in names})
        )
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in probes], params, use_tqdm=False)
        logprobs = [
            [step[i].logprob for step, i in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, probes, strict=True)
        ]
        self._check_numbers(logprobs)
        return held, logprobs

    def _weights_changed(self, version: int) -> None:
        # Cached keys and values belong to the weights before.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset: a request is still running")
        self.version = version

    def _check_numbers(self, rows: Iterable[Sequence[float]]) -> None:
        """Clears the cache if a number is NaN: in a block of keys and values, NaN would outlive the weights.

        In the next request that gets the block, slots not yet filled are multiplied by zero, which leaves NaN.
        """
        if any(map(math.isnan, (x for row in rows for x in row))):
            self.llm.collective_rpc("sync_clear_cache")

    def _expect(self, epoch: int, version: int | None = None) -> None:
        if epoch != self.epoch:
            raise StaleError(f"asked for epoch {epoch}; the engine is in {self.epoch}")
        if version is not None and version != self.version:
            raise StaleError(f"asked for weights {version}; the engine has {self.version}")
