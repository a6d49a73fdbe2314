"""Text that was seen before: exact paragraphs, and documents that are mostly made of others.

A paragraph is known by a hash of its words, digits alike, case and punctuation aside. A document
is known by its shingles, every run of 8 words, of which a fixed eighth is kept, chosen by hash; so
a copy is found inside a larger text, too, and every run gives the same answer.
"""

import hashlib
import re

import numpy as np

from gsa.data.corpus.blocks import Block

SHINGLE_WORDS = 8
SAMPLED = 8
"""One shingle in so many is kept."""
MAX_SEEN = 0.5
"""Share of a document's shingles that may be known before it counts as a copy."""
MIN_PARAGRAPH_WORDS = 8
"""Shorter paragraphs may come again: they say too little to be copies."""

_WORD = re.compile(r"\w+")
_DIGIT = re.compile(r"\d")
_MULTIPLIER = 0x9E3779B97F4A7C15


class Seen:
    """What was kept so far."""

    def __init__(self) -> None:
        self._paragraphs: set[bytes] = set()
        self._shingles: set[int] = set()
        self._words: dict[str, int] = {}

    def new_blocks(self, blocks: list[Block]) -> list[Block]:
        """The blocks without paragraphs seen before, here or in a document that was kept."""
        here: set[bytes] = set()
        kept = []
        for block in blocks:
            key = _paragraph_key(block.text) if block.kind in ("text", "item") else None
            if key is not None and (key in self._paragraphs or key in here):
                continue
            if key is not None:
                here.add(key)
            kept.append(block)
        return kept

    def share(self, text: str) -> float:
        """Share of the document's sampled shingles that were seen before."""
        shingles = self.shingles(text)
        return sum(shingle in self._shingles for shingle in shingles) / max(1, len(shingles))

    def add(self, blocks: list[Block], text: str) -> None:
        """Remember a document that is kept."""
        self._paragraphs.update(filter(None, (_paragraph_key(block.text) for block in blocks)))
        self._shingles.update(self.shingles(text))

    def shingles(self, text: str) -> list[int]:
        """The sampled shingles of a text, as 64-bit hashes."""
        hashes = self._word_hashes(_WORD.findall(_DIGIT.sub("0", text.lower())))
        count = len(hashes) - SHINGLE_WORDS + 1
        if count < 1:
            return []
        rolled = np.zeros(count, dtype=np.uint64)
        for i in range(SHINGLE_WORDS):
            rolled = rolled * np.uint64(_MULTIPLIER) + hashes[i : i + count]
        rolled ^= rolled >> np.uint64(29)
        rolled *= np.uint64(_MULTIPLIER)
        rolled ^= rolled >> np.uint64(32)
        return np.unique(rolled[rolled % np.uint64(SAMPLED) == 0]).tolist()

    def _word_hashes(self, words: list[str]) -> np.ndarray:
        known = self._words
        for word in set(words).difference(known):
            known[word] = int.from_bytes(_digest(word), "little")
        return np.array([known[word] for word in words], dtype=np.uint64)


def _paragraph_key(text: str) -> bytes | None:
    words = _WORD.findall(_DIGIT.sub("0", text.lower()))
    return _digest(" ".join(words)) if len(words) >= MIN_PARAGRAPH_WORDS else None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
