"""What a model's tokenizer and chat template make of prompts, before a run: `--check` tells it.

Hundreds of thousands of prompts take seconds. The template is asked about each order of roles once, with a short text.
The texts themselves are rendered of a sample, and of the prompts that may be too long: a text has no more tokens than
bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_ray.errors import RowError
from cai_ray.prompts.renderer import Renderer
from cai_ray.prompts.templates import TemplateSet

SAMPLE = 2000
"""Prompts whose texts are rendered, at most."""
LONG_BYTES = 16 << 20
"""Bytes of the longest prompts that are rendered, at most."""

Roles = tuple[str, ...]
Row = Mapping[str, Any]


class PromptCheck:
    """Renders prompts as the policy will be asked them.

    Args:
        context: tokens of the model's context.
    """

    def __init__(self, renderer: Renderer, templates: TemplateSet, context: int):
        self.renderer, self.templates, self.context = renderer, templates, context

    def lines(self, key: str, prompts: Sequence[Row], written: int) -> Iterator[str]:
        """Says how many prompts the template refuses, cannot be encoded, or leave too little room.

        Args:
            key: the setting that the prompts come from.
            written: the most tokens that are written after a prompt.
        """
        shortest: dict[Roles, int] = {}
        refused: dict[Roles, str] = {}
        counts = Counter(map(_roles, prompts))
        for roles in counts:
            try:
                shortest[roles] = self._tokens([{"role": role, "content": "a"} for role in roles])
            except RowError as e:
                refused[roles] = str(e)
        if refused:
            most = max(refused, key=counts.__getitem__)
            total = sum(counts[roles] for roles in refused)
            yield f"{key}: {total} of {len(prompts)} prompts cannot be rendered, most often: {refused[most]}"
        rows = [row for row in prompts if _roles(row) in shortest]
        yield from self._sampled(key, rows)
        yield from self._too_long(key, rows, shortest, written)

    def _sampled(self, key: str, rows: Sequence[Row]) -> Iterator[str]:
        sample = rows[:: -(-len(rows) // SAMPLE) or 1]
        lengths: list[int] = []
        errors: Counter[str] = Counter()
        for row in sample:
            try:
                lengths.append(self._tokens(row["messages"]))
            except RowError as e:
                errors[str(e)] += 1
        of = f"{len(rows)} prompts" if len(sample) == len(rows) else f"a sample of {len(sample)} prompts"
        if errors:
            worst = errors.most_common(1)[0][0]
            yield f"{key}: {errors.total()} of {of} cannot be encoded, most often: {worst}"
        if lengths:
            lengths.sort()
            yield (
                f"{key}: {len(rows)} prompts; tokens in the middle {lengths[len(lengths) // 2]}, at most "
                f"{lengths[-1]}" + (f" ({of})" if len(sample) < len(rows) else "")
            )

    def _too_long(
        self, key: str, rows: Sequence[Row], shortest: Mapping[Roles, int], written: int
    ) -> Iterator[str]:
        room = self.context - written
        sizes = ((_bytes(row), row) for row in rows)
        may_be = [(size, row) for size, row in sizes if size + shortest[_roles(row)] > room]
        may_be.sort(key=lambda pair: -pair[0])
        lengths: list[int] = []
        rendered = 0
        for size, row in may_be:
            if rendered and rendered + size > LONG_BYTES:
                break
            rendered += size
            try:
                lengths.append(self._tokens(row["messages"]))
            except RowError:  # counted in the sample
                lengths.append(0)
        if count := sum(length > room for length in lengths):
            at_least = "at least " if len(lengths) < len(may_be) else ""
            yield (
                f"{key}: {at_least}{count} of {len(rows)} prompts are longer than {room} tokens, which the context of "
                f"{self.context} leaves beside {written} to be written; the longest has {max(lengths)}"
            )

    def _tokens(self, messages: Sequence[Row]) -> int:
        return len(self.renderer.prompt_ids(self.templates.answer_messages(messages)))


def _roles(row: Row) -> Roles:
    return tuple(message["role"] for message in row["messages"])


def _bytes(row: Row) -> int:
    return sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in row["messages"])
