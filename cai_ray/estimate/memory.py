"""The memory arithmetic of a configuration: what each stage needs on each GPU, and whether it is there.

Parameters are counted on the model that its config.json describes, without its weights. A trained parameter costs,
in bf16, 2 bytes of weight, 2 of gradient, 4 of fp32 master copy and 8 of Adam's moments: 16, as in fp32 without
the copy. ZeRO divides among the workers (Rajbhandari et al. 2020, arXiv 1910.02054): stage 1 the optimizer's
share, stage 2 gradients too, stage 3 weights too. Frozen models (PPO's reference and reward models) are whole on every
worker. Activations are an estimate from above for a full micro-batch; all else is exact but for allocators.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

from cai_ray.cluster.connect import uses_gpu
from cai_ray.config.engine import EngineConfig
from cai_ray.config.run import RunConfig
from cai_ray.config.training import TrainConfig
from cai_ray.errors import InputError
from cai_ray.stages import ROLES, STAGES, maker_of
from cai_ray.storage import files
from cai_ray.storage.run import Run

GIB = 2**30
# CUDA context, NCCL's buffers and what allocators waste, per process.
_GPU_RESERVE = 2.5 * GIB
# Python with torch, ray and vllm or DeepSpeed in it.
_CPU_PROCESS = 0.9 * GIB
# Share of a GPU that vLLM takes.
_ENGINE_SHARE = 0.92
_NAMES = {"trainer": "training worker", "engine": "engine", "rollouts": "rollout engine"}
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes of a weight that an engine quantises, scales left out; other methods count as not quantised.
_QUANTISED = {"fp8": 1.0, "bitsandbytes": 0.5, "awq": 0.5, "gptq": 0.5, "awq_marlin": 0.5, "gptq_marlin": 0.5}


class Shape(NamedTuple):
    """What of a model counts for memory. `linear`: (inputs, outputs) of each linear layer an adapter can go to."""

    params: int
    layers: int
    hidden: int
    kv: int
    """Numbers that one token's keys (or values) have in one layer."""
    intermediate: int
    vocab: int
    head: int
    """Parameters of the output head, which reward and value models do not have; 0 where it is tied."""
    context: int
    whole_logits: bool
    """Whether training makes all logits of a micro-batch at once (train/models.py)."""
    linear: tuple[tuple[str, int, int], ...]


class Need(NamedTuple):
    """What one process of a stage holds on its GPU (on each, where it spans several), in bytes by part."""

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


def report(config: RunConfig) -> list[str]:
    """The arithmetic as lines to print.

    Raises:
        InputError: a stage does not fit on the GPUs (or into this machine), or a model's config.json is not at hand.
    """
    gpu = uses_gpu(config)
    shapes = partial(shape_of, config)
    needs = estimate(config, shapes, gpu)
    base = shapes("base")
    lines = [
        f"{config.model}: {base.params / 1e9:.3g} B parameters, {base.layers} layers, context {base.context}"
    ]
    if gpu:
        lines += _gpu_lines(config, needs, shapes)
    else:
        lines += _cpu_lines(needs)
    return lines


def estimate(config: RunConfig, shapes: Callable[[str], Shape], gpu: bool) -> list[Need]:
    """What every process of every stage needs."""
    engine, feedback = config.engine, config.label.engine or config.engine
    policy, labels = shapes("sl"), []
    if feedback.kind != "openai":
        labels = [engine_need("label", "engine", shapes(config.label.model), feedback, gpu)]
    if config.method == "dpo":  # its reference is a column of numbers
        last = [Need("dpo", "trainer", config.dpo.workers, 1, trained(policy, config.dpo, gpu))]
    else:
        reward = shapes("rm")
        last = [
            Need("rm", "trainer", config.rm.workers, 1, trained(reward, config.rm, gpu, scores=True)),
            Need("ppo", "trainer", config.ppo.workers, 1, _ppo(config, policy, shapes, gpu)),
            engine_need("ppo", "rollouts", policy, config.rollout_engine, gpu, config.ppo.rollout_engines),
        ]
        if config.ppo.watch.asks_feedback and labels:
            last.append(labels[0]._replace(stage="ppo", processes=1))
    return [
        engine_need("revise", "engine", shapes("base"), engine, gpu),
        Need("sft", "trainer", config.sft.workers, 1, trained(policy, config.sft, gpu)),
        engine_need("compare", "engine", policy, engine, gpu),
        *labels,
        *last,
        engine_need("evaluate", "engine", policy, engine, gpu),
    ]


def trained(shape: Shape, cfg: TrainConfig, gpu: bool, scores: bool = False) -> dict[str, float]:
    """Bytes of one trained model on one of `cfg.workers` workers.

    Args:
        scores: a reward or value model, without the head over the vocabulary.
    """
    from cai_ray.train.losses import CHUNK_NUMBERS

    width, n, stage = _WIDTH[cfg.dtype], cfg.workers, cfg.zero_stage
    params = shape.params - (shape.head if scores else 0)
    learns = adapter(shape, cfg) if cfg.lora else params
    params += learns if cfg.lora else 0
    states = learns * (12 if width == 2 else 8) / (n if stage >= 1 else 1)
    tokens = cfg.micro_batch_tokens
    layer = tokens * (10 * shape.hidden + 2 * shape.kv + 4 * shape.intermediate) * width
    kept = (
        tokens * shape.hidden * width * shape.layers + layer
        if cfg.gradient_checkpointing
        else layer * shape.layers
    )
    logits = 0.0
    if not scores:
        # A chunk of logits and of their gradient, in fp32 and in the model's precision; and the sum of the head's
        # gradient, or, where the model does more to its logits, all of them and their gradient.
        logits = min(tokens * shape.vocab, CHUNK_NUMBERS) * 2.0 * (4 + width)
        logits += 2 * tokens * shape.vocab * width if shape.whole_logits else shape.vocab * shape.hidden * 4
    buffers = 2 * min(5e8, learns) * width if stage >= 1 and n > 1 else 0
    if stage == 3:
        buffers += min(1e9, params) * width  # parameters gathered at once
    return {
        "weights": params * width / (n if stage == 3 else 1),
        "gradients": learns * width / (n if stage >= 2 else 1),
        "optimizer": 0.0 if cfg.offload_optimizer and stage >= 1 else states,
        "activations": kept,
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
    """Policy and value model trained, reference and reward models frozen; their activations take turns."""
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
    parts["frozen"] = frozen * _WIDTH[cfg.dtype]
    return parts


def engine_need(
    stage: str, role: str, shape: Shape, cfg: EngineConfig, gpu: bool, processes: int | None = None
) -> Need:
    """An engine: weights, and the KV cache that it cannot do without, one sequence of full length."""
    width = _WIDTH[engine_dtype(cfg, gpu)]
    context = cfg.max_model_len or shape.context
    cache = 2 * shape.layers * shape.kv * context * width / cfg.span
    parts = {
        "weights": shape.params * _QUANTISED.get(cfg.quantization or "", width) / cfg.span,
        "kv cache": cache if gpu else max(cache, cfg.kv_cache_mb * 2**20),
        "other": _GPU_RESERVE if gpu else _CPU_PROCESS,
    }
    return Need(stage, role, processes or max(cfg.min_actors, cfg.max_actors), cfg.span, parts)


def engine_dtype(cfg: EngineConfig, gpu: bool) -> str:
    return cfg.dtype if cfg.dtype != "auto" else "bfloat16" if gpu else "float32"


def _gpu_lines(config: RunConfig, needs: list[Need], shapes: Callable[[str], Shape]) -> list[str]:
    have, gib = _gpus(config)
    lines = []
    for need in needs:
        line = _line(need)
        if gib is not None:
            line += f" of {gib:.0f} GiB"
            if need.role != "trainer":
                line += f", {_sequences(need, shapes, config, gib)} sequences at once"
        lines.append(line)
    if have is None or gib is None:
        return [*lines, "set check.gpus and check.gpu_gib to compare this with the cluster's GPUs"]
    found = faults(needs, have, gib)
    if found:
        raise InputError(f"{found[0]}; {_remedies(config, shapes, needs, have, gib)}")
    return [*lines, f"fits on {have} GPUs of {gib:.0f} GiB"]


def faults(needs: list[Need], have: int, gib: float) -> list[str]:
    """What does not fit, in words."""
    found = []
    for stage in dict.fromkeys(n.stage for n in needs):
        of_stage = [n for n in needs if n.stage == stage]
        wanted = sum(n.processes * n.gpus for n in of_stage)
        if wanted > have:
            found.append(f"{stage} asks for {wanted} GPUs, and there are {have}")
        for need in of_stage:
            room = gib * (_ENGINE_SHARE if need.role != "trainer" else 1.0)
            if need.total > room * GIB:
                parts = " + ".join(f"{k} {v / GIB:.1f}" for k, v in need.parts.items() if v >= 0.05 * GIB)
                found.append(
                    f"{stage}: each {_NAMES[need.role]} needs {need.total / GIB:.1f} GiB ({parts}) on each GPU, "
                    f"and there are {room:.1f}"
                )
    return found


def _remedies(
    config: RunConfig, shapes: Callable[[str], Shape], needs: list[Need], have: int, gib: float
) -> str:
    """Settings that would fit, tried one by one."""
    stage = next(
        n.stage for n in needs if faults([n], have, gib) or faults(_stage(needs, n.stage), have, gib)
    )
    section = stage if STAGES[stage].kind == "trains" else None
    tried: list[dict[str, dict[str, Any]]] = []
    if section:
        rollouts = config.engine.tensor_parallel if section == "ppo" else 0
        for workers in range(1, have + 1):
            change: dict[str, Any] = {"workers": workers, "zero_stage": 3, "gradient_checkpointing": True}
            if rollouts:
                change["rollout_engines"] = (have - workers) // rollouts
            tried.append({section: change})
        tried.append({section: {"zero_stage": 3, "gradient_checkpointing": True, "offload_optimizer": True}})
        tried.append({section: {"lora": {"rank": 64}, "gradient_checkpointing": True}})
    else:
        tried += [{"engine": {"tensor_parallel": n, "max_actors": have // n}} for n in (2, 4, 8) if n <= have]
    fitting = []
    for change in tried:
        changed = _changed(config, change)
        if changed and not faults(_stage(estimate(changed, shapes, True), stage), have, gib):
            ((name, values),) = change.items()
            now = getattr(config, name).model_dump()
            new = {k: v for k, v in values.items() if now.get(k) != v}
            fitting.append(" ".join(f"{name}.{k}={_yaml(v)}" for k, v in new.items()))
    return "what fits: " + ", or ".join(fitting) if fitting else "use a smaller model or larger GPUs"


def _yaml(value: Any) -> str:
    """As it is written after --set."""
    return json.dumps(value)


def _stage(needs: list[Need], stage: str) -> list[Need]:
    return [n for n in needs if n.stage == stage]


def _changed(config: RunConfig, change: dict[str, dict[str, Any]]) -> RunConfig | None:
    data = config.model_dump()
    for section, values in change.items():
        data[section].update(values)
    try:
        return RunConfig.model_validate(data)
    except ValueError:  # such as a batch that so many workers cannot share
        return None


def _gpus(config: RunConfig) -> tuple[int | None, float | None]:
    """Number and memory (GiB) of the GPUs: as configured, or this machine's."""
    have, gib = config.check.gpus, config.check.gpu_gib
    if have is None or gib is None:
        import torch

        if torch.cuda.is_available():
            have = have or torch.cuda.device_count()
            gib = gib or torch.cuda.get_device_properties(0).total_memory / GIB
    return have, gib


def _sequences(need: Need, shapes: Callable[[str], Shape], config: RunConfig, gib: float) -> int:
    """Sequences of full length that the KV cache has room for."""
    room = gib * GIB * _ENGINE_SHARE - need.total
    return max(0, 1 + int(room / need.parts["kv cache"]))


def _cpu_lines(needs: list[Need]) -> list[str]:
    import psutil

    have = psutil.virtual_memory().total
    lines = [_line(need) for need in needs]
    for stage in dict.fromkeys(n.stage for n in needs):
        total = sum(n.processes * n.total for n in needs if n.stage == stage)
        if total > have:
            raise InputError(
                f"{stage} needs {total / GIB:.1f} GiB, and this machine has {have / GIB:.1f}; "
                "use fewer workers or actors, a smaller micro_batch_tokens, or a smaller model"
            )
    return [*lines, f"fits into this machine's {have / GIB:.0f} GiB"]


def _line(need: Need) -> str:
    parts = " + ".join(f"{name} {size / GIB:.1f}" for name, size in need.parts.items() if size >= 0.05 * GIB)
    spread = f" over {need.gpus} GPUs" if need.gpus > 1 else ""
    return f"{need.stage:9}{need.role:9}{need.processes:3} x{spread} {parts} = {need.total / GIB:.1f}"


def shape_of(config: RunConfig, role: str) -> Shape:
    """The shape of a model by its role; one that is not trained yet has that of the model it starts from."""
    while stage := maker_of(role, config.method) if role in ROLES else None:
        role = getattr(getattr(config, stage), "init", "sl")
    name = Run(config).model(role)
    fields = config.check.model if name == config.model else None
    return _shape(name, tuple(sorted((k, repr(v)) for k, v in (fields or {}).items())))


@lru_cache(maxsize=16)
def _shape(name: str, fields: tuple[tuple[str, str], ...]) -> Shape:
    import torch
    from transformers import AutoModelForCausalLM

    from cai_ray.train.models import scales_logits

    found = _read_config(name, {k: ast.literal_eval(v) for k, v in fields})
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found)
    except Exception as e:  # whatever the architecture's code makes of impossible numbers
        raise InputError(f"model {name}: its config.json describes no causal language model ({e})") from e
    text = found.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    tied = tied or bool(text.tie_word_embeddings)
    return Shape(
        params=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        kv=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab=text.vocab_size,
        head=0 if tied or output is None else output.weight.numel(),
        context=getattr(text, "max_position_embeddings", 4096),
        whole_logits=scales_logits(text),
        linear=tuple(
            (path.rsplit(".", 1)[-1], module.in_features, module.out_features)
            for path, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not output
        ),
    )


def elsewhere(config: RunConfig) -> bool:
    """Whether the base model is known here by `check.model` alone: it is where the run will be, not on this machine."""
    name = Run(config).model("base")
    return config.check.model is not None and not files.exists(name) and _local_config(name) is None


def _local_config(name: str) -> Any | None:
    """config.json from the folder or the cache."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError):
        return None


def _read_config(name: str, given: dict[str, Any]) -> Any:
    """config.json from the folder or the cache, else the fields given, else from the hub.

    Raises:
        InputError: it is nowhere.
    """
    from transformers import AutoConfig

    here = _local_config(name)
    if here is not None:
        return here
    if "model_type" in given:
        try:
            return AutoConfig.for_model(given.pop("model_type"), **given)
        except (ValueError, TypeError) as e:
            raise InputError(f"check.model: {e}; give the fields of the model's config.json") from e
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise InputError(
            f"model {name}: its config.json is neither in a folder nor in the cache here, and cannot be fetched; "
            "download it, or give its fields (model_type, hidden_size, …) under check.model"
        ) from e
