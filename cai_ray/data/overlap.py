"""Prompts that are both trained on and held out: texts are compared without case, width and spacing."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from cai_ray.errors import InputError
from cai_ray.storage.records import Turn


def normalised(messages: Iterable[Turn]) -> str:
    """A conversation's text without differences in case, width and spacing: splits are compared by it."""
    text = "\n".join(m["content"] for m in messages)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(row: Mapping[str, Any]) -> bytes:
    """A hash of the normalised text of a row's `messages`: millions of them fit in memory."""
    text = normalised(row["messages"]).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def text_keys(rows: Iterable[Mapping[str, Any]]) -> set[bytes]:
    """The keys of rows with `messages`."""
    return {text_key(row) for row in rows}


def check_disjoint(train: Iterable[Mapping[str, Any]], held: Iterable[Mapping[str, Any]]) -> None:
    """Raises InputError if an evaluation prompt is also used for training (docs/method.md, item 10)."""
    check_held_out(text_keys(train), held)


def check_held_out(trained_on: Collection[bytes], held: Iterable[Mapping[str, Any]]) -> None:
    """Checks that none of the held-out rows is trained on.

    Args:
        trained_on: keys of what is trained on (`text_keys`).

    Raises:
        InputError: some are; it tells how many, and names the first three.
    """
    shared = list(_shared(trained_on, held))
    if not shared:
        return
    named = ", ".join(repr(text[:80]) for text in shared[:3])
    if len(shared) == 1:
        what = f"evaluation prompt {named} is also a training prompt"
    else:
        more = ", …" if len(shared) > 3 else ""
        what = f"each of {len(shared)} evaluation prompts is also a training prompt ({named}{more})"
    raise InputError(
        f"{what}; remove {'it' if len(shared) == 1 else 'them'} from one of the two, or set evaluate.overlap=drop, "
        "which leaves them out of training"
    )


def _shared(trained_on: Collection[bytes], held: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    return (row["messages"][-1]["content"] for row in held if text_key(row) in trained_on)
