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
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        q, k, v = (part.unflatten(-1, (-1, options.width)) for part in (q, k, v))
        if options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if options.rope_theta is not None:
            rotation = (layout.positions, options.rope_theta, options.rope_scaling)
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        step = {"keys": k, "values": v, "positions": layout.positions.expand(x_BTD.shape[0], -1)}
        seen = _append(state, step)
        whole_rows = state is None and layout.pads is None and layout.documents is None
        window = options.window_size
        plain = whole_rows and (window is None or window >= T)
        output_BHTK = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            seen["keys"].transpose(1, 2),
            seen["values"].transpose(1, 2),
            attn_mask=None if plain else visible(layout, seen["positions"], window),
            is_causal=plain,
            enable_gqa=options.num_heads != options.kv_heads,
        )
        output = self.o_proj(output_BHTK.transpose(1, 2).flatten(2))
        return MixerOutput(output, _trim(seen, window), step)


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
