"""Tokenised conversations for training: the driver renders and packs them, every rank reads them without a copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cai_ray.errors import InputError, RowError
from cai_ray.prompts.messages import Message, Messages
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet
from cai_ray.storage.records import derive_seed
from cai_ray.train.batches import Example


@dataclass(frozen=True)
class Dialogues:
    """Rows of token ids one after another. The ranks of a node share the arrays through Ray's object store.

    Row i is ids[starts[i] : starts[i + 1]]. The assistant's last answer begins at answers[i] in it.
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
    """Puts rows one after another; each row's mask must be 0 up to the answer and 1 from there."""
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
    """A conversation and a response as tokens, with the end of the turn unless the response was cut off.

    Args:
        limit: the model's context in tokens.
        truncated: whether the length limit ended the response.

    Returns:
        None if the row does not fit the context or cannot be encoded: one row never ends a stage.
    """
    messages = [*templates.answer_messages(conversation), Message(role="assistant", content=response)]
    try:
        example = Example(*renderer.dialogue_ids(messages, truncated))
    except RowError:
        return None
    return example if len(example.ids) <= limit else None


def context_length(model: str, otherwise: int = 1 << 30) -> int:
    """The number of positions of a model folder or id (`max_position_embeddings`); `otherwise` if it names none.

    Of a model that also reads images it is that of its language model, which its config.json may leave to the class.
    """
    place = Path(model) / "config.json"
    if place.exists() and (found := _positions(json.loads(place.read_text(encoding="utf-8")))):
        return found
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    return _positions(config.to_dict()) or otherwise


def _positions(config: dict[str, Any]) -> int:
    text = {**config, **(config.get("text_config") or {})}
    return int(text.get("max_position_embeddings") or text.get("n_positions") or 0)


@lru_cache(maxsize=2)
def shuffled(count: int, *key: object) -> list[int]:
    """A shuffled order of `count` rows that depends on the key alone, not on ranks or on what ran before.

    The list is cached: do not change it.
    """
    return np.random.default_rng(derive_seed("shuffle", *key)).permutation(count).tolist()


def check_fits(section: str, longest: int, budget: int) -> None:
    """Checks before anything starts that every row fits a micro-batch.

    Raises:
        InputError: the longest row is more than `budget` tokens.
    """
    if longest > budget:
        raise InputError(
            f"{section}.micro_batch_tokens={budget} is less than the longest row ({longest} tokens); "
            f"use {longest} or more"
        )
