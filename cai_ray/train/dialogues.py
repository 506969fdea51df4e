"""Tokenised conversations for training: the driver renders and packs them, every rank reads them without a copy."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from cai_ray.config.training import TrainConfig
from cai_ray.errors import RowError
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
    return min(context_length(model), cfg.max_length or sys.maxsize)


def context_length(model: str, otherwise: int = 1 << 30) -> int:
    """The number of positions of a model folder or id (`max_position_embeddings`); `otherwise` if it names none."""
    if (Path(model) / "config.json").exists():
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config().to_dict()
    return int(config.get("max_position_embeddings") or config.get("n_positions") or otherwise)


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
