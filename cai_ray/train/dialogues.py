"""Tokenised conversations for training: the driver writes their ids to a file, which every rank maps into memory."""

from __future__ import annotations

import hashlib
import io
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cai_ray.config.training import TrainConfig
from cai_ray.errors import RowError
from cai_ray.prompts.messages import Message, Messages
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.files import local_folder
from cai_ray.storage.models import context_length
from cai_ray.storage.records import derive_seed
from cai_ray.train.batches import Example

TOKENS = "tokens/ids.bin"
"""The token ids of a stage that trains, in its folder until it is complete."""


@dataclass(frozen=True)
class Dialogues:
    """Rows of token ids, which may be more than fit into memory.

    Row i is ids[starts[i] : ends[i]]. The assistant's last answer begins at answers[i] in it.
    """

    source: np.ndarray | str
    """The ids, (tokens,) int32; or the URI of a file of them."""
    starts: np.ndarray
    """(rows,) int64."""
    ends: np.ndarray
    """(rows,) int64."""
    answers: np.ndarray
    """(rows,) int32."""
    ids_sha: str

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, row: int) -> Example:
        ids = self.ids[self.starts[row] : self.ends[row]].tolist()
        prompt = int(self.answers[row])
        return Example(ids, [0] * prompt + [1] * (len(ids) - prompt))

    def __getstate__(self) -> dict[str, Any]:
        # Without what is mapped: another process maps the file itself, on its own node.
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def ids(self) -> np.ndarray:
        if not isinstance(self.source, str):
            return self.source
        folder, _, name = self.source.rpartition("/")
        return np.memmap(Path(local_folder(folder)) / name, np.int32, "r")

    @property
    def lengths(self) -> list[int]:
        return (self.ends - self.starts).tolist()

    @property
    def longest(self) -> int:
        return int((self.ends - self.starts).max())

    @property
    def tokens(self) -> int:
        return int((self.ends - self.starts).sum())

    @property
    def sha(self) -> str:
        """A hash of the content."""
        digest = hashlib.sha256(self.ids_sha.encode())
        for places in (self.starts, self.ends, self.answers):
            digest.update(places.tobytes())
        return digest.hexdigest()[:16]

    def ordered(self, order: np.ndarray) -> Dialogues:
        """The rows in another order, or some of them: what was row order[i] is row i. The ids stay where they are."""
        return replace(self, starts=self.starts[order], ends=self.ends[order], answers=self.answers[order])


class Packer:
    """Writes rows of token ids one after another, and keeps their places.

    Args:
        write: takes the ids of a row, as bytes.
    """

    def __init__(self, write: Callable[[bytes], Any]):
        self.write = write
        self._digest = hashlib.sha256()
        self._ends, self._answers = array("q", [0]), array("i")

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, example: Example) -> None:
        """Takes a row whose mask is 0 up to the answer and 1 from there."""
        ids = np.asarray(example.ids, np.int32).tobytes()
        self.write(ids)
        self._digest.update(ids)
        self._ends.append(self._ends[-1] + len(example.ids))
        self._answers.append(len(example.mask) - sum(example.mask))

    def dialogues(self, source: np.ndarray | str) -> Dialogues:
        """The rows, in the order in which they came; `source` is where their ids were written to."""
        ends, answers = as_numpy(self._ends), as_numpy(self._answers)
        return Dialogues(source, ends[:-1], ends[1:], answers, self._digest.hexdigest())


def as_numpy(numbers: array[Any]) -> np.ndarray:
    """The same numbers, without a copy: the array must not grow any more."""
    return np.frombuffer(numbers, numbers.typecode) if numbers else np.array(numbers)


def pack(examples: Iterable[Example]) -> Dialogues:
    """Packs rows into memory."""
    written = io.BytesIO()
    packer = Packer(written.write)
    for example in examples:
        packer.add(example)
    return packer.dialogues(np.frombuffer(written.getvalue(), np.int32))


def render(
    renderer: Renderer,
    templates: TemplateSet,
    conversation: Messages,
    response: str,
    limit: int,
    truncated: bool = False,
    left_out: Counter[str] | None = None,
) -> Example | None:
    """A conversation and a response as tokens, with the end of the turn unless the response was cut off.

    Args:
        limit: the most tokens (`longest_row`).
        truncated: whether the length limit ended the response.
        left_out: counts the rows that are `too_long`, and those that the tokenizer or chat template `refused`.

    Returns:
        None if the row is longer or cannot be encoded: one row never ends a stage.
    """
    left_out = Counter() if left_out is None else left_out
    messages = [*templates.answer_messages(conversation), Message(role="assistant", content=response)]
    try:
        example = Example(*renderer.dialogue_ids(messages, truncated))
    except RowError:
        left_out["refused"] += 1
        return None
    if len(example.ids) > limit:
        left_out["too_long"] += 1
        return None
    return example


def longest_row(model: str, cfg: TrainConfig) -> int:
    """The most tokens that a row may have: the model's context, or `max_length` if that is less."""
    return min(context_length(model) or sys.maxsize, cfg.max_length or sys.maxsize)


@lru_cache(maxsize=2)
def shuffled(count: int, *key: object) -> list[int]:
    """A shuffled order of `count` rows that depends on the key alone, not on ranks or on what ran before.

    The list is cached: do not change it.
    """
    return np.random.default_rng(derive_seed("shuffle", *key)).permutation(count).tolist()


def tell_long_rows(section: str, lengths: Sequence[int], budget: int) -> None:
    """Says on stderr how many rows are longer than a micro-batch: each has one of its own, which takes more memory."""
    long = [length for length in lengths if length > budget]
    if long:
        print(
            f"{section}: {len(long)} of {len(lengths)} rows are longer than {section}.micro_batch_tokens={budget} "
            f"(at most {max(long)} tokens); each gets a forward pass of its own. If memory is short, set "
            f"{section}.max_length to leave long rows out",
            file=sys.stderr,
            flush=True,
        )
