"""What a stage's result depends on."""

from __future__ import annotations

from cai_ray.config.ppo import WatchConfig
from cai_ray.config.training import TrainConfig
from cai_ray.prompts.load import load_templates
from cai_ray.stages import upstream_of
from cai_ray.storage.models import model_sha
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run

# How a stage is run, not what it yields: changing these goes on from the same checkpoints. Another number of workers,
# or other micro-batches, add the same numbers in another order, and so may differ in the last digits.
_HOW = {"checkpoint_every", "keep_checkpoints", "cpus_per_worker", "workers", "micro_batch_tokens"}

_BOUNDS = {"on_alarm", "patience"} | {n for n in WatchConfig.model_fields if n.startswith("max_")}


def fingerprint(run: Run, stage: str, cfg: TrainConfig) -> str:
    """A hash of what a stage's result depends on: a changed one starts anew beside the old checkpoints."""
    upstream = {s: m["id"] for s in upstream_of(stage, run.config.method) if (m := run.manifest(s))}
    settings = cfg.model_dump(mode="json", exclude={**dict.fromkeys(_HOW, True), "watch": _BOUNDS})
    model, templates = model_sha(run.model("base")), load_templates(run.config.templates)
    return derive_id(stage, settings, run.config.seed, templates.sha, model, upstream)
