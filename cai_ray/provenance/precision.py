"""What `dtype: auto` stands for: decided at a run's first start and kept in run.json.

So a run has one precision from its first stage to its last, wherever it goes on. Everything after this reads the
decided precision, manifests included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from cai_ray.cluster.connect import on_gpu, uses_gpu
from cai_ray.config.engine import EngineConfig
from cai_ray.config.run import RunConfig
from cai_ray.config.section import Section
from cai_ray.config.training import TrainConfig
from cai_ray.errors import InputError
from cai_ray.storage.files import read_object
from cai_ray.storage.run import Run

S = TypeVar("S", bound=Section)

BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""Units that multiply in bfloat16, by their flags in /proc/cpuinfo (x86, and the last one ARM)."""
PRECISIONS = ("float32", "bfloat16", "float16", "auto")
OWN = "auto"
"""What `auto` of an engine on a GPU stays: the checkpoint's own precision."""


class Decided(NamedTuple):
    """A configuration without `dtype: auto`, and how it came about."""

    config: RunConfig
    precision: dict[str, str]
    """The precision of each section whose `dtype` is or was `auto`, by the section's key."""
    line: str
    """Says what `auto` stands for; empty if no section has it."""


def decide_precision(config: RunConfig) -> Decided:
    """Decides what `dtype: auto` stands for in each section, unless the run has decided it before."""
    kept = kept_precision(Run(config))
    precision, used, reasons = dict(kept), dict[str, str](), list[str]()

    def decide(key: str, section: EngineConfig | TrainConfig) -> str:
        reason = "as this run began"
        if key not in precision:
            precision[key], reason = _best(config, section)
        if precision[key] != OWN:
            used[key] = precision[key]
            reasons.append(reason)
        return precision[key]

    decided = _without_auto(config, "", decide)
    return Decided(decided, precision, _line(used, list(dict.fromkeys(reasons))))


def kept_precision(run: Run) -> dict[str, str]:
    """What a run has decided before. Where its run.json is damaged, manifests still tell of another precision."""
    try:
        about = read_object(run.path("run.json"), "") or {}
    except (InputError, OSError):  # storage that cannot be read is reported by the checks that follow
        return {}
    kept = about.get("precision")
    return {k: v for k, v in kept.items() if v in PRECISIONS} if isinstance(kept, dict) else {}


def bf16_unit(cpuinfo: str = "/proc/cpuinfo") -> str | None:
    """The flag of the unit with which this processor multiplies in bfloat16; None without one."""
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as f:
            lines = (line.partition(":") for line in f)
            flags = next((v.split() for k, _, v in lines if k.strip() in ("flags", "Features")), [])
    except OSError:  # not Linux
        return None
    return next((unit for unit in BF16_UNITS if unit in flags), None)


def _best(config: RunConfig, section: EngineConfig | TrainConfig) -> tuple[str, str]:
    """What the device of a section computes with at its fastest, and why."""
    if isinstance(section, EngineConfig):
        if on_gpu(section):
            return OWN, ""
    elif uses_gpu(config):
        import torch

        # The GPUs of a cluster are not seen from a machine without one.
        if not torch.cuda.is_available() or torch.cuda.is_bf16_supported():
            return "bfloat16", "on GPUs"
        return "float32", "this GPU has no units for bfloat16"
    if unit := bf16_unit():
        return "bfloat16", f"this processor has {unit}"
    return "float32", "this processor has no units for bfloat16"


def _without_auto(section: S, key: str, decide: Callable[[str, EngineConfig | TrainConfig], str]) -> S:
    """A section whose own `dtype`, and that of every section in it, is decided."""
    changes: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            inner = _without_auto(value, f"{key}.{name}".lstrip("."), decide)
            if inner is not value:
                changes[name] = inner
    computes = isinstance(section, TrainConfig) or (
        isinstance(section, EngineConfig) and section.kind == "vllm"
    )
    if computes and section.dtype == "auto":  # type: ignore[attr-defined]
        changes["dtype"] = decide(key, section)  # type: ignore[arg-type]
    return section.model_copy(update=changes) if changes else section


def _line(used: Mapping[str, str], reasons: Sequence[str]) -> str:
    if not used:
        return ""
    kinds = sorted(set(used.values()))
    shown = kinds[0] if len(kinds) == 1 else ", ".join(f"{key} {dtype}" for key, dtype in used.items())
    masters = ", with master weights in float32" if "bfloat16" in kinds else ""
    return f"dtype auto: {shown}{masters} ({'; '.join(reasons)})"
