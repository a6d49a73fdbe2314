"""Where each token of a batch stands: made once per forward pass, read by every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gsa.ops import check_cu_seqlens
from gsa.ops.reference import sequence_of_token


@dataclass(frozen=True)
class TokenLayout:
    """Positions, padding and document boundaries of a batch [B, T].

    positions: int64 [B, T] (or [1, T], shared by all rows), counted from the start of each
        sequence over real tokens only; -1 at padding.
    pads: bool [B, T], True at padding; None if there is none.
    cu_seqlens: [S+1], for sequences packed in one row; None otherwise.
    documents: int64 [T], the index of each packed token's sequence; None unless packed.
    consecutive: whether positions are known to count columns, one by one within each sequence.
    longest: tokens that no packed sequence exceeds; None if that is not known.
    """

    positions: Tensor
    pads: Tensor | None = None
    cu_seqlens: Tensor | None = None
    documents: Tensor | None = None
    consecutive: bool = False
    longest: int | None = None

    @staticmethod
    def of_rows(
        tokens: int, device: torch.device, *, past: int = 0, attention_mask: Tensor | None = None
    ) -> "TokenLayout":
        """Layout of a batch of rows.

        Args:
            tokens: T, how many tokens are given now.
            past: how many columns a cache has seen before them, padding included.
            attention_mask: [B, past+T], or [B, T] if past is 0; 0 at padding, anywhere.
        """
        if attention_mask is None:
            positions = torch.arange(past, past + tokens, device=device)[None]
            return TokenLayout(positions, consecutive=True)
        real = attention_mask.to(device=device, dtype=torch.bool)
        positions = (real.cumsum(1) - 1)[:, real.shape[1] - tokens :]
        pads = ~real[:, real.shape[1] - tokens :]
        return TokenLayout(positions.masked_fill(pads, -1), pads)

    @staticmethod
    def of_packed(
        tokens: int, device: torch.device, cu_seqlens: Tensor, longest: int | None = None
    ) -> "TokenLayout":
        """Layout of one row in which the sequences delimited by `cu_seqlens` follow each other.

        Boundaries that come from the CPU are checked here and moved once, not in every layer;
        `longest`, too, is checked there. On another device it is trusted.
        """
        if not torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu":
            if device.type != "cpu":
                check_cu_seqlens(cu_seqlens, tokens)
            most = max(cu_seqlens.diff().tolist(), default=0)
            if longest is not None and longest < max(most, 1):
                raise ValueError(
                    f"max_seqlen: expected no shorter than the longest sequence of cu_seqlens, "
                    f"{most}, and at least 1, got {longest}"
                )
        bounds = cu_seqlens.to(device, non_blocking=True)
        documents = sequence_of_token(bounds, tokens)
        start = bounds.long().index_select(0, documents)
        positions = torch.arange(tokens, device=device) - start
        return TokenLayout(
            positions[None],
            cu_seqlens=bounds,
            documents=documents,
            consecutive=True,
            longest=longest,
        )
