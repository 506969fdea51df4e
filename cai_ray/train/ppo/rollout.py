"""Rollouts for PPO: vLLM engines in Ray actors of their own, token ids in and token ids out.

The driver makes the `Keeper`, which owns a placement group and the engines in it, before training starts: actors
made by a training worker would die with it. Rank 0 of every start of the training group makes a `Pool`, which
joins the keeper and so raises the sync epoch. An engine answers only for the epoch and version that it is asked
for. One that dies or passes its deadline is killed, replaced and sent the weights again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cai_ray.cluster.holder import Holder
from cai_ray.cluster.placement import ResourceNeed, bundle, check, marks
from cai_ray.config.run import RunConfig
from cai_ray.storage.models import local_model
from cai_ray.train.weights.sync import WORKER, Held, Packed
from cai_ray.train.weights.transfer import Way

START_S = 1800.0
"""How long an engine may take to start: a large model is read from a slow disk."""


class StaleError(RuntimeError):
    """An engine was asked for an epoch or version that it does not have."""


class Rollout(NamedTuple):
    """One sampled response."""

    ids: list[int]
    """The response's tokens as the engine produced them, the end of the turn included."""
    logprobs: list[float]
    """Of each token under the distribution it was drawn from (temperature applied)."""
    truncated: bool
    """Whether the length limit ended it."""
    version: int
    """The weights it was sampled with."""


class Request(NamedTuple):
    ids: list[int]
    seed: int


class RolloutEngine:
    """vLLM in this process. Deterministic: a request's result depends on its ids, its seed and the weights.

    Args:
        model: the folder that the policy starts from, on any file system.
        arguments: vLLM's (`engine.vllm.engine_args`).
        end_id: the token that ends a turn (`prompts.Renderer.end_id`).
        way: how weights come (transfer.py).
    """

    def __init__(self, model: str, arguments: dict[str, Any], end_id: int, way: Way = "ray"):
        self.held = Holder()
        # Before vllm is imported. One process, one batch at a time: that is what makes it deterministic.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        if way != "ray":
            from vllm.config import WeightTransferConfig

            import cai_ray.train.weights.worker  # noqa: F401  # registers what vLLM does not have

            arguments = arguments | {"weight_transfer_config": WeightTransferConfig(backend=way)}
        self.llm = LLM(
            **(
                arguments
                | {
                    "model": local_model(model),
                    "skip_tokenizer_init": True,
                    # Of the distribution sampled from: raw ones leave the temperature out.
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
        """Belongs to this epoch from now on, and has no weights until it is sent some."""
        if epoch < self.epoch:
            raise StaleError(f"epoch {epoch} is over; the engine is in {self.epoch}")
        self.epoch, self.version = epoch, None

    def update(self, epoch: int, version: int, chunks: list[Any]) -> None:
        """Loads weights number `version` from object references; until all are in, it has none."""
        import ray

        self._expect(epoch)
        self.version = None
        self.llm.collective_rpc("sync_start")
        for ref in chunks:
            chunk: list[Packed] = ray.get(ref)
            self.llm.collective_rpc("sync_load", args=(chunk,))
        self.llm.collective_rpc("sync_finish")
        self._changed(version)

    def connect(self, epoch: int, init_info: dict[str, Any]) -> None:
        """Joins the trainer's group of communication; returns when all have come."""
        self._expect(epoch)
        self.llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def begin(self, epoch: int) -> None:
        """The weights change from now on; until `finish` it has none."""
        self._expect(epoch)
        self.version = None
        self.llm.collective_rpc("sync_record")
        self.llm.collective_rpc("start_weight_update")

    def receive(self, epoch: int, update_info: Any) -> None:
        self._expect(epoch)
        self.llm.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def finish(self, epoch: int, version: int) -> None:
        self._expect(epoch)
        self.llm.collective_rpc("finish_weight_update")
        self._changed(version)

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

    def report(self, epoch: int, version: int, probes: list[list[int]]) -> tuple[Held, list[list[float]]]:
        """What it holds, and its log-probabilities of the probes' tokens after the first, temperature 1."""
        from vllm import SamplingParams

        self._expect(epoch)
        answers = self.llm.collective_rpc("sync_held")
        digests = dict(answers[0][0])
        for other, _ in answers[1:]:  # where workers differ, none is right
            digests |= {name: -1 for name, value in other.items() if digests.get(name) != value}
        held = Held(self.epoch, self.version, digests, sorted({n for _, names in answers for n in names}))
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in probes], params, use_tqdm=False)
        logprobs = [
            [step[i].logprob for step, i in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, probes, strict=True)
        ]
        self._check_numbers(logprobs)
        return held, logprobs

    def _changed(self, version: int) -> None:
        # Cached keys and values are of the weights before.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset: a request is still running")
        self.version = version

    def _check_numbers(self, rows: Iterable[Sequence[float]]) -> None:
        """A NaN in a block of keys and values would outlive the weights that made it: in the next request that is
        given the block, slots not yet filled are multiplied by zero, which leaves NaN."""
        if any(map(math.isnan, (x for row in rows for x in row))):
            self.llm.collective_rpc("sync_clear_cache")

    def _expect(self, epoch: int, version: int | None = None) -> None:
        if epoch != self.epoch:
            raise StaleError(f"asked for epoch {epoch}; the engine is in {self.epoch}")
        if version is not None and version != self.version:
            raise StaleError(f"asked for weights {version}; the engine has {self.version}")


class EngineSpec(NamedTuple):
    """Makes engine number i in its bundle of the placement group."""

    model: str
    arguments: dict[str, Any]
    end_id: int
    group: Any
    cpus: float
    gpus: float
    mark: dict[str, float]
    way: Way = "ray"

    def __call__(self, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)
        actor = ray.remote(RolloutEngine).options(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            resources=self.mark,
            max_restarts=0,
            scheduling_strategy=place,
        )
        return actor.remote(self.model, self.arguments, self.end_id, self.way)


class Keeper:
    """Owns the engines and counts the epochs; an actor of the driver's, which outlives training workers."""

    def __init__(self, make: EngineSpec, engines: int):
        self._make = make
        self._engines = [make(i) for i in range(engines)]
        self._epoch = 0

    def join(self) -> tuple[int, list[Any]]:
        """A new epoch, and the engines as they are."""
        self._epoch += 1
        return self._epoch, self._engines

    def replace(self, index: int) -> Any:
        """Kills an engine and makes another in its place."""
        import ray

        ray.kill(self._engines[index])
        self._engines[index] = self._make(index)
        return self._engines[index]

    def close(self) -> None:
        import ray
        import ray.util

        for engine in self._engines:
            ray.kill(engine)
        ray.util.remove_placement_group(self._make.group)


def open_pool(
    config: RunConfig, model: str, end_id: int, gpu: bool, beside: Mapping[str, float] | None = None
) -> Any:
    """The keeper of `ppo.rollout_engines` engines, for the driver to hold; the engines start in the background.

    Args:
        beside: what else of the cluster the stage will take (`feedback.needed`).

    Raises:
        InputError: the cluster will never have room for it all.
    """
    import ray
    from ray.util.placement_group import placement_group

    from cai_ray.engine.vllm import engine_args

    check_room(config, gpu, beside)
    engine, ppo = config.rollout_engine, config.ppo
    place = _engine_bundle(config, gpu)
    arguments = engine_args(local_model(model), engine, gpu)
    group = placement_group([place] * ppo.rollout_engines, strategy="PACK")
    mark = marks(config.ray.training_nodes)
    spec = EngineSpec(
        model, arguments, end_id, group, place["CPU"], place.get("GPU", 0), mark, ppo.weight_sync
    )
    return ray.remote(Keeper).options(num_cpus=0).remote(spec, ppo.rollout_engines)


def check_room(config: RunConfig, gpu: bool, beside: Mapping[str, float] | None = None) -> None:
    """Engines and workers run at once: with too little for both, one would wait for the other for ever.

    Raises:
        InputError: the cluster will never have room for it all.
    """
    ppo = config.ppo
    worker = bundle(ppo.cpus_per_worker, 1 if gpu else 0, config.ray.training_nodes)
    needs = [
        ResourceNeed(_engine_bundle(config, gpu), ppo.rollout_engines),
        ResourceNeed(worker, ppo.workers),
    ]
    if beside:
        needs.append(ResourceNeed(beside, 1))
    what = f"ppo.rollout_engines={ppo.rollout_engines} and ppo.workers={ppo.workers}"
    check(config, what, needs, "use fewer of them, or more nodes")


def _engine_bundle(config: RunConfig, gpu: bool) -> dict[str, float]:
    engine = config.rollout_engine
    return bundle(engine.cpus_per_actor, engine.tensor_parallel if gpu else 0, config.ray.training_nodes)


def close_pool(keeper: Any) -> None:
    """Ends the engines and frees their resources."""
    import ray

    ray.get(keeper.close.remote(), timeout=60)
    ray.kill(keeper)


class Pool:
    """Rank 0's hold on the engines during one start of the training group.

    Args:
        keeper: from `open_pool`.
        deadline_s: how long one call may take; an engine that takes longer is replaced.
    """

    def __init__(self, keeper: Any, deadline_s: float):
        import ray

        self._keeper = keeper
        self._deadline = deadline_s
        self.epoch, self._engines = ray.get(keeper.join.remote(), timeout=START_S)
        self._sent: tuple[list[Any], int] | None = None
        self.replaced = 0
        self._each("join", [()] * len(self._engines), START_S)

    def update(self, refs: list[Any], version: int) -> None:
        """Loads the chunks behind object references into every engine. They are kept for engines made later."""
        self._sent = (refs, version)
        self._each("update", [(version, refs)] * len(self._engines))

    def sample(
        self, requests: Sequence[Request], version: int, temperature: float, max_tokens: int
    ) -> list[Rollout]:
        """One rollout per request, in their order, spread over the engines."""
        n = len(self._engines)
        parts = [list(requests[i::n]) for i in range(n)]
        answers = self._each("sample", [(version, part, temperature, max_tokens) for part in parts])
        rollouts: list[Any] = [None] * len(requests)
        for i, answer in enumerate(answers):
            rollouts[i::n] = answer
        return rollouts

    @property
    def size(self) -> int:
        return len(self._engines)

    def ask(self, method: str, arguments: list[tuple[Any, ...]]) -> None:
        """One call of every engine, in which they may wait for one another: none is replaced.

        Raises:
            RayActorError, GetTimeoutError: one died or is late.
        """
        import ray

        calls = [
            getattr(engine, method).remote(self.epoch, *given)
            for engine, given in zip(self._engines, arguments, strict=True)
        ]
        ray.get(calls, timeout=self._deadline)

    def report(self, probes: Sequence[Sequence[int]], version: int) -> list[tuple[Held, list[list[float]]]]:
        """Every engine's (`RolloutEngine.report`)."""
        return self._each("report", [(version, [list(p) for p in probes])] * len(self._engines))

    def _each(
        self, method: str, arguments: list[tuple[Any, ...]], deadline_s: float | None = None
    ) -> list[Any]:
        """Calls every engine at once. One that dies or is late is replaced, and asked once more."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        def call(i: int) -> Any:
            return getattr(self._engines[i], method).remote(self.epoch, *arguments[i])

        calls = [call(i) for i in range(len(self._engines))]
        until = time.monotonic() + (deadline_s or self._deadline)
        answers: list[Any] = []
        for i, pending in enumerate(calls):
            try:
                answers.append(ray.get(pending, timeout=max(0.0, until - time.monotonic())))
            except (RayActorError, GetTimeoutError):
                self._replace(i, weights=method != "update")
                # A second failure is not caught: the group starts anew from its last checkpoint.
                answers.append(ray.get(call(i), timeout=self._deadline))
        return answers

    def _replace(self, index: int, weights: bool) -> None:
        import ray

        self.replaced += 1
        self._engines[index] = ray.get(self._keeper.replace.remote(index), timeout=START_S)
        ray.get(self._engines[index].join.remote(self.epoch), timeout=START_S)
        if weights and self._sent is not None:
            refs, version = self._sent
            ray.get(self._engines[index].update.remote(self.epoch, version, refs), timeout=self._deadline)
