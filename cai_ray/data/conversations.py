r"""One reading of the forms that conversations have in people's files.

| form | such as |
| --- | --- |
| messages | `[{"role": "user", "content": "…"}, …]`, also with `from` and `value` (ShareGPT) or `parts` |
| one message | `{"role": "user", "content": "…"}` |
| lists | `{"role": ["user", …], "content": ["…", …]}`, as `datasets` stores a sequence of messages |
| transcript | `"\n\nHuman: …\n\nAssistant: …"` (HH-RLHF), also without the line breaks at the start (transcripts.py) |
| plain text | the text of a person's turn |

Messages may also stand as JSON in a text, as CSV has them. A content is a text, or a list of parts whose texts are
joined. A system prompt may have a column of its own: `system_prompt`, or beside messages `system`. Turns of a tool,
images and whatever else cannot be said in words have no plain reading: OddRow. They do no harm in an answer that is not
used, after a prompt's last user turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cai_ray.data.formats import clean
from cai_ray.data.left_out import OddRow, short, short_list
from cai_ray.data.transcripts import begins_as_transcript, turns_of
from cai_ray.storage.records import Turn

LISTS = ("messages", "conversations", "conversation")
"""Columns of messages."""
PROMPT_COLUMNS = (*LISTS, "prompt", "question", "text", "chosen")
"""Columns of prompts: the first that a row has a value for is read."""
CONTEXT_COLUMNS = (*LISTS, "prompt", "question")
"""Columns of what `chosen` and `rejected` answer."""

_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "ai", "model"),
    "tool": (
        *("tool", "function", "ipython", "observation"),
        *("function_call", "function_response", "tool_call", "tool_response", "tool_result"),
    ),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_SPEAKERS = ("role", "from", "speaker")
_CONTENTS = ("content", "value", "parts", "text")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_CALLS = ("tool_calls", "function_call")


class _Part(NamedTuple):
    """A turn as it stands in the row; its content is read only if the turn is used."""

    role: str
    content: Any
    calls: bool = False


def prompt_of(row: Mapping[str, Any], column: str | None = None) -> list[Turn]:
    """The conversation of a row, up to where the assistant answers: what follows the last user turn is left off.

    Args:
        column: the column to read; by default the first of PROMPT_COLUMNS that has a value.

    Raises:
        OddRow: there is none, it cannot be read, or nobody asks anything in it.
    """
    columns = (column,) if column else PROMPT_COLUMNS
    value = _value(row, columns)
    if value is None:
        raise OddRow(
            f"no {column}" if column else "no prompt",
            f"none of {short_list(columns)} has a value, only {short_list(row)}; set `column` to the one of prompts",
        )
    return _instructed(row, to_prompt(value), _column(row, columns))


def conversation_of(row: Mapping[str, Any]) -> list[Turn]:
    """The conversation of a row, with all its turns.

    Raises:
        OddRow: it has none, or it cannot be read.
    """
    messages = to_messages(_value(row, CONTEXT_COLUMNS))
    return _instructed(row, messages, _column(row, CONTEXT_COLUMNS))


def to_prompt(value: Any) -> list[Turn]:
    """A conversation up to its last user turn, if only the answer follows that.

    Raises:
        OddRow: it cannot be read, or nobody asks anything in it.
    """
    parts = _parts(value)
    while parts and parts[-1].role in ("assistant", "tool"):
        parts.pop()
    if not parts or parts[-1].role != "user":
        raise OddRow("no user turn to answer")
    messages = _turns(parts)
    if not messages[-1]["content"].strip():
        raise OddRow("a blank prompt")
    return messages


def to_messages(value: Any) -> list[Turn]:
    """A conversation in any of the forms, with all its turns.

    Raises:
        OddRow: it cannot be read.
    """
    messages = _turns(_parts(value))
    if not messages:
        raise OddRow("no turn", short(value))
    return messages


def compared(row: Mapping[str, Any]) -> tuple[list[Turn], str, str]:
    """The conversation of a row, and its answers `chosen` and `rejected`.

    Both may be whole conversations that share all but the last turn, or answers to one of CONTEXT_COLUMNS.

    Raises:
        OddRow: one of them cannot be read or is empty, or they are the same.
    """
    given = [_from_json(row.get(name)) for name in ("chosen", "rejected")]
    if any(value is None for value in given):
        raise OddRow("no `chosen` or no `rejected`", f"it has {short_list(row)}")
    shared = _value(row, CONTEXT_COLUMNS)
    if shared is None:
        conversations = [to_messages(value) for value in given]
    else:
        conversations = [_answer(value) for value in given]
    (*chosen_context, chosen), (*rejected_context, rejected) = conversations
    if chosen["role"] != "assistant" or rejected["role"] != "assistant":
        raise OddRow("`chosen` or `rejected` does not end with the assistant's turn")
    if shared is None and chosen_context != rejected_context:
        raise OddRow("`chosen` and `rejected` differ before the assistant's last turn")
    messages = chosen_context if shared is None else to_prompt(shared)
    if chosen_context == rejected_context and len(chosen_context) > len(messages):
        messages = chosen_context  # the prompt was the conversation's last question alone
    if not messages or messages[-1]["role"] != "user":
        raise OddRow("no user turn to answer")
    answers = chosen["content"], rejected["content"]
    if not all(answer.strip() for answer in answers):
        raise OddRow("an empty answer")
    if answers[0].strip() == answers[1].strip():
        raise OddRow("equal answers")
    return _instructed(row, messages, _column(row, CONTEXT_COLUMNS)), *answers


def _column(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """The first column that there is a value in, of these."""
    return next((name for name in columns if row.get(name) is not None and row[name] != []), None)


def _value(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """The first value that there is, of these columns."""
    column = _column(row, columns)
    value = _from_json(row[column]) if column else None
    if column in LISTS and isinstance(value, str) and value.lstrip().startswith("["):
        raise OddRow(f"`{column}` is not a JSON list", "name a column of texts `prompt`")
    return value


def _from_json(value: Any) -> Any:
    """Messages that stand as JSON in a text, and any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    messages = read if isinstance(read, list) else [read]
    spoken = [isinstance(m, dict) and any(isinstance(m.get(key), str) for key in _SPEAKERS) for m in messages]
    said = [isinstance(m, dict) and any(key in m for key in _CONTENTS) for m in messages]
    return read if messages and all(spoken) and all(said) else value


def _instructed(row: Mapping[str, Any], messages: list[Turn], column: str | None) -> list[Turn]:
    """The conversation behind a system prompt that the row has in a column of its own."""
    names = ("system_prompt", "system") if column in LISTS else ("system_prompt",)
    text = next((row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()), None)
    if text is None or any(m["role"] == "system" for m in messages):
        return messages
    return [{"role": "system", "content": clean(text)}, *messages]


def _answer(value: Any) -> list[Turn]:
    """An answer as the last of some turns; a plain text is the assistant's."""
    if isinstance(value, str) and not begins_as_transcript(value):
        return [{"role": "assistant", "content": clean(value)}]
    return to_messages(value)


def _parts(value: Any) -> list[_Part]:
    if isinstance(value, str):
        text = clean(value)
        return [_Part(*turn) for turn in turns_of(text)] or [_Part("user", text)]
    if isinstance(value, Mapping):
        value = _rows_of_lists(value) or [dict(value)]
    if not isinstance(value, list | tuple) or not any(isinstance(m, Mapping) for m in value):
        raise OddRow("no conversation", f"messages or a text are needed, got {short(value)}")
    return [_part(message) for message in value if message is not None]


def _rows_of_lists(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages of which the roles stand in one list, the contents in another; empty if they do not."""
    columns = {key: v for key, v in value.items() if isinstance(v, list | tuple)}
    lengths = {len(columns[key]) for key in (*_SPEAKERS, *_CONTENTS) if key in columns}
    if len(lengths) != 1 or not columns.keys() & set(_SPEAKERS):
        return []
    (length,) = lengths
    return [{key: v[i] for key, v in columns.items() if len(v) == length} for i in range(length)]


def _part(message: Any) -> _Part:
    if not isinstance(message, Mapping):
        raise OddRow("a turn without a role", short(message))
    name = next((message[key] for key in _SPEAKERS if message.get(key) is not None), None)
    role = _ROLE_OF.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise OddRow("a role that is not known", f"role {short(name)} is not system, user or assistant")
    content = next((message[key] for key in _CONTENTS if message.get(key) is not None), None)
    return _Part(role, content, any(message.get(key) for key in _CALLS))


def _turns(parts: Iterable[_Part]) -> list[Turn]:
    turns: list[Turn] = []
    for part in parts:
        if part.role == "tool" or part.calls:
            raise OddRow("a tool's turn")
        text = _text(part.content)
        if text is not None:
            turns.append({"role": part.role, "content": text})
        elif part.role != "system":  # no instructions are none
            raise OddRow("a turn without a text")
    return turns


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content and clean(content)
    pieces = [content] if isinstance(content, Mapping) else content
    if not isinstance(pieces, list | tuple):
        raise OddRow("a content that is not a text", short(content))
    texts = [_piece(piece) for piece in pieces if piece is not None]
    return "".join(texts) if texts else None


def _piece(piece: Any) -> str:
    """The text of a part of a content."""
    if isinstance(piece, str):
        return clean(piece)
    if not isinstance(piece, Mapping):
        raise OddRow("a part of a turn that is not a text", short(piece))
    kind, text = piece.get("type"), piece.get("text")
    if kind in _TEXT_PARTS and isinstance(text, str):
        return clean(text)
    kind = kind or next((name for name, value in piece.items() if value is not None), None)
    what = "an image in a turn" if "image" in str(kind) else "a part of a turn that is not a text"
    raise OddRow(what, f"a part of type {short(kind)}")
