"""Where prompts and comparisons of people come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cai_ray.config.section import Section


class PromptSource(Section):
    path: str
    """JSON lines, CSV, parquet or Arrow: a file, a folder of files, or a pattern in a folder (any URI)."""
    kind: Literal["red_team", "helpful"] | None = None
    """What its prompts are; needed where the rows have no `kind` of their own."""
    column: str | None = None
    """The column that holds messages or text; by default the first of messages, prompt, text, chosen."""
    limit: int | None = Field(default=None, gt=0)
    """Use the first so many rows only."""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """Leave out prompts that share more than this of their character 5-grams with an earlier one, of any source."""


class Comparisons(Section):
    path: str
    """Rows as for prompts, with `chosen` and `rejected`: transcripts, or answers to the row's `messages`."""
    target: float = Field(default=1.0, gt=0.5, le=1.0)
    """The label's probability for the chosen answer, where the row has no `target` of its own."""
    about: Literal["helpful", "harmless"] = "helpful"
    """What the people judged; the report counts human harmlessness labels, of which the method needs none."""
    limit: int | None = Field(default=None, gt=0)
