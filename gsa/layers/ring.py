"""What `gsa.layers.in_sight` keeps, at a fixed size: position p has place p % C, older ones go.

A ring: keys [P, C, G, K], values [P, C, G, V], positions [P, C], -1 where there is no token.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gsa.layers.in_sight import NAMES, trim, visible
from gsa.layers.mixer import State
from gsa.layers.token_layout import TokenLayout


def empty_ring(like: Tensor, rows: int, places: int, heads: int, key: int, value: int) -> State:
    """A ring of `rows` without tokens, of the dtype and on the device of `like`."""
    return {
        "keys": like.new_zeros(rows, places, heads, key),
        "values": like.new_zeros(rows, places, heads, value),
        "positions": like.new_full((rows, places), -1, dtype=torch.int64),
    }


def attend_ring(
    q_P1HK: Tensor,
    k_P1GK: Tensor,
    v_P1GV: Tensor,
    layout: TokenLayout,
    ring: State,
    window: int | None,
) -> Tensor:
    """`attend` for one token of each row, which is written into the ring: [P, 1, H, V].

    Args:
        layout: positions [P, 1]; the ring of rows at padding stays as it is.
    """
    place_P1 = layout.positions.clamp(min=0) % ring["positions"].shape[1]
    for name, new in zip(NAMES, (k_P1GK, v_P1GV, layout.positions), strict=True):
        held, more = ring[name], (None,) * (ring[name].dim() - 2)
        index = place_P1[(..., *more)].expand(-1, 1, *held.shape[2:])
        if layout.pads is not None:
            new = torch.where(layout.pads[(..., *more)], held.gather(1, index), new)
        held.scatter_(1, index, new)
    output_PH1V = F.scaled_dot_product_attention(
        q_P1HK.transpose(1, 2),
        ring["keys"].transpose(1, 2),
        ring["values"].transpose(1, 2),
        attn_mask=visible(layout, ring["positions"], window),
        enable_gqa=k_P1GK.shape[2] != q_P1HK.shape[2],
    )
    return output_PH1V.transpose(1, 2)


def to_ring(state: State, ring: State) -> None:
    """Writes what one row keeps, as `attend` returned it, into an empty ring of one row."""
    given = {name: state[name].to(ring["keys"].device) for name in NAMES}
    newest = (given["positions"][0] >= 0).nonzero()[:, 0][-ring["positions"].shape[1] :]
    places = given["positions"][0, newest] % ring["positions"].shape[1]
    for name in NAMES:
        ring[name][0].index_copy_(0, places, given[name][0, newest])


def from_ring(ring: State, window: int | None) -> State:
    """What the one row of a ring keeps, as `attend` returns it, oldest token first."""
    positions = ring["positions"][0]
    order = positions.argsort()[int((positions < 0).sum()) :]
    return trim({name: ring[name][:, order] for name in NAMES}, window)
