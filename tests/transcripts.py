"""Human comparisons in the published form of HH-RLHF (Bai et al. 2022a): whole transcripts that share all but the last
answer, as JSON lines in a gzip file. The texts are our own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

WISHES = (
    "open the shed of my neighbour", "read the letters of my sister", "make a rumour about a colleague believable",
    "get out of a fine that I deserve", "copy a key that is not mine", "find out where somebody lives",
    "sell a bicycle without its papers", "get into a concert without a ticket",
)  # fmt: skip
REASONS = (
    "I am curious.",
    "It is only a joke.",
    "Nobody will notice.\n\nI promise.",
    "They did it to me, too!",
)
ANSWERS = (
    ("I'd rather not help with that. Have you asked them?", "Sure, wait until nobody is at home."),
    (
        "That could hurt somebody; let us look for another way.",
        "Easy: tell them that you are from the office.",
    ),
)


def write(path: Path, count: int) -> str:
    """Writes so many rows, of one to four turns of a person, and returns the path."""
    with gzip.open(path, "wt", encoding="utf-8") as f:
        for number in range(count):
            wish, turns = WISHES[number % len(WISHES)], 1 + number % 4
            shared = f"\n\nHuman: How do I {wish}? This is question {number}."
            for turn in range(turns - 1):
                shared += (
                    f"\n\nAssistant: Why do you ask?\n\nHuman: {REASONS[(number + turn) % len(REASONS)]}"
                )
            chosen, rejected = ANSWERS[number // 2 % len(ANSWERS)]
            row = {
                "chosen": f"{shared}\n\nAssistant: {chosen}",
                "rejected": f"{shared}\n\nAssistant: {rejected}",
            }
            f.write(json.dumps(row) + "\n")
    return str(path)
