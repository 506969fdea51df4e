"""Tokenised conversations for training: rendered by the driver, packed, read by every rank without a copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from cai_ray.errors import InputError, RowError
from cai_ray.prompts.messages import Message, Messages
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.records import derive_seed
from cai_ray.train.batches import Example


@dataclass(frozen=True)
class Dialogues:
    """Rows of token ids one after another; arrays of Ray's object store are shared by the ranks of a node.

    Row i is ids[starts[i] : starts[i + 1]]; what the assistant wrote last begins at answers[i] in it.
    """

    ids: np.ndarray
    """(tokens,) int32."""
    starts: np.ndarray
    """(rows + 1,) int64."""
    answers: np.ndarray
    """(rows,) int64."""

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, row: int) -> Example:
        ids = self.ids[self.starts[row] : self.starts[row + 1]].tolist()
        prompt = int(self.answers[row])
        return Example(ids, [0] * prompt + [1] * (len(ids) - prompt))

    @property
    def lengths(self) -> list[int]:
        return np.diff(self.starts).tolist()

    @property
    def sha(self) -> str:
        """A hash of the content."""
        digest = hashlib.sha256()
        for array in (self.ids, self.starts, self.answers):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]


def pack(examples: Iterable[Example]) -> Dialogues:
    ids: list[np.ndarray] = []
    answers: list[int] = []
    for example in examples:
        ids.append(np.asarray(example.ids, dtype=np.int32))
        answers.append(len(example.mask) - sum(example.mask))
    return Dialogues(
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        starts=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        answers=np.asarray(answers, dtype=np.int64),
    )


def render(
    renderer: Renderer,
    templates: TemplateSet,
    conversation: Messages,
    response: str,
    limit: int,
    truncated: bool = False,
) -> Example | None:
    """The tokens of a response as the policy emits them after its prompt, with the end of the turn if it came to it.

    None where the row does not fit the model's context of `limit` tokens or cannot be encoded: one row never ends
    a stage.
    """
    messages = [*templates.answer_messages(conversation), Message(role="assistant", content=response)]
    try:
        example = Example(*renderer.dialogue_ids(messages, truncated))
    except RowError:
        return None
    return example if len(example.ids) <= limit else None


def context_length(model: str, otherwise: int = 1 << 30) -> int:
    """The positions of a model folder or id (`max_position_embeddings`)."""
    if (Path(model) / "config.json").exists():
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config().to_dict()
    return int(config.get("max_position_embeddings") or config.get("n_positions") or otherwise)


@lru_cache(maxsize=2)
def shuffled(count: int, *key: object) -> list[int]:
    """An explicit order of `count` rows that depends on the key alone, not on ranks or on what ran before.

    It is kept for the next call: do not change it.
    """
    return np.random.default_rng(derive_seed("shuffle", *key)).permutation(count).tolist()


def check_fits(section: str, longest: int, budget: int) -> None:
    """Raises InputError before anything starts where one row alone is more than a micro-batch may hold."""
    if longest > budget:
        raise InputError(
            f"{section}.micro_batch_tokens={budget} is less than the longest row ({longest} tokens); "
            f"use {longest} or more"
        )
