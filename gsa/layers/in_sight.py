"""Softmax attention over the tokens in sight, and keeping them: all earlier ones, or a window.

State: keys [B, S, G, K], values [B, S, G, V] and positions [B, S] of the S tokens still in sight:
all of them, or with a window the last window - 1. Windows and positions count real tokens only.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gsa.layers.mixer import State
from gsa.layers.token_layout import TokenLayout

NAMES = ("keys", "values", "positions")


def attend(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    layout: TokenLayout,
    state: State | None,
    window: int | None,
) -> tuple[Tensor, State, State]:
    """softmax(q kᵀ / sqrt(K)) v over earlier tokens: (output [B, T, H, V], state after, step).

    Rows of more than two windows, or of more than two of the longest sequence that may be packed in
    them, are attended to block by block unless they have padding: in time and memory linear in T.
    """
    B, T, H, _ = q_BTHK.shape
    step = {"keys": k_BTGK, "values": v_BTGV, "positions": layout.positions.expand(B, -1)}
    seen = append(state, step)
    whole_rows = state is None and layout.pads is None and layout.documents is None
    reach = min(n for n in (window, layout.longest, T) if n is not None)
    if state is None and layout.consecutive and 2 * reach < T:
        output = _attend_in_blocks(q_BTHK, k_BTGK, v_BTGV, layout, reach)
        return output, trim(seen, window), step
    plain = whole_rows and (window is None or window >= T)
    output_BHTV = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        seen["keys"].transpose(1, 2),
        seen["values"].transpose(1, 2),
        attn_mask=None if plain else visible(layout, seen["positions"], window),
        is_causal=plain,
        enable_gqa=k_BTGK.shape[2] != H,
    )
    return output_BHTV.transpose(1, 2), trim(seen, window), step


def _attend_in_blocks(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, layout: TokenLayout, window: int
) -> Tensor:
    """Queries in blocks of a window see keys of their own block and the one before: [B, T, H, V].

    Letters: N blocks · w a window · 2w the keys that a block may see.
    """
    B, T, H, _ = q_BTHK.shape
    N = -(-T // window)
    missing = N * window - T

    def blocks(x_BTHK: Tensor) -> Tensor:
        return F.pad(x_BTHK, (0, 0, 0, 0, 0, missing)).unflatten(1, (N, window))

    def with_previous(x_BNwHK: Tensor) -> Tensor:
        previous = F.pad(x_BNwHK, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat([previous, x_BNwHK], 2).flatten(0, 1).transpose(1, 2)

    query_Nw = torch.arange(N * window, device=q_BTHK.device).view(N, window)
    key_N2w = torch.cat([query_Nw - window, query_Nw], 1)
    query, key = query_Nw[:, :, None], key_N2w[:, None]
    seen = (key >= 0) & (key <= query) & (query - key < window)
    if layout.documents is not None:
        document = F.pad(layout.documents, (0, missing), value=-1)
        seen = seen & (document[query] == document[key.clamp(min=0)])
    output = F.scaled_dot_product_attention(
        blocks(q_BTHK).flatten(0, 1).transpose(1, 2),
        with_previous(blocks(k_BTGK)),
        with_previous(blocks(v_BTGV)),
        attn_mask=seen[None, :, None].expand(B, -1, -1, -1, -1).flatten(0, 1),
        enable_gqa=k_BTGK.shape[2] != H,
    )
    return output.transpose(1, 2).unflatten(0, (B, N)).flatten(1, 2)[:, :T]


def visible(layout: TokenLayout, key_positions_BS: Tensor, window: int | None) -> Tensor:
    """Which key each query sees: bool [B, 1, T, S]. Queries at padding see all, to stay finite."""
    query, key = layout.positions[:, :, None], key_positions_BS[:, None, :]
    seen = (key >= 0) & (key <= query)
    if window is not None:
        seen = seen & (query - key < window)
    if layout.documents is not None:
        seen = seen & (layout.documents[:, None] == layout.documents[None, :])
    return (seen | (query < 0))[:, None]


def append(state: State | None, step: State) -> State:
    """The tokens in sight before a step, and those of the step."""
    if state is None:
        return step
    return {name: torch.cat([state[name], new], 1) for name, new in step.items()}


def trim(seen: State, window: int | None) -> State:
    """The last window - 1 real tokens of each row, which is all that later queries can see."""
    keep = None if window is None else window - 1
    if keep is None or seen["positions"].shape[1] <= keep:
        return dict(seen)
    by_position = seen["positions"].argsort(dim=1, stable=True)
    last_BS = by_position[:, by_position.shape[1] - keep :]

    def last(name: str) -> Tensor:
        index = last_BS[..., None, None].expand(-1, -1, *seen[name].shape[2:])
        return seen[name].gather(1, index)

    return {
        "keys": last("keys"),
        "values": last("values"),
        "positions": seen["positions"].gather(1, last_BS),
    }
