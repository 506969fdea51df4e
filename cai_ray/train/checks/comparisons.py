"""Human comparisons, which both the reward model and DPO are trained on."""

from __future__ import annotations

from cai_ray.config.training import PreferenceConfig
from cai_ray.data.preflight import Preflight
from cai_ray.storage.run import Run


def note_comparisons(run: Run, section: PreferenceConfig, preflight: Preflight) -> None:
    """Notes the prompts of human comparisons as trained on. Raises InputError if a file or row is at fault."""
    for source in section.human:
        preflight.trains_on_comparisons(source)
