"""Prompts are data. A template set says what is asked; a renderer turns it into token ids.

Text from users and models can never become structure. The model's own chat template is rendered once per
sequence of roles, with a private mark where each message's content belongs; the literal text between the marks
is encoded with the full tokenizer, and the contents are encoded by a copy of it that knows no special token.
So the ids outside the contents depend on the roles alone, whatever the contents say, and a conversation that
grows keeps its prefix. It is also fast: what the literal parts encode to is cached.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict
from uuid import uuid4

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cai_ray.constitution import Principle
from cai_ray.errors import InputError, RowError
from cai_ray.records import derive_id


class Piece(NamedTuple):
    """Part of a message: `literal` text comes from a template set and may hold special tokens."""

    text: str
    literal: bool


class Message(TypedDict):
    role: str
    content: str | list[Piece]


Messages = Sequence[Mapping[str, Any]]

# Private-use characters mark where a content belongs while the chat template is rendered. A content never
# meets the template, so that a content which holds the mark is harmless.
_MARK = re.compile("\ue000([0-9]+)\ue001")

_BYTE = re.compile("<0x[0-9A-F]{2}>")

# Longest text, in characters, whose ids are kept for the next prompt that holds it.
_CACHED_LENGTH = 20_000


class Renderer:
    """Renders messages to token ids through a model's chat template.

    Args:
        model: a model folder or Hugging Face id, or a tokenizer already loaded with transformers.
        chat_template: a Jinja template for models that have none of their own.
    """

    def __init__(self, model: Any, chat_template: str | None = None):
        self.tokenizer = load_tokenizer(model) if isinstance(model, str | Path) else model
        self.template = chat_template or self.tokenizer.chat_template
        if not self.template:
            raise InputError(
                f"model {self.tokenizer.name_or_path}: its tokenizer has no chat template; name one with "
                "`chat_template` in the template set"
            )
        self._short_ids = lru_cache(maxsize=65536)(self._encode_content)
        self._skeleton = lru_cache(maxsize=256)(self._encode_skeleton)
        self._literal_ids = lru_cache(maxsize=1024)(self._encode_literal)
        try:
            self.end_id, self._control = self._end_id(), self._control_ids()
        except RowError as e:  # no row is at fault: a user's turn and its answer are what every model renders
            remedy = "mend" if chat_template else "name one with"
            raise InputError(
                f"model {self.tokenizer.name_or_path}: its chat template cannot be used ({e}); "
                f"{remedy} `chat_template` in the template set"
            ) from e
        self._plain = _without_control_tokens(self.tokenizer, self._control)
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.end_id if pad is None else pad

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids up to where the model writes. A last message from the assistant is continued, not answered."""
        goes_on = messages[-1]["role"] == "assistant"
        parts, _ = self._render(messages, generation=not goes_on)
        return [i for part in parts for i in part]

    def dialogue_ids(self, messages: Messages, truncated: bool = False) -> tuple[list[int], list[int]]:
        """Ids of a conversation that ends with the assistant's message, and a mask of what it wrote.

        The mask is 1 on the last message's content and on the token that ends the turn: what a policy
        emits, and what SFT and reward models are trained on. A truncated message has no such token: the
        policy did not write one (docs/method.md, item 14).
        """
        if messages[-1]["role"] != "assistant":
            raise ValueError("the last message of a dialogue must be the assistant's")
        # The prompt as the policy saw it: templates may write another assistant turn than they ask for.
        prompt = self.prompt_ids(messages[:-1])
        content = self._message_ids(messages[-1]["content"])
        answer = content if truncated else [*content, self.end_id]
        return prompt + answer, [0] * len(prompt) + [1] * len(answer)

    def option_ids(self, options: Sequence[str], setting: str = "`options` in the template set") -> list[int]:
        """The token id of each option, as the model would write it at the answer position.

        Args:
            setting: where the options come from, for the remedy.

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
        """Token ids part by part, up to the last content (or the generation prompt), and what follows."""
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
        # Few long texts come twice, and thousands of them would fill the memory.
        return self._short_ids(text) if len(text) <= _CACHED_LENGTH else self._encode_content(text)

    def _encode_skeleton(self, roles: tuple[str, ...], generation: bool) -> list[list[int]]:
        """The template's own ids before each content and after the last one."""
        marked = [{"role": r, "content": f"\ue000{i}\ue001"} for i, r in enumerate(roles)]
        try:
            text = self.tokenizer.apply_chat_template(
                marked, chat_template=self.template, tokenize=False, add_generation_prompt=generation
            )
        except Exception as e:  # Jinja raises whatever the template's author chose
            raise RowError(f"the chat template refuses the roles {list(roles)}: {e}") from e
        pieces = _MARK.split(text)
        if [int(i) for i in pieces[1::2]] != list(range(len(roles))):
            raise RowError(f"the chat template drops or repeats a message of {list(roles)}")
        return [self._literal_ids(piece) for piece in pieces[0::2]]

    def _end_id(self) -> int:
        """The token that ends an assistant's turn: the first one after its content in the chat template."""
        tail = self._skeleton(("user", "assistant"), False)[-1]
        added = tail and tail[0] in self.tokenizer.added_tokens_decoder
        end = tail[0] if added else self.tokenizer.eos_token_id
        if end is None:
            raise InputError(f"model {self.tokenizer.name_or_path}: no token ends a turn; set eos_token")
        return end

    def _control_ids(self) -> set[int]:
        """Tokens that no content may hold: the special ones, and what else the chat template builds turns from.

        Further added tokens are text: some tokenizers have line breaks and spaces among them.
        """
        turns = (self._skeleton(("user", "assistant"), False), self._skeleton(("user",), True))
        structure = {i for skeleton in turns for piece in skeleton for i in piece}
        added = self.tokenizer.added_tokens_decoder.items()
        control = {i for i, t in added if t.special or (i in structure and t.content.strip())}
        return control | set(self.tokenizer.all_special_ids)


class Thinking(BaseModel):
    """The marks around what a reasoning model thinks before it answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    open: str = Field(min_length=1)
    close: str = Field(min_length=1)
    begun: bool = False
    """Whether the chat template writes the opening mark: a text without the closing one is then all thought."""


class TemplateSet(BaseModel):
    """What is asked of the model at each step; one YAML file per family of models. One that `extends` another
    has the other's parts where it has none of its own.

    Each step is a list of messages; the item `conversation` stands for the row's own turns. In a content,
    `{name}` is replaced once, as data: nothing inside a replacement is looked at again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    chat_template: str | None = None
    transcript: dict[Literal["user", "assistant", "system"], str]
    """How a turn looks when the conversation is quoted inside one message."""
    answer: tuple[dict[str, str] | Literal["conversation"], ...]
    critique: tuple[dict[str, str] | Literal["conversation"], ...]
    revision: tuple[dict[str, str] | Literal["conversation"], ...]
    feedback: tuple[dict[str, str] | Literal["conversation"], ...]
    direct: tuple[dict[str, str] | Literal["conversation"], ...] | None = None
    """What asks for a revision where `revise.critique: false` leaves the critique out."""
    options: tuple[str, str]
    thinking: Thinking | None = None
    """Marks of thinking blocks; the run's `thinking` says whether the blocks are kept."""
    prefixes: tuple[str, ...] = ()
    """Regular expressions, matched at the start of a revision: what they match is removed, until none does."""
    critiques: tuple[str, ...] = ()
    """Regular expressions, matched at the start of a revision: one that matches is a critique (`sft.drop`)."""
    refusals: tuple[str, ...] = ()
    """Regular expressions, matched at the start of a response: one that matches declines (`ppo.watch`,
    `evaluate.sets`)."""
    reasons: tuple[str, ...] = ()
    """Regular expressions, searched in a refusal: where none is found it gives no reason, and is evasive."""
    red_team: tuple[dict[str, str] | Literal["conversation"], ...] | None = None
    """What `cai-ray redteam` asks; {transcript} quotes the examples as turns of a person."""
    reasoning: tuple[dict[str, str] | Literal["conversation"], ...] | None = None
    """With `verdict`: what `label.mode: cot` asks. The feedback model reasons, and then weighs the options."""
    verdict: tuple[dict[str, str] | Literal["conversation"], ...] | None = None
    rating: tuple[dict[str, str] | Literal["conversation"], ...] | None = None
    """With `scores`: what `label.mode: score` asks of each response by itself."""
    scores: tuple[str, ...] | None = None
    """Ten texts of one token each, from the worst to the best."""

    @property
    def sha(self) -> str:
        """A hash of what is asked, whatever file it stands in."""
        return derive_id(self.model_dump(mode="json", exclude={"reasons"}))

    def answer_messages(self, conversation: Messages) -> list[Message]:
        return self._fill(self.answer, conversation, {})

    def critique_messages(self, conversation: Messages, response: str, principle: Principle) -> list[Message]:
        return self._fill(
            self.critique,
            conversation,
            {"response": response, "critique_request": principle.critique_request},
        )

    def revision_messages(
        self, conversation: Messages, response: str, principle: Principle, critique: str
    ) -> list[Message]:
        fields = {
            "response": response,
            "critique": critique,
            "critique_request": principle.critique_request,
            "revision_request": principle.revision_request,
        }
        return self._fill(self.revision, conversation, fields)

    def direct_messages(self, conversation: Messages, response: str, principle: Principle) -> list[Message]:
        fields = {"response": response, "revision_request": principle.revision_request}
        return self._fill(self.direct or (), conversation, fields)

    def feedback_messages(
        self, conversation: Messages, response_a: str, response_b: str, principle: Principle
    ) -> list[Message]:
        fields = {"response_a": response_a, "response_b": response_b, "comparison": principle.comparison}
        return self._fill(self.feedback, conversation, fields)

    def reasoning_messages(
        self, conversation: Messages, response_a: str, response_b: str, principle: Principle
    ) -> list[Message]:
        fields = {"response_a": response_a, "response_b": response_b, "comparison": principle.comparison}
        return self._fill(self.reasoning or (), conversation, fields)

    def verdict_messages(
        self, conversation: Messages, response_a: str, response_b: str, principle: Principle, reasoning: str
    ) -> list[Message]:
        fields = {
            "response_a": response_a,
            "response_b": response_b,
            "comparison": principle.comparison,
            "reasoning": reasoning,
        }
        return self._fill(self.verdict or (), conversation, fields)

    def rating_messages(self, conversation: Messages, response: str, principle: Principle) -> list[Message]:
        return self._fill(
            self.rating or (), conversation, {"response": response, "principle": principle.text}
        )

    def red_team_messages(self, examples: Sequence[str]) -> list[Message]:
        if self.red_team is None:
            raise InputError(
                f"template set {self.name} has no red_team; add it (see cai_ray/templates/general.yaml)"
            )
        return self._fill(self.red_team, [Message(role="user", content=e) for e in examples], {})

    def _fill(self, step: Sequence[Any], conversation: Messages, fields: dict[str, str]) -> list[Message]:
        messages: list[Message] = []
        for item in step:
            if item == "conversation":
                messages += [Message(role=m["role"], content=m["content"]) for m in conversation]
            else:
                messages.append(
                    Message(role=item["role"], content=self._pieces(item["content"], conversation, fields))
                )
        return messages

    def _pieces(self, text: str, conversation: Messages, fields: dict[str, str]) -> list[Piece]:
        pieces: list[Piece] = []
        for i, part in enumerate(_FIELD.split(text)):
            if i % 2 == 0:
                pieces.append(Piece(part, True))
            elif part == "transcript":
                for m in conversation:
                    before, _, after = self.transcript[m["role"]].partition("{content}")
                    pieces += [Piece(before, True), Piece(m["content"], False), Piece(after, True)]
            else:
                pieces.append(Piece(fields[part], False))
        return [p for p in pieces if p.text]


_FIELD = re.compile(
    r"\{(transcript|response|response_a|response_b|critique|critique_request|revision_request|comparison"
    r"|reasoning|principle)\}"
)

# What each step is given: the fields it must ask with, and those it may also use. `{transcript}` every step has.
_STEPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "answer": ((), ()),
    "critique": (("response", "critique_request"), ()),
    "revision": (("response", "revision_request"), ("critique", "critique_request")),
    "direct": (("response", "revision_request"), ()),
    "feedback": (("response_a", "response_b", "comparison"), ()),
    "reasoning": (("response_a", "response_b", "comparison"), ()),
    "verdict": (("response_a", "response_b", "comparison", "reasoning"), ()),
    "rating": (("response", "principle"), ()),
    "red_team": ((), ()),
}
# The parts that a mode of labelling needs, beside those that every set has.
_MODES = {"logprob": (), "cot": ("reasoning", "verdict"), "score": ("rating", "scores")}


def check_templates(templates: TemplateSet, where: str | Path) -> None:
    """Raises InputError where a step would ask without what it is about, or with what it does not have."""
    fault = next(_faults(templates), None)
    if fault:
        raise InputError(f"template set {where}: {fault}; see cai_ray/templates/general.yaml")


def check_mode(templates: TemplateSet, mode: str) -> None:
    """Raises InputError where the set lacks a part that `label.mode` needs."""
    missing = [part for part in _MODES[mode] if not getattr(templates, part)]
    if missing:
        raise InputError(
            f"label.mode={mode}: template set {templates.name} has no {' and no '.join(missing)}; add what is missing "
            "(see cai_ray/templates/general.yaml), or use label.mode: logprob"
        )


def check_direct(templates: TemplateSet) -> None:
    """Raises InputError where the set cannot ask for a revision without a critique."""
    if templates.direct is None:
        raise InputError(
            f"revise.critique=false: template set {templates.name} has no direct; add it (see "
            "cai_ray/templates/general.yaml), or leave revise.critique on"
        )


def _faults(templates: TemplateSet) -> Iterator[str]:
    quoted = False
    for step, (needed, optional) in _STEPS.items():
        items, found = getattr(templates, step), set()
        if items is None:  # a part that not everyone needs
            continue
        if not items:
            yield f"{step} is empty; list its messages"
        for i, item in enumerate(items):
            if item == "conversation":
                continue
            for key in ("role", "content"):
                if key not in item:
                    yield f"{step}.{i} lacks `{key}`; a message has `role` and `content`"
            if item["role"] not in ("system", "user", "assistant"):
                yield f"{step}.{i}: role {item['role']!r} is none of system, user, assistant"
            found |= set(_FIELD.findall(item["content"]))
        for name in needed:
            if name not in found:
                yield f"{step} lacks {{{name}}}; put it in one of its messages"
        for name in sorted(found - {*needed, *optional, "transcript"}):
            yield f"{step} has no {{{name}}}; leave it out"
        if "conversation" not in items and (step == "answer" or "transcript" not in found):
            yield f"{step} lacks the item `conversation`" + (" or {transcript}" if step != "answer" else "")
        quoted |= "transcript" in found
    if templates.scores is not None and len(templates.scores) != 10:
        yield f"scores has {len(templates.scores)} texts; list ten, from the worst to the best"
    for role in ("user", "assistant", "system"):
        text = templates.transcript.get(role)
        if text is None and quoted:
            yield f"transcript lacks `{role}`, and a step quotes {{transcript}}; say how such a turn looks"
        if text is not None and role != "system" and "{content}" not in text:
            yield f"transcript.{role} lacks {{content}}"
    for key in ("prefixes", "critiques", "refusals", "reasons"):
        for i, rule in enumerate(getattr(templates, key)):
            try:
                everything = re.match(rule, "")
            except (re.error, OverflowError, RecursionError) as e:
                yield f"{key}.{i}: {rule!r} is no regular expression ({e}); mend it"
            else:
                if everything:
                    yield f"{key}.{i}: {rule!r} matches an empty text; say what has to stand there"


def plain_messages(messages: Messages) -> list[dict[str, str]]:
    """Messages with their pieces joined: for display, records, and engines that render by themselves."""
    return [
        {
            "role": m["role"],
            "content": c if isinstance(c := m["content"], str) else "".join(p.text for p in c),
        }
        for m in messages
    ]


def load_templates(name: str | Path) -> TemplateSet:
    """Reads a template set by path, or by the name of one that ships with the package.

    Raises:
        InputError: it is missing, not well-formed, or lacks what a step needs.
    """
    shipped = Path(__file__).parent / "templates"
    path = Path(name)
    if not path.exists():
        path = shipped / f"{name}.yaml"
    if not path.exists():
        names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
        raise InputError(f"template set {name}: no such file; give a path, or one of: {names}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and "extends" in data:
            basis = load_templates(str(data.pop("extends")))
            data = basis.model_dump() | data
        templates = TemplateSet.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        raise InputError(
            f"template set {path}: {where}: {first['msg']}; see cai_ray/templates/general.yaml"
        ) from e
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise InputError(f"template set {path}: cannot be read ({' '.join(str(e).split())})") from e
    check_templates(templates, path)
    return templates


def load_tokenizer(model: str | Path) -> Any:
    """Raises InputError where the folder or id holds no tokenizer."""
    path = Path(model)
    if path.exists() and not any(
        (path / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise InputError(f"model {model}: the folder has no tokenizer; save one there with save_pretrained()")
    if not path.exists() and str(model).startswith((".", "/", "~")):
        raise InputError(f"model {model}: no such folder")
    try:
        if _is_plain(path):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(model))
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    except Exception as e:  # a broken file makes transformers raise almost anything
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"model {model}: its tokenizer cannot be loaded ({reason})") from e


def _is_plain(folder: Path) -> bool:
    """Whether AutoTokenizer would take the tokenizer.json as it is: of a Llama whose tokenizer has no class of its own
    (other families are given one). Importing it takes 3 s, which commands that only check or skip need not spend."""
    try:
        family, named = (
            json.loads((folder / name).read_text())[key]
            for name, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class"))
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False
    plain = family == "llama" and named in ("PreTrainedTokenizerFast", "TokenizersBackend")
    return plain and (folder / "tokenizer.json").exists()


def _without_control_tokens(tokenizer: Any, control: set[int]) -> Any:
    """A copy of the tokenizer in which no text is special.

    Without its added tokens no text is looked up before it is encoded. But many vocabularies hold the control tokens
    too, and a unigram model finds whatever is in its vocabulary, a BPE model whatever its merges lead to (or, with
    `ignore_merges`, any whole word): the copy cannot reach them.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"model {tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is needed, so that text can be "
            "encoded without special tokens"
        )
    data = json.loads(backend.to_str())
    data.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    model = data["model"]
    vocab = model["vocab"]
    if isinstance(
        vocab, list
    ):  # unigram: a piece's place is its id, so it stays, by a name that nobody writes
        for i, piece in enumerate(vocab):
            if i in control:
                piece[0] = f"\ue000{uuid4().hex}\ue001"
            elif model.get("byte_fallback") and _BYTE.fullmatch(piece[0]):
                # They are for characters without a piece, not for a text that reads "<0x0A>".
                piece[1] = -1e6
    else:
        gone = {text for text, i in vocab.items() if i in control} - {model.get("unk_token")}
        model["vocab"] = {text: i for text, i in vocab.items() if text not in gone}
        if "merges" in model:
            merges = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
            model["merges"] = [[a, b] for a, b in merges if gone.isdisjoint((a, b, a + b))]
    return Tokenizer.from_str(json.dumps(data))
