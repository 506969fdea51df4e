"""Prompts that say almost the same: data collected from people repeats itself, and each repetition costs a chain."""

from __future__ import annotations

from rensa import RMinHash, RMinHashDeduplicator

_GRAM = 5
_HASHES = 128
_SEED = 0


class NearDuplicates:
    """Finds texts whose sets of character 5-grams overlap with an earlier text's.

    The overlap is Jaccard's (shared over all), estimated from MinHash signatures (Broder 1997) of 128 hashes: its
    standard error is at most .045. Which texts are compared at all is decided by locality-sensitive hashing, so a
    pair near the threshold may be missed. Signatures take 512 bytes a text. The same texts in the same order give
    the same answer.

    Args:
        threshold: the overlap, in (0, 1), at which a text counts as seen.
    """

    def __init__(self, threshold: float):
        self.found = RMinHashDeduplicator(threshold, _HASHES, use_lsh=True, seed=_SEED)
        self.known = 0

    def seen(self, text: str) -> bool:
        """Whether a text like this came before; if not, later ones are compared with it."""
        grams = {text[i : i + _GRAM] for i in range(max(1, len(text) - _GRAM + 1))}
        signature = RMinHash(_HASHES, _SEED)
        signature.update(sorted(grams))
        if self.found.get_duplicates(signature):
            return True
        self.found.add(str(self.known), signature)
        self.known += 1
        return False
