"""Renders messages to token ids through a model's own chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from cai_ray.errors import InputError, RowError
from cai_ray.prompts.messages import Messages, Piece
from cai_ray.prompts.tokenizers import load_tokenizer, without_control_tokens

# Private-use characters mark where a content belongs while the chat template is rendered. Contents never meet the
# template, so a content that holds the mark is harmless.
_MARK = re.compile("\ue000([0-9]+)\ue001")

# The longest text, in characters, whose ids are cached for the next prompt that holds it.
_CACHED_LENGTH = 20_000


class Renderer:
    """Renders messages to token ids through a model's chat template.

    Args:
        model: a model folder or Hugging Face id, or a tokenizer already loaded with transformers.
        chat_template: a Jinja template for models that have none of their own.
        template_args: further arguments of the chat template, such as `enable_thinking`.
    """

    def __init__(
        self, model: Any, chat_template: str | None = None, template_args: Mapping[str, Any] | None = None
    ):
        self.tokenizer = load_tokenizer(model) if isinstance(model, str | Path) else model
        self.template = chat_template or self.tokenizer.chat_template
        if not self.template:
            raise InputError(
                f"model {self.tokenizer.name_or_path}: its tokenizer has no chat template; name one with "
                "`chat_template` in the template set"
            )
        self._template_args = dict(template_args or {})
        self._short_ids = lru_cache(maxsize=65536)(self._encode_content)
        self._skeleton = lru_cache(maxsize=256)(self._encode_skeleton)
        self._literal_ids = lru_cache(maxsize=1024)(self._encode_literal)
        try:
            self.end_id, self._control = self._end_id(), self._control_ids()
        except RowError as e:  # not a row's fault: every model must render a user's turn and its answer
            remedy = "correct" if chat_template else "name one with"
            raise InputError(
                f"model {self.tokenizer.name_or_path}: its chat template cannot be used ({e}); "
                f"{remedy} `chat_template` in the template set"
            ) from e
        self._plain = without_control_tokens(self.tokenizer, self._control)
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad is None else pad

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids up to where the model writes. If the last message is the assistant's, the model continues it."""
        continues = messages[-1]["role"] == "assistant"
        parts, _ = self._render(messages, generation=not continues)
        return [i for part in parts for i in part]

    def dialogue_ids(self, messages: Messages, truncated: bool = False) -> tuple[list[int], list[int]]:
        """Ids of a conversation that ends with the assistant's message, and a mask of what it wrote.

        The mask is 1 on the last message's content and on the token that ends the turn: what a policy writes, and what
        SFT and reward models are trained on. A truncated message has no such token, since the policy did not write one
        (docs/method.md, item 14).
        """
        if messages[-1]["role"] != "assistant":
            raise ValueError("the last message of a dialogue must be the assistant's")
        # The prompt as the policy saw it: templates may write a past assistant turn differently.
        prompt = self.prompt_ids(messages[:-1])
        content = self._message_ids(messages[-1]["content"])
        answer = content if truncated else [*content, self.end_id]
        return prompt + answer, [0] * len(prompt) + [1] * len(answer)

    def option_ids(self, options: Sequence[str], setting: str = "`options` in the template set") -> list[int]:
        """The token id of each option, as the model would write it at the answer position.

        Args:
            setting: the setting that the options come from, for the error message.

        Raises:
            InputError: an option is not exactly one token, or two options are the same token.
        """
        ids = []
        for option in options:
            encoded = self._literal_ids(option)
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

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _render(self, messages: Messages, generation: bool) -> tuple[list[list[int]], list[int]]:
        """Token ids in parts, up to the last content (or the generation prompt), and those that follow."""
        literals = self._skeleton(tuple(m["role"] for m in messages), generation)
        parts: list[list[int]] = []
        for literal, message in zip(literals, [m["content"] for m in messages], strict=False):
            parts.append(literal)
            parts.append(self._message_ids(message))
        tail = literals[-1]
        if generation:
            parts.append(tail)
        return parts, tail

    def _message_ids(self, content: str | list[Piece]) -> list[int]:
        if isinstance(content, str):
            return self._content_ids(content)
        ids: list[int] = []
        for piece in content:
            ids += (self._literal_ids if piece.literal else self._content_ids)(piece.text)
        return ids

    def _encode_literal(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_content(self, text: str) -> list[int]:
        try:
            ids = self._plain.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as e:
            raise RowError("text is not valid Unicode (a lone surrogate)") from e
        if not self._control.isdisjoint(ids):
            if self._control & set(ids) == {self.tokenizer.unk_token_id}:
                raise RowError("text holds a character that this tokenizer does not know")
            raise RowError("text encodes to a control token of this tokenizer")
        return ids

    def _content_ids(self, text: str) -> list[int]:
        # Long texts seldom come twice, and thousands of them would fill the memory.
        return self._short_ids(text) if len(text) <= _CACHED_LENGTH else self._encode_content(text)

    def _encode_skeleton(self, roles: tuple[str, ...], generation: bool) -> list[list[int]]:
        """The template's own ids before each content and after the last one."""
        marked = [{"role": r, "content": f"\ue000{i}\ue001"} for i, r in enumerate(roles)]
        try:
            text = self.tokenizer.apply_chat_template(
                marked,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation,
                **self._template_args,
            )
        except Exception as e:  # the template's author chooses what it raises
            raise RowError(f"the chat template refuses the roles {list(roles)}: {e}") from e
        pieces = _MARK.split(text)
        if [int(i) for i in pieces[1::2]] != list(range(len(roles))):
            raise RowError(f"the chat template drops or repeats a message of {list(roles)}")
        return [self._literal_ids(piece) for piece in pieces[0::2]]

    def _end_id(self) -> int:
        """The token that ends an assistant's turn: the first one after the content in the chat template."""
        tail = self._skeleton(("user", "assistant"), False)[-1]
        added = tail and tail[0] in self.tokenizer.added_tokens_decoder
        end = tail[0] if added else self.tokenizer.eos_token_id
        if end is None:
            raise InputError(f"model {self.tokenizer.name_or_path}: no token ends a turn; set eos_token")
        return end

    def _control_ids(self) -> set[int]:
        """Tokens that no content may hold: special tokens, and others that the chat template builds turns from.

        The remaining added tokens are text: in some tokenizers line breaks and spaces are added tokens.
        """
        turns = (self._skeleton(("user", "assistant"), False), self._skeleton(("user",), True))
        structure = {i for skeleton in turns for piece in skeleton for i in piece}
        added = self.tokenizer.added_tokens_decoder.items()
        control = {i for i, t in added if t.special or (i in structure and t.content.strip())}
        return control | set(self.tokenizer.all_special_ids)
