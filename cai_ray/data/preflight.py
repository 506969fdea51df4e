"""What a run's stages look at before any work: tokenizers and prompts, each loaded once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from cai_ray.config.judge import JudgeConfig, PromptedModel
from cai_ray.config.sources import PromptSource
from cai_ray.constitution import Principle
from cai_ray.data.sources import check_disjoint, read_prompts
from cai_ray.engine.api_key import read_key
from cai_ray.engine.check import check_engine
from cai_ray.engine.options import check_logprobs, check_options
from cai_ray.errors import InputError, RowError
from cai_ray.prompts.check import check_judge
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import Message, Messages
from cai_ray.prompts.models import make_renderer
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.stages import ROLES
from cai_ray.storage.records import derive_id
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

    def renderer(self, model: PromptedModel | str = "base") -> Renderer | None:
        """The renderer of a model that exists before the run; None if the model is not on this machine.

        Args:
            model: a role, folder or id, or the settings of a model. Every role has the tokenizer of `base`.

        Raises:
            InputError: the model is not there, or has no usable tokenizer or chat template.
        """
        settings = PromptedModel(model=model) if isinstance(model, str) else model
        if settings.model in ROLES:
            settings = settings.model_copy(update={"model": "base"})
        resolved = self.run.resolve_model(settings)
        if not self.models_here or resolved.is_served:
            return None
        asked = (
            resolved.templates,
            resolved.has_own_templates,
            resolved.template_args,
            resolved.chat_template,
        )
        key = derive_id(resolved.location, *asked)
        if key not in self._renderers:
            self._renderers[key] = make_renderer(resolved)
        return self._renderers[key]

    def check_judge(self, key: str, judge: JudgeConfig, stage: str) -> None:
        """Checks that a judge can be asked: its engine, template set, document, options and key.

        Args:
            key: the setting that describes it, for error messages.
            stage: the stage that asks it. An endpoint's key is looked for only if that is about to run.

        Raises:
            InputError: one of them cannot be used.
        """
        model = self.run.resolve_model(judge)
        check_engine(model.engine, f"{key}.engine" if judge.engine else "engine")
        templates = load_templates(model.templates)
        check_judge(templates, judge, key)
        principle = self.run.config.document_of(judge).principles[0]
        questions = _questions(templates, judge, principle)
        if model.is_served:  # its tokenizer and chat template cannot be seen from here
            check_logprobs(model.engine, f"{key}.engine" if judge.engine else "engine")
            for options, _ in questions:
                check_options(options)
            if stage in self.stages and self.models_here:
                read_key(model.engine)
        elif renderer := self.renderer(judge):
            for options, messages in questions:
                try:
                    renderer.option_ids(options, after=messages)
                except RowError as e:
                    raise InputError(
                        f"{key}: its prompt cannot be rendered ({e}); choose other templates"
                    ) from e

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


def _questions(
    templates: TemplateSet, judge: JudgeConfig, principle: Principle
) -> list[tuple[Sequence[str], Messages]]:
    """The options that a judge is given, each with a prompt that they follow."""
    talk = [Message(role="user", content="?")]
    if judge.answer == "reasoned":
        asked = templates.verdict_messages(talk, "a", "b", principle, "c")
    else:
        asked = templates.feedback_messages(talk, "a", "b", principle)
    questions: list[tuple[Sequence[str], Messages]] = [(templates.options, asked)]
    if judge.ask == "response":
        questions.append((templates.scores or (), templates.rating_messages(talk, "a", principle)))
    return questions
