"""States of token sequences that were read or written, so that what begins alike is read once."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from gsa.generation.state import ModelState


class Prefixes:
    """Keeps states within a number of bytes; those used longest ago go first.

    Args:
        limit: bytes of all states together; 0 keeps none.
    """

    def __init__(self, limit: int):
        self._limit, self.bytes = limit, 0
        self._states: OrderedDict[tuple[str, bytes], tuple[ModelState, int]] = OrderedDict()

    def longest(self, after: str, tokens: Sequence[int]) -> tuple[ModelState, int] | None:
        """The state that has read most of how `tokens` [T] begin, and how many; None for none.

        after: name of what was read before the first of them.
        """
        whole = _pack(tokens)
        known = [key for key in self._states if key[0] == after and whole.startswith(key[1])]
        if not known:
            return None
        best = max(known, key=lambda key: len(key[1]))
        self._states.move_to_end(best)
        return self._states[best][0], len(best[1]) // array("q").itemsize

    def put(self, after: str, tokens: Sequence[int], state: ModelState) -> None:
        """Keeps the state after `tokens`, if it fits at all."""
        key = (after, _pack(tokens))
        size = len(key[1]) + state.met.nbytes + sum(t.nbytes for t in state.tensors.values())
        if size > self._limit:
            return
        if key in self._states:
            self.bytes -= self._states.pop(key)[1]
        self._states[key] = state, size
        self.bytes += size
        while self.bytes > self._limit:
            self.bytes -= self._states.popitem(last=False)[1][1]

    @property
    def enabled(self) -> bool:
        return self._limit > 0


def _pack(tokens: Sequence[int]) -> bytes:
    # Numbers of one width: a prefix of the bytes is one of the tokens, found at memory's speed.
    return array("q", tokens).tobytes()
