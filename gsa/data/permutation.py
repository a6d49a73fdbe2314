"""A shuffled order without a list: a seeded permutation of 0 … size−1, evaluated point by point.

A balanced Feistel network permutes the smallest domain 4^n that holds `size`; indices that land
outside 0 … size−1 walk on along their cycle until they land inside (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002). The round function is the 64-bit
finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014).

Why not `numpy.random.Generator.permutation`: a trillion tokens in rows of 2048 would hold 4 GB of
order on every rank and build it anew each epoch, and numpy does not promise the same stream in
its next version, which would break resuming. Here any point costs a few hundred nanoseconds,
a thousand are kept at a time, and the order is fixed by this file alone.
"""

from functools import lru_cache

import numpy as np

_ROUNDS = 8
_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 1024
"""Points of `shuffled` that are evaluated at once, and kept."""


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    # Seed and epoch are mixed one after the other, so that (1, 2) and (2, 1) share nothing.
    state = np.array([seed & _MASK_64], dtype=np.uint64)
    for word in (epoch, *range(_ROUNDS)):
        mixed = _mix(state[-1:] + np.uint64(_GOLDEN)) ^ np.array([word], dtype=np.uint64)
        state = np.append(state, _mix(mixed))
    return state[-_ROUNDS:]


def permute(index: np.ndarray, *, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where each of `index` (int64, in 0 … size−1) goes in the order of (seed, epoch); int64.

    A bijection of 0 … size−1 for every seed and epoch, and a pure function of its arguments.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    point = index.astype(np.uint64)
    outside = np.ones(point.shape, dtype=bool)
    while outside.any():
        point[outside] = _feistel(point[outside], keys, half_bits)
        outside = point >= np.uint64(size)
    return point.astype(np.int64)


def shuffled(position: int, count: int, *, size: int, seed: int) -> np.ndarray:
    """The `count` indices, int64 in 0 … size−1, that stand from `position` on in endless epochs.

    Epoch e, positions e · size and on, is in the order of (seed, e).
    """
    pieces = [np.empty(0, dtype=np.int64)]
    while count > 0:
        epoch, place = divmod(position, size)
        piece = _block(place // _BLOCK, size, seed, epoch)[place % _BLOCK :][:count]
        pieces.append(piece)
        position, count = position + len(piece), count - len(piece)
    return np.concatenate(pieces)


@lru_cache(maxsize=8)
def _block(number: int, size: int, seed: int, epoch: int) -> np.ndarray:
    """Points number · _BLOCK and on of an epoch: a thousand take hardly longer than one."""
    places = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, size), dtype=np.int64)
    return permute(places, size=size, seed=seed, epoch=epoch)


def _feistel(point: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = point >> shift, point & mask
    for i_round in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + keys[i_round : i_round + 1]) & mask)
    return (left << shift) | right
