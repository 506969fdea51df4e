"""What a run's stages look at before any work: tokenizers and prompts, each loaded once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cai_ray.config.sources import PromptSource
from cai_ray.data.sources import check_disjoint, read_prompts
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.stages import ROLES
from cai_ray.storage.run import Run


class Preflight:
    """A look at a run before any work, which each stage's `check` is given in the order of the stages.

    Args:
        stages: those that are about to run. The settings of the others are checked, too, so that a run does not fail
            hours later for a wrong path.
        models_here: whether the run's models are on this machine. If not, tokenizers and endpoint keys are not checked.
    """

    def __init__(self, run: Run, stages: Collection[str] = (), models_here: bool = True):
        self.run, self.stages, self.models_here = run, stages, models_here
        self.templates: TemplateSet = load_templates(run.config.templates)
        self._renderers: dict[str, Renderer] = {}
        self._trained_on: list[Mapping[str, Any]] = []

    def renderer(self, model: str = "base") -> Renderer | None:
        """The renderer of a model that exists before the run; None if the models are not on this machine.

        Args:
            model: a role, folder or id. Every role has the tokenizer of `base`.

        Raises:
            InputError: the model is not there, or has no usable tokenizer or chat template.
        """
        if not self.models_here:
            return None
        model = "base" if model in ROLES else model
        if model not in self._renderers:
            self._renderers[model] = Renderer(self.run.model(model), self.templates.chat_template)
        return self._renderers[model]

    def trains_on_prompts(self, key: str, sources: Iterable[PromptSource]) -> None:
        """Notes the prompts of a setting as trained on.

        Raises:
            InputError: they cannot be read, or none of them is for training.
        """
        rows = read_prompts(sources, self.run.config.seed)
        train = [row for row in rows if row["split"] == "train"]
        if rows and not train:
            raise InputError(
                f"{key}: all {len(rows)} rows have split {rows[0]['split']!r}, and training reads `train` alone; "
                "remove the column `split`, or give other prompts"
            )
        self._trained_on += train

    def trains_on(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Notes rows with `messages` as trained on."""
        self._trained_on += rows

    def evaluates_on(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raises InputError if one of these rows is among those noted as trained on."""
        check_disjoint(self._trained_on, rows)
