"""What a run's stages look at before any work: tokenizers and prompts, each loaded once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from cai_ray.config.judge import JudgeConfig, PromptedModel
from cai_ray.config.sources import Comparisons, PromptSource
from cai_ray.constitution import Principle
from cai_ray.data.left_out import LeftOut
from cai_ray.data.overlap import check_held_out, text_keys
from cai_ray.data.prompt_check import PromptCheck
from cai_ray.data.sources import read_prompts
from cai_ray.data.training import training_comparisons, without_held_out
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
from cai_ray.storage.records import Prompt, derive_id
from cai_ray.storage.run import Run


class Preflight:
    """A look at a run before any work, which each stage's `check` is given in the order of the stages.

    Args:
        stages: those that are about to run. The settings of the others are checked, too, so that a run does not fail
            hours later for a wrong path.
        models_here: whether the run's models are on this machine. If not, tokenizers and endpoint keys are not checked.
        say: is told which rows are left out, a line for each source and reason.
        renders: whether it is told what the chat template makes of the prompts, too.
    """

    def __init__(
        self,
        run: Run,
        stages: Collection[str] = (),
        models_here: bool = True,
        say: Callable[[str], None] = lambda _: None,
        renders: bool = False,
    ):
        self.run, self.stages, self.models_here = run, stages, models_here
        self.templates: TemplateSet = load_templates(run.config.templates)
        self._renderers: dict[str, Renderer] = {}
        self._trained_on: set[bytes] = set()
        self._say, self._renders = say, renders
        self._said: set[str] = set()

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

    def check_reviser(self, key: str, reviser: PromptedModel) -> TemplateSet:
        """Checks that a reviser can be asked: its engine, tokenizer and key. Args as of `check_judge`.

        Returns:
            How it is asked.

        Raises:
            InputError: one of them cannot be used.
        """
        model = self.run.resolve_model(reviser)
        check_engine(model.engine, f"{key}.engine" if reviser.engine else "engine")
        templates = load_templates(model.templates)
        if not model.is_served:
            self.renderer(reviser)
        elif "revise" in self.stages and self.models_here:
            read_key(model.engine)
        return templates

    def asks_about(self, key: str, model: PromptedModel, prompts: Sequence[Prompt], written: int) -> None:
        """Tells how many of these prompts a model's chat template refuses, or leave too little of its context."""
        if prompts and self._renders:
            resolved = self.run.resolve_model(model)
            self._render(key, prompts, written, model, load_templates(resolved.templates))

    def trains_on_prompts(self, key: str, sources: Iterable[PromptSource], written: int) -> list[Prompt]:
        """Notes the prompts of a setting as trained on, and returns them.

        Args:
            written: the most tokens that are written after one of them.

        Raises:
            InputError: they cannot be read, or none of them is for training.
        """
        left_out = LeftOut(self.run.config.max_error_rate)
        rows = read_prompts(sources, self.run.config.seed, left_out)
        train = [row for row in rows if row["split"] == "train"]
        if rows and not train:
            raise InputError(
                f"{key}: all {len(rows)} rows have split {rows[0]['split']!r}, and training reads `train` alone; "
                "remove the column `split`, or give other prompts"
            )
        train = without_held_out(self.run.config, train, left_out)
        self._tell(key, left_out)
        self._trained_on |= text_keys(train)
        self._render(key, train, written)
        return train

    def trains_on_comparisons(self, source: Comparisons) -> None:
        """Notes the prompts of human comparisons as trained on.

        Raises:
            InputError: they cannot be read.
        """
        left_out = LeftOut(self.run.config.max_error_rate)
        rows = training_comparisons(self.run.config, source, left_out)
        self._tell(source.path, left_out)
        self._trained_on |= text_keys(rows)

    def evaluates_on_prompts(self, key: str, sources: Iterable[PromptSource], written: int) -> list[Prompt]:
        """The held-out prompts of a setting. Args as of `trains_on_prompts`.

        Raises:
            InputError: they cannot be read, or one of them is among those noted as trained on.
        """
        left_out = LeftOut(self.run.config.max_error_rate)
        rows = read_prompts(sources, self.run.config.seed, left_out)
        self._tell(key, left_out)
        self._render(key, rows, written)
        self.evaluates_on(rows)
        return rows

    def evaluates_on(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raises InputError if some of these rows are among those noted as trained on."""
        check_held_out(self._trained_on, rows)

    def tell(self, left_out: LeftOut) -> None:
        """Tells which rows of a source were left out: once, however many stages read it."""
        for line in left_out.lines:
            if line not in self._said:
                self._said.add(line)
                self._say(line)

    def _tell(self, key: str, left_out: LeftOut) -> None:
        self.tell(left_out)
        if held := left_out["held_out"]:
            self._say(
                f"{key}: {held} rows are held out as well, and left out of training (evaluate.overlap=drop)"
            )

    def _render(
        self,
        key: str,
        rows: Sequence[Prompt],
        written: int,
        model: PromptedModel | str = "base",
        templates: TemplateSet | None = None,
    ) -> None:
        if not self._renders or not rows or (renderer := self.renderer(model)) is None:
            return
        from cai_ray.engine.vllm import model_context

        resolved = self.run.resolve_model(model)
        context = resolved.engine.max_model_len or model_context(self.run.model(resolved.name))
        for line in PromptCheck(renderer, templates or self.templates, context).lines(key, rows, written):
            self._say(line)


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
