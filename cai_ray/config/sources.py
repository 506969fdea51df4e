"""Where prompts and comparisons of people come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cai_ray.config.section import Section, by_content


class PromptSource(Section):
    """A file or folder of prompts."""

    path: str = by_content("files")
    """JSON lines, CSV, Parquet or Arrow: a file, a folder of files, or a pattern in a folder (any URI, also
    `hf://datasets/org/name@revision/file`)."""
    kind: Literal["red_team", "helpful"] | None = None
    """The kind of all its prompts. Needed if the rows have no `kind` of their own."""
    column: str | None = None
    """The column with messages or text. Defaults to the first of messages, conversations, conversation, prompt,
    question, text, chosen that a row has a value for."""
    limit: int | None = Field(default=None, gt=0)
    """Use only this many rows from the start."""
    near_duplicates: float | None = Field(default=None, gt=0, lt=1)
    """Leave out prompts that share more than this share of their character 5-grams with an earlier prompt of any
    source."""


class Comparisons(Section):
    """A file or folder of comparisons that people made."""

    path: str = by_content("files")
    """Files as for prompts, with `chosen` and `rejected`: whole conversations, or answers to the row's `messages` or
    `prompt`."""
    target: float = Field(default=1.0, gt=0.5, le=1.0)
    """Probability of the chosen answer as a label, for rows without a `target` of their own."""
    about: Literal["helpful", "harmless"] = "helpful"
    """What the people judged. The report counts human harmlessness labels, of which the method needs none."""
    limit: int | None = Field(default=None, gt=0)
    """Use only this many rows from the start."""
