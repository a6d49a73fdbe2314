"""Causal softmax attention, over everything or a sliding window: the other mixer of a hybrid."""

from torch import Tensor, nn

from gsa.layers.in_sight import append, attend, trim
from gsa.layers.mixer import MixerOutput, State
from gsa.layers.norm import RMSNorm
from gsa.layers.options import SoftmaxAttentionOptions
from gsa.layers.ring import attend_ring, empty_ring
from gsa.layers.rope import rotate
from gsa.layers.token_layout import TokenLayout


class SoftmaxAttention(nn.Module):
    """y = W_o softmax(q kᵀ / sqrt(K)) v over earlier tokens, with rotary positions.

    State: keys, values and positions of the tokens still in sight, see `gsa.layers.in_sight`.
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
        output, after, step = attend(q, k, v, layout, state, options.window_size)
        return MixerOutput(self.o_proj(output.flatten(2)), after, step)

    def empty_state(self, rows: int, capacity: int) -> State:
        """The ring of that many rows before their first token, for `step_`.

        capacity: tokens of a row at most, where there is no window.
        """
        options, like = self.options, self.k_proj.weight
        places = capacity if options.window_size is None else options.window_size
        return empty_ring(like, rows, places, options.kv_heads, options.width, options.width)

    def step_(
        self, x_B1D: Tensor, projected: dict[str, Tensor], layout: TokenLayout, state: State
    ) -> Tensor:
        """Mixes one token of each row [B, 1, D], writing into the ring; for inference.

        Arguments as in `GatedSlotAttention.step_`, positions below the ring's capacity.
        """
        q, k, v = self._heads(projected, layout)
        output = attend_ring(q, k, v, layout, state, self.options.window_size)
        return self.o_proj(output.flatten(2))

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


def replay_window(options: SoftmaxAttentionOptions, state: State | None, step: State) -> State:
    """The state after the tokens of `step`, given the state before them (None at the start)."""
    return trim(append(state, step), options.window_size)
