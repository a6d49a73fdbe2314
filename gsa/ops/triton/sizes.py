"""Sizes that results depend on. Free of triton, so that tracing can use them.

Where segments lie depends on their own sequence, never on the batch: a row in a batch is computed
exactly like the row alone.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def number_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, decays and the memory on chip, for q's: fp32's is fp64.

    d log f is a sum of differences, and a memory is rounded once a chunk. In fp32 that would show.
    """
    return torch.float64 if dtype == torch.float32 else torch.float32


def chunk_tokens(dtype: torch.dtype, M: int) -> int:
    """Tokens that are multiplied with each other as one tile; fewer where tiles are large: those of
    decays are fp64 for fp32 and fp32 for fp16."""
    if dtype == torch.float32:
        return 32 if M <= 64 else 16
    return 32 if dtype == torch.float16 and M > 128 else 64


def span_tokens() -> int:
    """Tokens from one memory that the backward pass looks at to the next."""
    return 512


def segment_tokens(packed: bool) -> int:
    """Tokens that one program walks. Shorter segments would fill a GPU with fewer sequences, but
    every border costs a second look at what is written before it."""
    return 1024 if packed else 2048


@dataclass(frozen=True)
class Sizes:
    """Letters as in `gsa/ops/types.py`; packed: S sequences in one row, else S is B.

    K = 0: a memory of values alone, whose scores are q [B, T, H, M] (gated linear attention).
    """

    B: int
    T: int
    H: int
    G: int
    K: int
    V: int
    M: int
    S: int
    packed: bool
    chunk: int
    span: int

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, cu: Tensor | None) -> "Sizes":
        (B, T, H, _), (G, K), V, M = q.shape, k.shape[2:], v.shape[3], log_forget.shape[3]
        S, chunk = B if cu is None else cu.shape[0] - 1, chunk_tokens(q.dtype, M)
        return Sizes(B, T, H, G, K, V, M, S, cu is not None, chunk, span_tokens())

    @property
    def X(self) -> int:
        return self.K + self.V

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def unit(self) -> int:
        return segment_tokens(self.packed)

    @property
    def segmented(self) -> bool:
        """Whether a sequence can have two segments."""
        return self.unit < self.T

    def spans(self, length: int) -> int:
        """Spans of `length` tokens, numbered as in `find_span` of `common.py`."""
        if self.packed:
            return self.T // length + self.S
        return self.B * ((self.T + length - 1) // length if self.T > 0 else 1)

    @property
    def borders(self) -> int:
        """Memories kept within sequences, every `span` tokens."""
        return self.B * (self.T // self.span)


class Room(NamedTuple):
    """A tensor within a longer one of bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return memory[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class KeptRooms(NamedTuple):
    """What the backward pass needs beside inputs and results, one after the other in one piece of
    memory; None where it is not there."""

    raw: Room | None  # [tokens, H, M]: scores against other tokens, without `grow`
    own: Room | None  # [tokens, H]: q · k of each token; both None without keys
    lifted: Room | None  # `Gates` in launch.py
    fades: Room | None
    steep: Room | None
    starts: Room | None  # [units, G, M, X]; None if every sequence is one segment
    keys: Room | None  # [borders, G, M, K], snapshots; None if they are to be made again
    values: Room | None  # [borders, G, M, V]
    bytes: int

    @staticmethod
    def of(n: Sizes, number: torch.dtype, operand: torch.dtype, memories: bool) -> "KeptRooms":
        """number, operand: dtypes of sums and of factors. memories: whether snapshots are kept."""
        shots, chunks, units = memories and n.borders > 0, n.spans(n.chunk), n.spans(n.unit)
        forms = (
            ((n.tokens, n.H, n.M), number, n.K > 0),
            ((n.tokens, n.H), number, n.K > 0),
            ((n.tokens, n.G, n.M), operand, True),
            ((chunks, n.G, 2, n.M), number, True),
            ((chunks, n.G), torch.int32, True),
            ((units, n.G, n.M, n.X), number, n.segmented),
            ((n.borders, n.G, n.M, n.K), operand, shots),
            ((n.borders, n.G, n.M, n.V), operand, shots),
        )  # fmt: skip
        rooms: list[Room | None] = []
        end = 0
        for shape, dtype, wanted in forms:
            rooms.append(Room(end, shape, dtype) if wanted else None)
            if wanted:  # the next one begins at a multiple of 128 bytes
                end += (math.prod(shape) * dtype.itemsize + 127) // 128 * 128
        return KeptRooms(*rooms, bytes=end)
