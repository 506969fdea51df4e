"""Renders messages to token ids through a model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from cai_ray.errors import InputError, RowError
from cai_ray.prompts.chat_template import ChatTemplate, Rendered, choose_template
from cai_ray.prompts.encoder import End, SpanEncoder
from cai_ray.prompts.messages import Message, Messages, Piece
from cai_ray.prompts.spans import Spans, after, joined, message_spans, stripped, text_of
from cai_ray.prompts.templates import THINKING, Thinking
from cai_ray.prompts.thoughts import close_thought, open_thought, thought_spans
from cai_ray.prompts.tokenizers import is_control, load_tokenizer

_QUESTION = Message(role="user", content="?")
_ANSWER = Message(role="assistant", content="!")
# The ids of options are kept by the end of the text before them, in characters.
_CONTEXT = 64
_KEPT_OPTIONS = 4096


class Renderer:
    """Renders messages to token ids through a model's chat template.

    The ids are those of the whole text that the template makes, except that no content becomes a control token
    (docs/prompts.md).

    Args:
        model: a model folder or Hugging Face id, or a tokenizer already loaded with transformers.
        chat_template: a Jinja template to use in the place of the model's own.
        template_args: further arguments of the chat template, such as `enable_thinking`.
        name: the name of one of the model's own chat templates.
        thinking: the marks of thinking blocks, where the model may write any.
        keeps_thoughts: whether answers are trained on with the thoughts that they begin with. If they are not, such a
            mark in an answer is plain text.
        today: the day that the template is told if it asks. Defaults to the day of each call.
        fallback: a Jinja template for models that have none of their own.

    Raises:
        InputError: the model has no usable tokenizer or chat template.
    """

    def __init__(
        self,
        model: Any,
        chat_template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        name: str | None = None,
        thinking: Thinking | None = THINKING,
        keeps_thoughts: bool = False,
        today: date | None = None,
        fallback: str | None = None,
    ):
        self.tokenizer = load_tokenizer(model) if isinstance(model, str | Path) else model
        self.template = chat_template or choose_template(self.tokenizer, name, fallback)
        self.template_args = dict(template_args or {})
        self.thinking, self._keeps_thoughts = thinking, keeps_thoughts
        self._chat = ChatTemplate(self.tokenizer, self.template, self.template_args, today)
        self._options: dict[tuple[str, str, bool], list[int]] = {}
        try:
            prompt = self._chat.render([_QUESTION], True)
            turn = self._chat.render([_QUESTION, _ANSWER], False)
        except RowError as e:  # not a row's fault: every model must render a user's turn and its answer
            remedy = "correct" if chat_template else "name one with"
            raise InputError(
                f"model {self.tokenizer.name_or_path}: its chat template cannot be used ({e}); "
                f"{remedy} `chat_template` in the template set"
            ) from e
        self.control = self._control_ids([prompt, turn])
        self._encoder = SpanEncoder(self.tokenizer, self.control)
        self._end, self.end_id = self._find_end(turn.tail)
        self._gap = self._find_gap(prompt, turn)
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad is None else pad
        self._hidden = self._ids_without_text()

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids up to where the model writes. If the last message is the assistant's, the model continues it.

        Raises:
            RowError: the chat template refuses the messages, or a text cannot be encoded.
        """
        if messages[-1]["role"] == "assistant":
            return self._continued(messages)
        return self._encoder.encode(self._chat.render(messages, True).spans)[0]

    def question_ids(self, messages: Messages) -> list[int]:
        """Ids up to where the model answers at once, without a thought."""
        if messages[-1]["role"] == "assistant":
            return self._continued(messages)
        return self._encoder.encode(self._question(messages))[0]

    def dialogue_ids(self, messages: Messages, truncated: bool = False) -> tuple[list[int], list[int]]:
        """Ids of a conversation that ends with the assistant's message, and a mask of what it wrote.

        The mask is 1 on what follows the prompt's ids: the last message's content and the token that ends the turn,
        with what the template writes between them. That is what a policy writes, and what SFT and reward models are
        trained on. A truncated message has no end, since the policy did not write one (docs/method.md, item 14). If
        the template begins a thought and the message has none, the thought is closed before it.

        Raises:
            RowError: the chat template refuses the messages, or a text cannot be encoded.
        """
        if messages[-1]["role"] != "assistant":
            raise ValueError("the last message of a dialogue must be the assistant's")
        prompt, ids = self._answered(messages, closed=not truncated)
        if not truncated and ids[-1:] != [self.end_id]:
            ids.append(self.end_id)
        return prompt + ids, [0] * len(prompt) + [1] * len(ids)

    def option_ids(
        self,
        options: Sequence[str],
        setting: str = "`options` in the template set",
        after: Messages = (_QUESTION,),
    ) -> list[int]:
        """The token id of each option, as the model would write it after a prompt.

        Args:
            setting: the setting that the options come from, for the error message.
            after: the prompt; by default, any question of a user.

        Raises:
            InputError: an option is not exactly one token, or two options are the same token.
        """
        context, ids = self._context(after), list[int]()
        for option in options:
            encoded = self._option_ids(option, context, after)
            if len(encoded) != 1:
                raise InputError(
                    f"option {option!r} is {len(encoded)} tokens for {self.tokenizer.name_or_path}; "
                    f"set {setting} to texts that are one token each"
                )
            ids.append(encoded[0])
        if len(set(ids)) != len(ids):
            raise InputError(
                f"options {list(options)} are the same token; set {setting} to texts that differ"
            )
        return ids

    def begun_thought(self, messages: Messages) -> str:
        """The beginning of a thought that the template itself writes, mark included; empty if it begins none."""
        if messages[-1]["role"] == "assistant":  # what is continued is the answer
            return ""
        return open_thought(self._chat.render(messages, True).spans, self.thinking)

    def encode_content(self, text: str) -> list[int]:
        """Ids of a content that stands alone, as plain text.

        Raises:
            RowError: it is not valid Unicode, or has a character that the tokenizer does not know.
        """
        return self._encoder.encode_content(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without control tokens, but with the marks of thoughts."""
        visible = [i for i in ids if i not in self._hidden]
        return str(
            self.tokenizer.decode(visible, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def served_template(self) -> str:
        """The chat template for a server that renders messages itself: with the arguments and the date in it."""
        return self._chat.standalone()

    def control_texts(self) -> list[str]:
        """The texts of all control tokens, which no content may become."""
        return sorted(t.content for i, t in self.tokenizer.added_tokens_decoder.items() if i in self.control)

    def _answered(self, messages: Messages, closed: bool) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and those of the answer as the model would write it after them.

        The prompt is what sampling saw: templates may write a past assistant turn differently.

        Args:
            closed: whether what ends the turn belongs to the answer.
        """
        prompt = self._chat.render(messages[:-1], True).spans
        return self._follow(prompt, self._answer_spans(messages, prompt, closed))

    def _follow(self, prompt: Spans, answer: Spans) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and those of what follows it."""
        ids, end = self._encoder.encode(prompt)
        whole, _ = self._encoder.encode([*prompt, *answer])
        # Where tokens would merge across the border, the prompt is as sampling saw it, and the rest follows it.
        if whole[: len(ids)] == ids:
            return ids, whole[len(ids) :]
        return ids, self._encoder.encode(answer, end)[0]

    def _answer_spans(self, messages: Messages, prompt: Spans, closed: bool) -> Spans:
        """What follows the prompt in the text of a conversation."""
        content, thought = message_spans(messages[-1]["content"]), open_thought(prompt, self.thinking)
        left, right = self._chat.strips_of_last(["user", "assistant"])
        end = [Piece(self._end, True)] if closed else []
        if self._keeps_thoughts and (kept := thought_spans(text_of(content), self.thinking, thought)):
            return [*kept, *end]
        written, begins = self._whole(messages), text_of(prompt)
        if written is not None and text_of(written.spans).startswith(begins):
            return [*after(written.spans, len(begins)), *end]
        before = close_thought(thought, self.thinking) or self._gap
        return [Piece(before, True), *stripped(content, left, right), *end]

    def _continued(self, messages: Messages) -> list[int]:
        """Ids of a conversation whose last message the model continues: its end is not stripped."""
        *_, last = messages
        content = message_spans(last["content"])
        whole = self._whole(messages)
        if whole is None:  # the template writes a conversation only up to the assistant's turn
            prompt, ids = self._answered(messages, closed=False)
            return prompt + ids
        kept = text_of(content)
        ending = kept[len(kept.rstrip()) :]
        spans = whole.spans
        if ending and not text_of(spans).endswith(ending):
            spans = [*spans, Piece(ending, bool(content[-1].literal))]
        return self._encoder.encode(spans)[0]

    def _whole(self, messages: Messages) -> Rendered | None:
        """A conversation that ends with an answer; None if the template leaves something out or refuses it."""
        try:
            return self._chat.render(messages, False)
        except RowError:
            return None

    def _context(self, messages: Messages) -> str:
        """The end of the text that an option follows: what comes before it does not change the option's ids."""
        *_, last = messages
        begun = message_spans(last["content"]) if last["role"] == "assistant" else []
        return text_of(begun or self._chat.render(messages, True).spans)[-_CONTEXT:]

    def _option_ids(self, option: str, context: str, messages: Messages) -> list[int]:
        *before, last = messages
        continues = last["role"] == "assistant"
        key = (option, context, continues)
        if key not in self._options:
            if len(self._options) >= _KEPT_OPTIONS:
                self._options.clear()
            if continues:
                longer = [*message_spans(last["content"]), Piece(option, True)]
                said = Message(role="assistant", content=longer)
                self._options[key] = self._continuation(messages, [*before, said])
            else:
                self._options[key] = self._answer_to_question(messages, option)
        return self._options[key]

    def _answer_to_question(self, messages: Messages, option: str) -> list[int]:
        """Ids of an option that is the beginning of the answer."""
        said, prompt = Message(role="assistant", content=[Piece(option, True)]), self._question(messages)
        closed = text_of(prompt) != text_of(self._chat.render(messages, True).spans)
        answer = [Piece(option, True)] if closed else self._answer_spans([*messages, said], prompt, False)
        return self._follow(prompt, answer)[1]

    def _question(self, messages: Messages) -> Spans:
        """A prompt whose answer comes at once: behind a thought that the template begins, or that it writes empty."""
        prompt = self._chat.render(messages, True).spans
        closes = close_thought(open_thought(prompt, self.thinking), self.thinking)
        if not closes and self.thinking and self.thinking.close in self._gap:
            closes = self._gap
        return joined([*prompt, Piece(closes, True)])

    def _continuation(self, messages: Messages, longer: Messages) -> list[int]:
        """Ids of what a message that the model continues has more in `longer`, as they follow those of the prompt."""
        prompt, whole = self._continued(messages), self._continued(longer)
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        # It merges with what stands before it, which is written already.
        more = after(
            message_spans(longer[-1]["content"]), len(text_of(message_spans(messages[-1]["content"])))
        )
        return self._encoder.encode(more, End("text"))[0]

    def _find_end(self, tail: str) -> tuple[str, int]:
        """What the template writes behind an answer up to the token that ends the turn, and that token."""
        end = self._encoder.first_token(tail)
        if end is not None:
            token, stop = end
            return tail[:stop], token
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"model {self.tokenizer.name_or_path}: no token ends a turn; set eos_token")
        return "", int(self.tokenizer.eos_token_id)

    def _find_gap(self, prompt: Rendered, turn: Rendered) -> str:
        """What the template writes between a prompt and the answer to it."""
        begins, written = text_of(prompt.spans), text_of(turn.spans)
        return written[len(begins) : -len("!")] if written.startswith(begins) else ""

    def _control_ids(self, turns: Sequence[Rendered]) -> set[int]:
        """Tokens that no content may hold: special tokens, and others that the chat template builds turns from.

        The remaining added tokens are text: in some tokenizers line breaks and spaces are added tokens.
        """
        texts = ["".join(s.text for s in turn.spans if s.literal) + turn.tail for turn in turns]
        structure = {i for text in texts for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]}
        added = self.tokenizer.added_tokens_decoder.items()
        control = {
            i for i, t in added if is_control(t.content, t.special) or (i in structure and t.content.strip())
        }
        return control | set(self.tokenizer.all_special_ids)

    def _ids_without_text(self) -> set[int]:
        """Special tokens other than the marks of thoughts."""
        marks = {self.thinking.open, self.thinking.close} if self.thinking else set()
        added = self.tokenizer.added_tokens_decoder.items()
        return {i for i, t in added if t.special and t.content not in marks}
