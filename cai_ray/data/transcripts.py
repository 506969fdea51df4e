r"""Reads a transcript: a text that holds a conversation, with the name of the speaker before each turn.

HH-RLHF's are `"\n\nHuman: …\n\nAssistant: …"`. Files of people have them without the line breaks at the start or
between turns, with other names (`USER: … ASSISTANT: …`) or marks (`### Human: … ### Assistant: …`). Other texts that
hold an answer are no prompts, and cannot be taken apart: OddRow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cai_ray.data.left_out import OddRow

_SPOKEN = re.compile(r"\s*(?:Human|Assistant):")
_TURN = re.compile(r"\n[ \t]*\n(Human|Assistant): ?")
_LINE = re.compile(r"\n[ \t]*(Human|Assistant): ?")
# Other ways to write speakers, each with what begins a turn: the first group is the person's name, the second one the
# assistant's. A text is one of these only if both speak and the person begins.
_OTHERS = (
    re.compile(r"(?:(?<=\n)|^)[ \t]*(?:(User|USER|human|HUMAN|user)|(Assistant|ASSISTANT|assistant)) ?: ?"),
    re.compile(r"(?:(?<=\n)|^)[ \t]*(?:(Human)|(Assistant)) ?: ?"),
    re.compile(r"#{2,3} ?(?:(Human|User|USER)|(Assistant|ASSISTANT)) ?: ?"),
)
_SYSTEM = re.compile(r"\s*(?:System|SYSTEM): ?(.*?)\n\s*(?=(?:Human|User|USER):)", re.DOTALL)
_WITHIN = re.compile(r"\n[ \t]*\nHuman: .*\n[ \t]*\nAssistant: ?\S", re.DOTALL)
# What a chat template begins a text with, and an answer.
_RENDERED = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)*\s*(?:<\|im_start\|>|\[INST\]|<\|start_header_id\|>|<start_of_turn>"
    r"|<\|(?:system|user)\|>).*"
    r"(?:<\|im_start\|>assistant|\[/INST\]|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model"
    r"|<\|assistant\|>)\s*\S",
    re.DOTALL,
)


def begins_as_transcript(text: str) -> bool:
    """Whether a text begins as HH-RLHF's transcripts do."""
    return bool(_SPOKEN.match(text))


def turns_of(text: str) -> list[tuple[str, str]]:
    """The turns of a transcript as roles and contents; empty for any other text.

    Where a speaker comes twice in a row, as in some published ones, it is one turn.

    Raises:
        OddRow: it holds an answer, but cannot be taken apart.
    """
    if system := _SYSTEM.match(text):
        spoken = turns_of(text[system.end() :])
        return [("system", system[1].strip()), *spoken] if len(spoken) > 1 else []
    if not _SPOKEN.match(text):
        turns = next((turns for pattern in _OTHERS if (turns := _by_others(pattern, text))), [])
        if not turns and _WITHIN.search(text):
            raise OddRow(
                "a transcript behind other text", "it holds an answer; give the conversation as `messages`"
            )
        if not turns and _RENDERED.match(text):
            raise OddRow(
                "a text that a chat template made", "it holds an answer; give the conversation as `messages`"
            )
        return turns
    parts = _TURN.split("\n\n" + text.lstrip())
    if len(set(parts[1::2])) == 1:
        lines = _LINE.split("\n\n" + text.lstrip())  # perhaps there are no blank lines between turns either
        parts = lines if len(set(lines[1::2])) == 2 else parts
    return _merged([("user" if name == "Human" else "assistant", said) for name, said in _pairs(parts)])


def _by_others(pattern: re.Pattern[str], text: str) -> list[tuple[str, str]]:
    start = pattern.match(text.lstrip())
    if start is None or not start[1]:
        return []
    _, *parts = pattern.split(text.lstrip())
    turns = [
        ("user" if person else "assistant", said)
        for person, _, said in zip(parts[0::3], parts[1::3], parts[2::3], strict=True)
    ]
    return _merged(turns) if any(role == "assistant" for role, _ in turns) else []


def _pairs(parts: Sequence[str]) -> zip[tuple[str, str]]:
    return zip(parts[1::2], parts[2::2], strict=True)


def _merged(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for role, said in turns:
        content = said.strip()
        if out and out[-1][0] == role:
            out[-1] = role, f"{out[-1][1]}\n\n{content}".strip()
        else:
            out.append((role, content))
    return out
