"""Causal softmax attention, over everything or a sliding window: the other mixer of a hybrid."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.layers.norm import RMSNorm
from gsa.layers.options import SoftmaxAttentionOptions
from gsa.layers.rope import rotate
from gsa.layers.slot_attention import MixerOutput, State
from gsa.layers.token_layout import TokenLayout


class SoftmaxAttention(nn.Module):
    """y = W_o softmax(q kᵀ / sqrt(K)) v over earlier tokens, with rotary positions.

    State: keys and values [B, S, G, K] and positions [B, S] of the S tokens still in sight: all of
    them, or with a window the last window_size - 1. Windows and positions count real tokens only.
    """

    def __init__(self, options: SoftmaxAttentionOptions):
        super().__init__()
        self.options = options
        D, H, G, K = options.hidden_size, options.num_heads, options.kv_heads, options.width
        self.q_proj = nn.Linear(D, H * K, bias=options.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=options.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=options.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=False)
        if options.qk_norm:
            self.q_norm = RMSNorm(K, options.norm_eps)
            self.k_norm = RMSNorm(K, options.norm_eps)

    def forward(
        self, x_BTD: Tensor, layout: TokenLayout | None = None, state: State | None = None
    ) -> MixerOutput:
        """Mixes tokens x [B, T, D]; arguments as in `GatedSlotAttention.forward`."""
        options, T = self.options, x_BTD.shape[1]
        if layout is None:
            layout = TokenLayout.of_rows(T, x_BTD.device)
        projected = {"q": self.q_proj(x_BTD), "k": self.k_proj(x_BTD), "v": self.v_proj(x_BTD)}
        q, k, v = self._heads(projected, layout)
        step = {"keys": k, "values": v, "positions": layout.positions.expand(x_BTD.shape[0], -1)}
        seen = _append(state, step)
        whole_rows = state is None and layout.pads is None and layout.documents is None
        window = options.window_size
        plain = whole_rows and (window is None or window >= T)
        mask = None if plain else visible(layout, seen["positions"], window)
        output = self.o_proj(self._attend(q, seen, mask))
        return MixerOutput(output, _trim(seen, window), step)

    def _heads(
        self, projected: dict[str, Tensor], layout: TokenLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, normed and rotated."""
        options = self.options
        q, k, v = (projected[name].unflatten(-1, (-1, options.width)) for name in "qkv")
        if options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if options.rope_theta is not None:
            rotation = (layout.positions, options.rope_theta, options.rope_scaling)
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v

    def _attend(self, q: Tensor, seen: State, mask: Tensor | None) -> Tensor:
        """[B, T, H·K] for queries [B, T, H, K]; causal over T = S tokens without a mask."""
        output_BHTK = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            seen["keys"].transpose(1, 2),
            seen["values"].transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.options.num_heads != self.options.kv_heads,
        )
        return output_BHTK.transpose(1, 2).flatten(2)

    def empty_ring(self, rows: int, capacity: int) -> State:
        """A state of fixed size, without tokens: that of position p has place p % C.

        Keys and values [rows, C, G, K], positions [rows, C], -1 where there is no token. C is the
        window, or `capacity` without one.
        """
        options, like = self.options, self.k_proj.weight
        C = capacity if options.window_size is None else options.window_size
        places = (rows, C, options.kv_heads, options.width)
        positions = torch.full((rows, C), -1, dtype=torch.int64, device=like.device)
        return {"keys": like.new_zeros(places), "values": like.new_zeros(places),
                "positions": positions}  # fmt: skip

    def step_(self, projected: dict[str, Tensor], layout: TokenLayout, ring: State) -> Tensor:
        """One token of each row, written into its ring; for inference.

        Args:
            projected: q, k and v [B, 1, width] as the linear layers made them of the token.
            layout: positions [B, 1], below the capacity; the ring of rows at padding stays as it
                is, and positions are -1 there.
            ring: tensors as from `empty_ring`.

        Returns:
            The mixed tokens [B, 1, D].
        """
        q, k, v = self._heads(projected, layout)
        new = {"keys": k, "values": v, "positions": layout.positions}
        place_B1 = layout.positions.clamp(min=0) % ring["positions"].shape[1]
        for name, value in new.items():
            held = ring[name]
            index = place_B1[(...,) + (None,) * (held.dim() - 2)].expand(-1, 1, *held.shape[2:])
            if layout.pads is not None:
                pads = layout.pads[(...,) + (None,) * (held.dim() - 2)]
                value = torch.where(pads, held.gather(1, index), value)
            held.scatter_(1, index, value)
        mask = visible(layout, ring["positions"], self.options.window_size)
        return self.o_proj(self._attend(q, ring, mask))


def to_ring(state: State, ring: State) -> None:
    """Writes the state of one row, as a forward pass returned it, into an empty ring of one row."""
    real = (state["positions"][0] >= 0).nonzero()[:, 0].to(ring["keys"].device)
    newest = real[-ring["positions"].shape[1] :]
    given = {name: value.to(ring["keys"].device) for name, value in state.items()}
    places = given["positions"][0, newest] % ring["positions"].shape[1]
    for name, held in ring.items():
        held[0].index_copy_(0, places, given[name][0, newest])


def from_ring(options: SoftmaxAttentionOptions, ring: State) -> State:
    """The state of a ring of one row as a forward pass returns it: oldest token first."""
    positions = ring["positions"][0]
    order = positions.argsort()[int((positions < 0).sum()) :]
    return _trim({name: held[:, order] for name, held in ring.items()}, options.window_size)


def replay_window(options: SoftmaxAttentionOptions, state: State | None, step: State) -> State:
    """The state after the tokens of `step`, given the state before them (None at the start)."""
    return _trim(_append(state, step), options.window_size)


def visible(layout: TokenLayout, key_positions_BS: Tensor, window: int | None) -> Tensor:
    """Which key each query sees: bool [B, 1, T, S]. Queries at padding see all, to stay finite."""
    query, key = layout.positions[:, :, None], key_positions_BS[:, None, :]
    seen = (key >= 0) & (key <= query)
    if window is not None:
        seen = seen & (query - key < window)
    if layout.documents is not None:
        seen = seen & (layout.documents[:, None] == layout.documents[None, :])
    return (seen | (query < 0))[:, None]


def _append(state: State | None, step: State) -> State:
    if state is None:
        return step
    return {name: torch.cat([state[name], new], 1) for name, new in step.items()}


def _trim(seen: State, window: int | None) -> State:
    """The last window - 1 real tokens of each row, which is all that later queries can see."""
    keep = None if window is None else window - 1
    if keep is None or seen["positions"].shape[1] <= keep:
        return dict(seen)
    by_position = seen["positions"].argsort(dim=1, stable=True)
    last_BS = by_position[:, by_position.shape[1] - keep :]
    index = last_BS[..., None, None].expand(-1, -1, *seen["keys"].shape[2:])
    return {
        "keys": seen["keys"].gather(1, index),
        "values": seen["values"].gather(1, index),
        "positions": seen["positions"].gather(1, last_BS),
    }
