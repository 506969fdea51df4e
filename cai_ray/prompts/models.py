"""The renderer of a model: its own tokenizer and chat template, with what a run's settings say about them."""

from __future__ import annotations

from datetime import date

from cai_ray.config.judge import PromptedModel
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.renderer import Renderer
from cai_ray.storage.models import ResolvedModel
from cai_ray.storage.run import Run


def run_renderer(run: Run, model: PromptedModel | str, folder: str | None = None) -> Renderer:
    """The renderer of a model of a run.

    Args:
        model: its settings, or a role, folder or id.
        folder: where its files lie on this node, if they do already.
    """
    return make_renderer(run.resolve_model(model), folder)


def make_renderer(model: ResolvedModel, folder: str | None = None) -> Renderer:
    """The renderer of a model.

    The chat template of a template set takes the place of the model's own only if the set was chosen for this model.
    For other models, such as a judge or reward model from elsewhere, it stands in where they have none.

    Args:
        folder: where its files lie on this node, if they do already.

    Raises:
        InputError: the model has no usable tokenizer or chat template.
    """
    templates = load_templates(model.templates)
    return Renderer(
        folder or model.fetch(weights=False),
        templates.chat_template if model.has_own_templates else None,
        model.template_args,
        name=model.chat_template,
        thinking=templates.thinking,
        keeps_thoughts=model.keeps_thoughts,
        today=date.fromisoformat(model.today) if model.today else None,
        fallback=templates.chat_template,
    )
