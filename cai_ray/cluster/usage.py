"""Tokens that engine calls used."""

from __future__ import annotations

from typing import NamedTuple

from cai_ray.storage.records import TokenUsage


class Usage(NamedTuple):
    """Tokens: of prompts, of them found in the prefix cache, and generated; and how often an engine was asked."""

    prompt: int = 0
    cached: int = 0
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
