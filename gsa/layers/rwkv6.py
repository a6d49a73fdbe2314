"""RWKV6's time mixing ("Eagle and Finch", arXiv 2404.05892) as a layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.layers.linear_attention import replay_linear
from gsa.layers.mixer import MixerOutput, State
from gsa.layers.norm import HeadNorm
from gsa.layers.options import RWKV6Options
from gsa.layers.short_convolution import next_tail, previous_tokens
from gsa.layers.token_layout import TokenLayout
from gsa.ops import gated_linear_attention, gated_linear_step
from gsa.ops.types import Impl, compute_dtype


class RWKV6(nn.Module):
    """Linear attention whose inputs look one token back, with a bonus for the token itself.

    With x' the token before x, and in each of r, k, v, g and d a mixture of the two:

        lerp(μ)  = x + (x' - x) ⊙ μ
        x_n      = lerp(μ_n + tanh(lerp(μ_x) A_n) B_n)                  n = r, k, v, g, d
        r, k, v, g = W_r x_r, W_k x_k, W_v x_v, W_g x_g
        log_decay  = -exp(λ + W_2 tanh(W_1 x_d))                        for each key
        memory_t = Diag(exp(log_decay_t)) · memory_{t-1} + k_t ⊗ v_t
        o_t      = (memory_{t-1} + (u ⊙ k_t) ⊗ v_t)ᵀ r_t
        y        = W_o( LayerNorm(o of each head) ⊙ swish(g) )

    State: memory [B, H, K, V] in fp32, and tail [B, 1, D], the last input.

    Attributes:
        impl: which implementation of the operator to use; see `gsa.ops.gated_linear_attention`.
    """

    impl: Impl = "auto"

    def __init__(self, options: RWKV6Options):
        super().__init__()
        self.options = options
        D, H, R = options.hidden_size, options.num_heads, options.shift_low_rank
        K, V = options.key_width, options.value_width
        self.shift_in = nn.Linear(D, 5 * R, bias=False)
        self.shift_out = nn.Parameter(torch.empty(5, R, D).normal_(std=R**-0.5))
        self.receptance = nn.Linear(D, H * K, bias=False)
        self.key = nn.Linear(D, H * K, bias=False)
        self.value = nn.Linear(D, H * V, bias=False)
        self.gate = nn.Linear(D, H * V, bias=False)
        self.decay_in = nn.Linear(D, options.gate_low_rank, bias=False)
        self.decay_out = nn.Linear(options.gate_low_rank, H * K, bias=False)
        self.g_norm = HeadNorm(H, V, options.output_norm_eps, affine=options.elementwise_affine)
        self.o_proj = nn.Linear(H * V, D, bias=False)
        start = self.initial()
        self.mixtures = nn.Parameter(start["mixtures"])
        self.decay_bias = nn.Parameter(start["decay_bias"])
        self.bonus = nn.Parameter(start["bonus"])

    def initial(self) -> dict[str, Tensor]:
        """What is not drawn at random: mixtures μ [6, D] (of x, r, k, v, g, d), λ [H·K], u [H, K].

        About as the authors start a layer half-way up, all layers alike: from channels that look
        back to those that see the token itself, decays from exp(-exp(-6)) to exp(-exp(-1)).
        """
        options, device = self.options, self.o_proj.weight.device
        D, keys = options.hidden_size, options.num_heads * options.key_width
        channel = torch.arange(D, device=device) / D
        key = torch.linspace(0, 1, keys, device=device)
        powers = (0.5, 0.25, 0.5, 0.5, 0.25, 0.5)
        return {
            "mixtures": torch.stack([1 - channel**power for power in powers]),
            "decay_bias": 5 * key**1.35 - 6,
            "bonus": (0.5 * (1 - key)).view(options.num_heads, -1),
        }

    def forward(
        self, x_BTD: Tensor, layout: TokenLayout | None = None, state: State | None = None
    ) -> MixerOutput:
        """Mixes tokens x [B, T, D]; arguments as in `GatedSlotAttention.forward`."""
        if layout is None:
            layout = TokenLayout.of_rows(x_BTD.shape[1], x_BTD.device)
        memory, tail = (None, None) if state is None else (state["memory"], state["tail"])
        (r, k, v, log_decay, gate), tail = self._project(x_BTD, layout, tail)
        if r.shape[1] == 1 and memory is not None and not torch.is_grad_enabled():
            output, memory = self._step(r, k, v, log_decay, memory, inplace=False)
        else:
            output, memory = self._attend(r, k, v, log_decay, layout, memory)
        step = {"k": k, "v": v, "log_decay": log_decay, "input": x_BTD}
        if layout.pads is not None:
            step["pads"] = layout.pads
        return MixerOutput(self._combine(output, gate), {"memory": memory, "tail": tail}, step)

    def empty_state(self, rows: int, capacity: int) -> State:
        """The state of that many rows before their first token, for `step_`.

        capacity: not used, such a layer has no limit.
        """
        options, like = self.options, self.o_proj.weight
        shape = (rows, options.num_heads, options.key_width, options.value_width)
        memory = like.new_zeros(shape, dtype=compute_dtype(like.dtype))
        return {"memory": memory, "tail": like.new_zeros(rows, 1, options.hidden_size)}

    def step_(
        self, x_B1D: Tensor, projected: dict[str, Tensor], layout: TokenLayout, state: State
    ) -> Tensor:
        """Mixes one token of each row [B, 1, D], writing into the state; for inference.

        Arguments as in `GatedSlotAttention.step_`; nothing is projected beforehand.
        """
        (r, k, v, log_decay, gate), tail = self._project(x_B1D, layout, state["tail"])
        output, _ = self._step(r, k, v, log_decay, state["memory"], inplace=True)
        state["tail"].copy_(tail)
        return self._combine(output, gate)

    def _project(
        self, x_BTD: Tensor, layout: TokenLayout, tail: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """r, k, v by head, log_decay [B, T, H, K] and g [B, T, H·V]; and the tail for later."""
        options, pads = self.options, layout.pads
        before, tail = previous_tokens(x_BTD, layout, tail)
        back = before - x_BTD
        own, *static = self.mixtures.to(x_BTD.dtype)
        low = torch.tanh(self.shift_in(x_BTD + back * own)).unflatten(-1, (5, -1))
        shifts = torch.einsum("btnr,nrd->nbtd", low, self.shift_out)
        x_r, x_k, x_v, x_g, x_d = (
            x_BTD + back * (mixture + shift) for mixture, shift in zip(static, shifts, strict=True)
        )
        r = self.receptance(x_r).unflatten(-1, (options.num_heads, -1))
        k = self.key(x_k).unflatten(-1, (options.num_heads, -1))
        v = self.value(x_v).unflatten(-1, (options.num_heads, -1))
        raised = self.decay_out(torch.tanh(self.decay_in(x_d)))
        dtype = compute_dtype(raised.dtype)
        log_decay = -torch.exp(self.decay_bias.to(dtype) + raised.to(dtype)).view(k.shape)
        if pads is not None:
            k = k.masked_fill(pads[..., None, None], 0.0)
            log_decay = log_decay.masked_fill(pads[..., None, None], 0.0)
        return (r, k, v, log_decay, self.gate(x_g)), tail

    def _attend(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        layout: TokenLayout,
        memory: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """o [B, T, H, V] and the memory after; r_t reads what token t-1 left, so it goes there."""
        u, dtype = self.bonus, compute_dtype(k.dtype)
        own = (r.to(dtype) * u.to(dtype) * k.to(dtype)).sum(-1, keepdim=True) * v
        if memory is None:
            moved = F.pad(r, (0, 0, 0, 0, -1, 1))
            read, after = gated_linear_attention(
                moved, k, v, log_decay, cu_seqlens=layout.cu_seqlens, impl=self.impl
            )
            read = F.pad(read, (0, 0, 0, 0, 1, -1))
            if layout.documents is not None:
                read = read.masked_fill((layout.positions == 0)[..., None, None], 0.0)
        else:  # in front a token that writes and forgets nothing, for the first to read
            moved = F.pad(r, (0, 0, 0, 0, 0, 1))
            k, v, log_decay = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (k, v, log_decay))
            read, after = gated_linear_attention(
                moved, k, v, log_decay, initial_memory=memory, impl=self.impl
            )
            read = read[:, :-1]
        return (read + own).to(read.dtype), after

    def _step(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        memory: Tensor,
        *,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        """The same for one token: read as if it had been written with the bonus, then write it."""
        keep = torch.zeros_like(log_decay)
        output = gated_linear_step(r, self.bonus.to(k.dtype) * k, v, keep, memory).output
        return output, gated_linear_step(r, k, v, log_decay, memory, inplace=inplace).memory

    def _combine(self, output_BTHV: Tensor, gate: Tensor) -> Tensor:
        return self.o_proj(self.g_norm(output_BTHV).flatten(2) * F.silu(gate))


def replay_rwkv6(options: RWKV6Options, state: State | None, step: State) -> State:
    """The state after the tokens of `step`, given the state before them (None at the start)."""
    tail = None if state is None else state["tail"]
    after = replay_linear(options, state, step)
    return after | {"tail": next_tail(step["input"], step.get("pads"), tail, 2)}
