"""What a first run has to know about a model: how it is asked, how large it is, and how much it can read."""

from __future__ import annotations

from typing import Any, NamedTuple

from cai_ray.config.load import validate
from cai_ray.constitution import Constitution
from cai_ray.errors import InputError
from cai_ray.estimate.shape import Shape, shape_of
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import Messages
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.prompts.tokenizers import load_tokenizer
from cai_ray.storage import hub
from cai_ray.storage.models import hub_model, local_model

TEMPLATES = "general"
_BY_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Template sets with a chat template, and the tokens that a tokenizer has if its model was trained on it."""
_FOR_OTHERS = "plain"


class ModelFacts(NamedTuple):
    """A model, and the template set that it is asked with."""

    name: str
    renderer: Renderer
    templates: TemplateSet
    templates_name: str
    has_template: bool
    """Whether its tokenizer has a chat template of its own."""
    shape: Shape

    def prompt_tokens(self, messages: Messages) -> int:
        """The length of a conversation's prompt in tokens."""
        return len(self.renderer.prompt_ids(self.templates.answer_messages(messages)))

    def text_tokens(self, text: str) -> int:
        """The length of a text in tokens."""
        return len(self.renderer.tokenizer(text, add_special_tokens=False)["input_ids"])


class StepTokens(NamedTuple):
    """Tokens that the longest prompt of each step has beside the conversation and the texts of this row."""

    critique: int
    revision: int
    feedback: int

    def needed(self, prompt: int, answer: int) -> int:
        """The context that a row needs.

        Args:
            prompt: tokens of its conversation.
            answer: most tokens of an answer, a critique or a revision.
        """
        return prompt + max(
            answer, self.critique + 2 * answer, self.revision + 3 * answer, self.feedback + 2 * answer + 1
        )


def look_at(name: str, document: Constitution) -> tuple[ModelFacts, StepTokens]:
    """Looks at a model. Of the hub's models configuration and tokenizer are fetched, and no weights.

    Raises:
        InputError: there is no such model, or it cannot be asked.
    """
    repo = hub_model(name)
    located = str(hub.pin(repo)) if repo else name
    folder = local_model(located, weights=False)
    tokenizer = load_tokenizer(folder)
    has_template = bool(tokenizer.chat_template)
    templates_name = TEMPLATES if has_template else _templates_for(tokenizer)
    templates = load_templates(templates_name)
    config = validate(
        {"name": "init", "model": located, "constitution": "harmless", "prompts": [{"path": "-"}]}, "init"
    )
    model = ModelFacts(
        name,
        Renderer(folder, templates.chat_template),
        templates,
        templates_name,
        has_template,
        shape_of(config, "base"),
    )
    return model, _step_tokens(model, document)


def _templates_for(tokenizer: Any) -> str:
    """The template set whose chat template has tokens of this tokenizer."""
    vocabulary = tokenizer.get_vocab()
    return next((n for n, tokens in _BY_TOKENS.items() if all(t in vocabulary for t in tokens)), _FOR_OTHERS)


def _step_tokens(model: ModelFacts, document: Constitution) -> StepTokens:
    """The lengths of the steps' prompts for the principle that takes most."""
    conversation: Messages = [{"role": "user", "content": "x"}]
    templates, alone = model.templates, model.prompt_tokens(conversation)

    def beyond(messages: Messages) -> int:
        return len(model.renderer.prompt_ids(messages)) - alone

    principles = document.enabled
    if not principles:
        raise InputError(f"constitution {document.name}: no principle is enabled")
    return StepTokens(
        critique=max(beyond(templates.critique_messages(conversation, "x", p)) for p in principles),
        revision=max(beyond(templates.revision_messages(conversation, "x", p, "x")) for p in principles),
        feedback=max(beyond(templates.feedback_messages(conversation, "x", "x", p)) for p in principles),
    )
