"""How tokens are laid out in chunks: a batch of rows, or sequences packed in one row.

A chunk holds up to C consecutive tokens of one sequence; missing ones are padded with zeros, which
neither write (w = 0) nor forget (log f = 0). Chunks are handled in segments of a few, so that the
temporary tensors of a segment stay in the processor's caches and time per token does not depend on
T.

Tile layout: [n, B, heads, C, width] for the n chunks of a segment.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK = 64
"""Tokens per chunk: at 64 the products inside and between chunks cost about the same."""

SEGMENT_TILES = 32
"""Tiles (chunk × row × head) per segment that keep a segment of width 64 within a few MB."""

MIN_SEGMENT_CHUNKS = 4
"""A memory is saved once per segment: at least 256 tokens apart, whatever the batch."""


def segment_chunks(rows: int, heads: int) -> int:
    """Chunks per segment for B rows of G heads; `sym_max`, since sizes may be symbolic."""
    return torch.sym_max(MIN_SEGMENT_CHUNKS, SEGMENT_TILES // torch.sym_max(1, rows * heads))  # pyright: ignore[reportReturnType]


def max_chunks(tokens: int, sequences: int | None) -> int:
    """Most chunks that `tokens` can need: per row of a batch, or for S packed sequences."""
    if sequences is None:
        return (tokens + CHUNK - 1) // CHUNK
    return tokens // CHUNK + sequences


@dataclass(frozen=True)
class Tiling:
    """The chunks of one call, in the order in which they are computed.

    chunk: C. chunks: N. segment: chunks per segment.
    first, last: for packed sequences, {chunk: sequence} at which a sequence begins and ends.
    token: for packed sequences, [N·C] the token of each place, 0 where padded.
    padded: for packed sequences, [N·C] True where there is no token.
    """

    tokens: int
    rows: int
    chunk: int
    chunks: int
    segment: int
    first: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    token: Tensor | None = None
    padded: Tensor | None = None

    @staticmethod
    def of_batch(rows: int, tokens: int, heads: int) -> "Tiling":
        chunk = CHUNK
        while chunk // 2 >= max(tokens, 1):
            chunk //= 2
        chunks = -(-tokens // chunk)
        return Tiling(tokens, rows, chunk, chunks, segment_chunks(rows, heads))

    @staticmethod
    def of_packed(cu_seqlens: Tensor, tokens: int, heads: int, device: torch.device) -> "Tiling":
        """`cu_seqlens` [S+1] on the CPU, checked."""
        bounds = cu_seqlens.to(torch.int64)
        pieces = -(-bounds.diff() // CHUNK)
        ends = pieces.cumsum(0)
        chunks = int(ends[-1])
        owner = torch.repeat_interleave(torch.arange(len(pieces)), pieces)
        offset = (torch.arange(chunks) - (ends - pieces)[owner]) * CHUNK
        token = (bounds[owner] + offset)[:, None] + torch.arange(CHUNK)
        padded = token >= bounds[owner + 1][:, None]
        filled = (pieces > 0).nonzero().flatten().tolist()
        last = {int(ends[s]) - 1: s for s in filled}
        first = {int(ends[s] - pieces[s]): s for s in filled}
        return Tiling(
            tokens=tokens,
            rows=1,
            chunk=CHUNK,
            chunks=chunks,
            segment=segment_chunks(1, heads),
            first=first,
            last=last,
            token=token.masked_fill(padded, 0).flatten().to(device),
            padded=padded.flatten().to(device),
        )

    def segments(self) -> list[range]:
        return [
            range(start, min(start + self.segment, self.chunks))
            for start in range(0, self.chunks, self.segment)
        ]

    def gather(self, x: Tensor, chunks: range, dtype: torch.dtype) -> Tensor:
        """[B, T, heads, width] → tiles [n, B, heads, C, width] of the given chunks, contiguous."""
        n, C = len(chunks), self.chunk
        B, _, heads, width = x.shape
        tiles = x.new_empty((n, B, heads, C, width), dtype=dtype)
        places = slice(chunks.start * C, chunks.stop * C)
        if self.token is not None and self.padded is not None:
            picked = x[0].index_select(0, self.token[places])
            picked.masked_fill_(self.padded[places, None, None], 0)
            tiles.copy_(picked.view(n, 1, C, heads, width).transpose(2, 3))
            return tiles
        whole = min(places.stop, self.tokens) // C - chunks.start
        rest = min(places.stop, self.tokens) - (chunks.start + whole) * C
        if whole:
            block = x[:, places.start : places.start + whole * C].unflatten(1, (whole, C))
            tiles[:whole].copy_(block.permute(1, 0, 3, 2, 4))
        if rest:
            tiles[whole].zero_()
            tiles[whole, :, :, :rest].copy_(x[:, self.tokens - rest : self.tokens].transpose(1, 2))
        return tiles

    def scatter(self, tiles: Tensor, chunks: range, out: Tensor) -> None:
        """Writes tiles [n, B, heads, C, width] to their tokens in `out` [B, T, heads, width]."""
        n, C = len(chunks), self.chunk
        places = slice(chunks.start * C, chunks.stop * C)
        if self.token is not None and self.padded is not None:
            flat = tiles[:, 0].transpose(1, 2).flatten(0, 1).to(out.dtype)
            kept = (~self.padded[places]).nonzero().flatten()
            out[0].index_copy_(0, self.token[places][kept], flat[kept])
            return
        whole = min(places.stop, self.tokens) // C - chunks.start
        rest = min(places.stop, self.tokens) - (chunks.start + whole) * C
        if whole:
            block = out[:, places.start : places.start + whole * C].unflatten(1, (whole, C))
            block.copy_(tiles[:whole].permute(1, 0, 3, 2, 4))
        if rest:
            out[:, self.tokens - rest : self.tokens].copy_(
                tiles[n - 1, :, :, :rest].transpose(1, 2)
            )
