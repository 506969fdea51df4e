"""Finds prompts that say almost the same: collected data repeats itself, and each repetition costs engine calls."""

from __future__ import annotations

from rensa import RMinHash, RMinHashDeduplicator

_GRAM = 5
_HASHES = 128
_SEED = 0


class NearDuplicates:
    """Finds texts whose sets of character 5-grams overlap with an earlier text's.

    The overlap is Jaccard's (shared over all 5-grams), estimated from MinHash signatures (Broder 1997) of 128 hashes.
    Its standard error is at most .045. Locality-sensitive hashing decides which texts are compared at all, so a pair
    near the threshold may be missed. A signature takes 512 bytes. The same texts in the same order give the same
    answer.

    Args:
        threshold: the overlap, in (0, 1), at which a text counts as seen.
    """

    def __init__(self, threshold: float):
        self.index = RMinHashDeduplicator(threshold, _HASHES, use_lsh=True, seed=_SEED)
        self.size = 0

    def seen(self, text: str) -> bool:
        """Whether a similar text came before. If not, later texts are compared with this one."""
        grams = {text[i : i + _GRAM] for i in range(max(1, len(text) - _GRAM + 1))}
        signature = RMinHash(_HASHES, _SEED)
        signature.update(sorted(grams))
        if self.index.get_duplicates(signature):
            return True
        self.index.add(str(self.size), signature)
        self.size += 1
        return False
