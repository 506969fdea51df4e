"""The memory arithmetic of a configuration: what each process of each stage needs.

Parameters are counted on the model that config.json describes, without its weights. In bf16 a trained parameter costs
16 bytes: 2 of weight, 2 of gradient, 4 of fp32 master copy and 8 of Adam's moments. In fp32 it costs 16, too, without
the master copy. ZeRO divides among the workers (Rajbhandari et al. 2020, arXiv 1910.02054): stage 1 the optimizer's
share, stage 2 also the gradients, stage 3 also the weights. Frozen models (PPO's reference and reward models) are whole
on every worker. Activations are an upper estimate for a full micro-batch; all else is exact but for allocators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cai_ray.config.engine import EngineConfig
from cai_ray.config.judge import PromptedModel
from cai_ray.config.run import RunConfig
from cai_ray.config.training import TrainConfig
from cai_ray.estimate.shape import Shape

GIB = 2**30
# CUDA context, NCCL's buffers and what allocators waste, per process.
_GPU_RESERVE = 2.5 * GIB
# Python with torch, Ray and vLLM or DeepSpeed in it.
_CPU_PROCESS = 0.9 * GIB
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes per weight in a quantised engine, without scales. Other methods count as not quantised.
_QUANTISED = {"fp8": 1.0, "bitsandbytes": 0.5, "awq": 0.5, "gptq": 0.5, "awq_marlin": 0.5, "gptq_marlin": 0.5}


class MemoryNeed(NamedTuple):
    """What one process of a stage holds on its GPU (on each, if it spans several), in bytes by part."""

    stage: str
    role: str
    """`trainer`, `engine` or `rollouts`."""
    processes: int
    gpus: int
    """Per process."""
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def memory_needs(config: RunConfig, shapes: Callable[[str], Shape], gpu: bool) -> list[MemoryNeed]:
    """What every process of every stage needs."""
    engine, policy = config.engine, shapes("sl")
    if config.method == "dpo":  # the reference is a column of numbers
        last = [MemoryNeed("dpo", "trainer", config.dpo.workers, 1, trained(policy, config.dpo, gpu))]
    else:
        reward = shapes("rm")
        last = [
            MemoryNeed("rm", "trainer", config.rm.workers, 1, trained(reward, config.rm, gpu, scores=True)),
            MemoryNeed("ppo", "trainer", config.ppo.workers, 1, _ppo(config, policy, shapes, gpu)),
            engine_need("ppo", "rollouts", policy, config.rollout_engine, gpu, config.ppo.rollout_engines),
        ]
        if config.ppo.watch.asks_judge:
            last += [n._replace(processes=1) for n in _asked("ppo", config, config.watch_judge, shapes, gpu)]
    return [
        engine_need("revise", "engine", shapes("base"), engine, gpu),
        # It starts when the policy has answered.
        *(_asked("reviser", config, reviser, shapes, gpu) if (reviser := config.revise.reviser) else ()),
        MemoryNeed("sft", "trainer", config.sft.workers, 1, trained(policy, config.sft, gpu)),
        engine_need("compare", "engine", policy, engine, gpu),
        *_asked("label", config, config.label.judge, shapes, gpu),
        *last,
        engine_need("evaluate", "engine", policy, engine, gpu),
        # It starts when the policies have answered.
        *(_asked("judge", config, judge, shapes, gpu) if (judge := config.evaluate.judge) else ()),
    ]


def _asked(
    stage: str, config: RunConfig, model: PromptedModel, shapes: Callable[[str], Shape], gpu: bool
) -> list[MemoryNeed]:
    """The engines of a judge or reviser; none if it is at an endpoint."""
    engine = model.engine or config.engine
    return [] if engine.kind == "openai" else [engine_need(stage, "engine", shapes(model.model), engine, gpu)]


def trained(shape: Shape, cfg: TrainConfig, gpu: bool, scores: bool = False) -> dict[str, float]:
    """Bytes of one trained model on one of `cfg.workers` workers.

    Args:
        scores: a reward or value model, without the head over the vocabulary.
    """
    from cai_ray.train.losses import CHUNK_NUMBERS

    width, n, stage = _WIDTH[cfg.precision], cfg.workers, cfg.zero_stage
    params = shape.params - (shape.head if scores else 0)
    trainable = adapter(shape, cfg) if cfg.lora else params
    params += trainable if cfg.lora else 0
    states = trainable * (12 if width == 2 else 8) / (n if stage >= 1 else 1)
    tokens = cfg.micro_batch_tokens
    layer = tokens * (10 * shape.hidden + 2 * shape.kv + 4 * shape.intermediate) * width
    activations = (
        tokens * shape.hidden * width * shape.layers + layer
        if cfg.gradient_checkpointing
        else layer * shape.layers
    )
    logits = 0.0
    if not scores:
        # A chunk of logits and of their gradient, in fp32 and in the model's precision; and the sum of the head's
        # gradient, or, if the model transforms its logits, all of them and their gradient.
        logits = min(tokens * shape.vocab, CHUNK_NUMBERS) * 2.0 * (4 + width)
        logits += 2 * tokens * shape.vocab * width if shape.whole_logits else shape.vocab * shape.hidden * 4
    buffers = 2 * min(5e8, trainable) * width if stage >= 1 and n > 1 else 0
    if stage == 3:
        buffers += min(1e9, params) * width  # parameters gathered at once
    return {
        "weights": params * width / (n if stage == 3 else 1),
        "gradients": trainable * width / (n if stage >= 2 else 1),
        "optimizer": 0.0 if cfg.offload_optimizer and stage >= 1 else states,
        "activations": activations,
        "logits": logits,
        "other": buffers + (_GPU_RESERVE if gpu else _CPU_PROCESS),
    }


def adapter(shape: Shape, cfg: TrainConfig) -> int:
    """Parameters of the LoRA adapter."""
    assert cfg.lora is not None
    targets = cfg.lora.targets
    return sum(
        cfg.lora.rank * (inputs + outputs)
        for name, inputs, outputs in shape.linear
        if targets == "all-linear" or name in targets
    )


def _ppo(config: RunConfig, policy: Shape, shapes: Callable[[str], Shape], gpu: bool) -> dict[str, float]:
    """Bytes of one PPO worker: policy and value model trained, reference and reward models frozen.

    The activations of the two trained models take turns.
    """
    cfg = config.ppo
    rewards = [shapes(source.model) for source in cfg.rewards]
    value = rewards[0] if cfg.value_init == "rm" else policy
    parts, second = trained(policy, cfg, gpu), trained(value, cfg, gpu, scores=True)
    if cfg.advantage == "gae":
        for name in ("weights", "gradients", "optimizer"):
            parts[name] += second[name]
        parts["activations"] = max(parts["activations"], second["activations"])
    # With an adapter the reference is the policy without it.
    frozen = sum(r.params - r.head for r in rewards) + (0 if cfg.lora else policy.params)
    parts["frozen"] = frozen * _WIDTH[cfg.precision]
    return parts


def engine_need(
    stage: str, role: str, shape: Shape, cfg: EngineConfig, gpu: bool, processes: int | None = None
) -> MemoryNeed:
    """What an engine needs: weights, and at least the KV cache of one sequence of full length."""
    width = _WIDTH[engine_dtype(cfg, gpu)]
    context = cfg.max_model_len or shape.context
    cache = 2 * shape.layers * shape.kv * context * width / cfg.span
    parts = {
        "weights": shape.params * _QUANTISED.get(cfg.quantization or "", width) / cfg.span,
        "kv cache": cache if gpu else max(cache, cfg.kv_cache_mb * 2**20),
        "other": _GPU_RESERVE if gpu else _CPU_PROCESS,
    }
    return MemoryNeed(stage, role, processes or max(cfg.min_actors, cfg.max_actors), cfg.span, parts)


def engine_dtype(cfg: EngineConfig, gpu: bool) -> str:
    return cfg.dtype if cfg.dtype != "auto" else "bfloat16" if gpu else "float32"
