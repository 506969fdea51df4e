"""Tokens that engine calls used."""

from __future__ import annotations

from typing import NamedTuple

from cai_ray.storage.records import TokenUsage


class Usage(NamedTuple):
    """Token counts of engine calls, and the number of calls."""

    prompt: int = 0
    cached: int = 0
    """Those of the prompt tokens that were in the prefix cache."""
    generated: int = 0
    calls: int = 0

    def __add__(self, other: Usage) -> Usage:  # type: ignore[override]
        return Usage(*(a + b for a, b in zip(self, other, strict=True)))

    def as_record(self) -> TokenUsage:
        """The column `usage` of a row."""
        return {
            "prompt": self.prompt,
            "cached": self.cached,
            "generated": self.generated,
            "calls": self.calls,
        }
