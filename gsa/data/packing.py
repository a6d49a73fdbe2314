"""Training rows out of shards: documents end to end, cut in rows, in an order computed by position.

There is no iterator and no state: the batch at a position is a function of (shards, seq_len, seed,
position), so resuming is exact and any number of processes agree on the order.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gsa.data.permutation import shuffled
from gsa.data.shards import TOKENS, TokenShards

IGNORE = -100
"""The label that the loss skips (Hugging Face's convention)."""


class Batch(NamedTuple):
    """One packed batch, T = all its tokens end to end.

    input_ids [1, T] int64; labels [1, T] int64, equal to input_ids but −100 at the first token of
    each segment (the model shifts, so no token is predicted across a boundary); cu_seqlens [S+1]
    int32, the boundaries of the S segments: every row start and every document start, none empty;
    max_seqlen, tokens that no segment exceeds: those of a row. None if that is not known.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    max_seqlen: int | None = None


class Span(NamedTuple):
    """Tokens start … end−1 of some shards: one row."""

    shards: TokenShards
    start: int
    end: int


class Rows(ABC):
    """Rows of `seq_len` tokens in an order that is a function of position."""

    seq_len: int

    @abstractmethod
    def batch(self, position: int, rows: int) -> Batch:
        """The `rows` rows from `position` on, which counts rows since the start of training.

        batch(p, 4) is batch(p, 1), …, batch(p + 3, 1) end to end, over epoch ends too. Returns
        tensors on the CPU, input_ids and labels [1, rows · seq_len].
        """

    def share(self, position: int, rows: int, rank: int, world: int) -> Batch:
        """What process `rank` of `world` takes of batch(position, rows): an equal part, in order.

        The parts of all ranks, end to end, are the whole batch, however many there are. ValueError
        if `rows` does not divide by `world`.
        """
        check_at_least("rows", rows, 1)
        check_at_least("world", world, 1)
        check_at_least("rank", rank, 0)
        if rank >= world:
            raise ValueError(f"rank: expected 0 … {world - 1}, got {rank}")
        if rows % world:
            raise ValueError(
                f"rows: {rows} rows cannot be shared equally by {world} processes; use a multiple "
                f"of {world}, such as {world * -(-rows // world)}"
            )
        own = rows // world
        return self.batch(position + rank * own, own)


class TextRows(Rows):
    """Rows cut out of shards."""

    @abstractmethod
    def spans(self, position: int, rows: int) -> list[Span]:
        """Where the tokens of the rows at position … position+rows−1 lie."""

    def batch(self, position: int, rows: int) -> Batch:
        check_at_least("position", position, 0)
        check_at_least("rows", rows, 1)
        _check_fits_int32(rows * self.seq_len)
        return _pack(self.spans(position, rows))


class PackedRows(TextRows):
    """Rows of `seq_len` tokens in a seeded order, one permutation per epoch.

    The documents of `shards` are laid end to end and cut every `seq_len` tokens; the last
    num_tokens mod seq_len tokens are left out. Row i of the order is row
    permutation(seed, epoch)[i mod num_rows] with epoch = i // num_rows (gsa/data/permutation.py).
    ValueError if there is not a single whole row.
    """

    def __init__(self, shards: TokenShards, *, seq_len: int, seed: int) -> None:
        check_at_least("seq_len", seq_len, 1)
        check_at_least("seed", seed, 0)
        self.shards = shards
        self.seq_len = seq_len
        self.seed = seed
        self.num_rows = shards.num_tokens // seq_len
        if self.num_rows < 1:
            raise ValueError(
                f"seq_len: a row takes {seq_len} tokens, but {shards.folder} holds "
                f"{shards.num_tokens}; prepare more text or use a smaller seq_len"
            )

    def epoch(self, position: int) -> int:
        """The number of whole passes over the rows before `position`."""
        return position // self.num_rows

    def row_ids(self, position: int, rows: int) -> np.ndarray:
        """Which rows (0 … num_rows−1, in text order) stand at position … position+rows−1."""
        check_at_least("position", position, 0)
        check_at_least("rows", rows, 1)
        return shuffled(position, rows, size=self.num_rows, seed=self.seed)

    def spans(self, position: int, rows: int) -> list[Span]:
        """Where the tokens of the rows at position … position+rows−1 lie."""
        starts = (self.row_ids(position, rows) * self.seq_len).tolist()
        return [Span(self.shards, start, start + self.seq_len) for start in starts]


def validation_batches(shards: TokenShards, *, seq_len: int, rows: int) -> Iterator[Batch]:
    """Every token once, in text order, `rows` rows at a time; the last row may be shorter.

    For a held-out loss: rows start with an empty memory, as in training, and the first token of
    each row and document has no label.
    """
    check_at_least("seq_len", seq_len, 1)
    check_at_least("rows", rows, 1)
    _check_fits_int32(min(rows * seq_len, shards.num_tokens))
    for first in range(0, shards.num_tokens, seq_len * rows):
        last = min(first + seq_len * rows, shards.num_tokens)
        starts = range(first, last, seq_len)
        yield _pack([Span(shards, start, min(start + seq_len, last)) for start in starts])


def _pack(spans: list[Span]) -> Batch:
    total = sum(span.end - span.start for span in spans)
    ids = np.empty(total, dtype=np.int64)
    boundaries = []
    filled = 0
    for shards, start, end in spans:
        tokens = shards.tokens[start:end]
        if int(tokens.max()) >= shards.vocab_size:
            raise ValueError(
                f"{shards.folder / TOKENS}: damaged: a token past the vocabulary of "
                f"{shards.vocab_size} among those from {start} to {end}; prepare again"
            )
        ids[filled : filled + end - start] = tokens
        documents = shards.document_starts
        # The documents that begin strictly inside the row: its own start is a boundary anyway.
        first, last = np.searchsorted(documents, [start + 1, end])
        boundaries += [filled, *(documents[first:last] - start + filled).tolist()]
        filled += end - start
    input_ids = torch.from_numpy(ids).unsqueeze(0)
    labels = input_ids.clone()
    labels[0, boundaries] = IGNORE
    cu_seqlens = torch.tensor([*boundaries, total], dtype=torch.int32)
    return Batch(input_ids, labels, cu_seqlens, max(span.end - span.start for span in spans))


def _check_fits_int32(tokens: int) -> None:
    # cu_seqlens is int32: that is what packed kernels take.
    if tokens >= 2**31:
        raise ValueError(
            f"rows: a batch takes fewer than 2^31 tokens, got {tokens}; ask fewer rows"
        )


def check_at_least(name: str, value: int, least: int) -> None:
    """ValueError naming the argument unless it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
