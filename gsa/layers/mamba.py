"""Mamba's block ("Linear-Time Sequence Modeling with Selective State Spaces") as a layer."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.layers.mixer import MixerOutput, State
from gsa.layers.options import MambaOptions
from gsa.layers.short_convolution import ShortConvolution, next_tail
from gsa.layers.token_layout import TokenLayout
from gsa.ops import selective_scan, selective_step
from gsa.ops.types import Impl, compute_dtype

STEPS = (1e-3, 1e-1)
"""Between which step sizes Δ of a new layer lie, evenly by their logarithm."""


class Mamba(nn.Module):
    """A gated selective state space (arXiv 2312.00752, §3.4), mixer and MLP in one.

        u, z     = W_v x, W_g x                                         E channels each
        u        = swish(convolution(u))
        r, B, C  = W_s u                                                rank R, K and K numbers
        Δ        = softplus(W_Δ r + b)                                  for each channel
        memory_t = exp(Δ_t A) ⊙ memory_{t-1} + (Δ_t ⊙ u_t) ⊗ B_t        A = -exp(log_rate)
        y        = W_o( (memory_t C_t + skip ⊙ u_t) ⊙ swish(z) )

    State: memory [B, E, K] in fp32, and tail [B, conv_size-1, E], what is to be convolved.

    Attributes:
        impl: which implementation of the scan to use; see `gsa.ops.selective_scan`.
    """

    impl: Impl = "auto"

    def __init__(self, options: MambaOptions):
        super().__init__()
        self.options = options
        D, E, K, R = options.hidden_size, options.channels, options.key_width, options.gate_low_rank
        self.v_proj = nn.Linear(D, E, bias=False)
        self.g_proj = nn.Linear(D, E, bias=False)
        self.v_conv = ShortConvolution(E, options.conv_size, bias=True)
        self.select_proj = nn.Linear(E, R + 2 * K, bias=False)
        self.step_proj = nn.Linear(R, E)
        self.o_proj = nn.Linear(E, D, bias=False)
        self.log_rate = nn.Parameter(torch.empty(E, K))
        self.skip = nn.Parameter(torch.empty(E))
        with torch.no_grad():
            for name, value in self.initial().items():
                self.get_parameter(name).copy_(value)

    def initial(self) -> dict[str, Tensor]:
        """The paper's first values, by name of the parameter (§3.6 and its authors' code).

        A = -(1, …, K) in each channel; Δ without a token's share log-uniform in `STEPS`, b being
        the inverse of softplus; W_Δ uniform with the spread of its inputs; skip 1.
        """
        options, like = self.options, self.log_rate
        E, K, R = options.channels, options.key_width, options.gate_low_rank
        low, high = map(math.log, STEPS)
        step = torch.exp(low + (high - low) * torch.rand(E, device=like.device))
        weight = torch.rand(E, R, device=like.device)
        return {
            "log_rate": torch.arange(1, K + 1, device=like.device).log().expand(E, K),
            "skip": torch.ones(E, device=like.device),
            "step_proj.weight": (2 * weight - 1) * R**-0.5,
            "step_proj.bias": step + torch.log(-torch.expm1(-step)),
        }

    def forward(
        self, x_BTD: Tensor, layout: TokenLayout | None = None, state: State | None = None
    ) -> MixerOutput:
        """Mixes tokens x [B, T, D]; arguments as in `GatedSlotAttention.forward`."""
        if layout is None:
            layout = TokenLayout.of_rows(x_BTD.shape[1], x_BTD.device)
        projected = {"v": self.v_proj(x_BTD), "g": self.g_proj(x_BTD)}
        memory, tail = (None, None) if state is None else (state["memory"], state["tail"])
        u, delta, rate, write, read, tail = self._select(projected["v"], layout, tail)
        if u.shape[1] == 1 and memory is not None and not torch.is_grad_enabled():
            output, memory = selective_step(u, delta, rate, write, read, memory)
        else:
            output, memory = selective_scan(
                u, delta, rate, write, read, initial_memory=memory, cu_seqlens=layout.cu_seqlens,
                impl=self.impl,
            )  # fmt: skip
        rates = rate.expand(*u.shape[:2], -1, -1)  # not a number more: a step has tokens first
        step = {"v": projected["v"], "u": u, "delta": delta, "write": write, "rate": rates}
        if layout.pads is not None:
            step["pads"] = layout.pads
        output = self._combine(output, u, projected["g"])
        return MixerOutput(output, {"memory": memory, "tail": tail}, step)

    def empty_state(self, rows: int, capacity: int) -> State:
        """The state of that many rows before their first token, for `step_`.

        capacity: not used, such a layer has no limit.
        """
        options, like = self.options, self.o_proj.weight
        shape = (rows, options.channels, options.key_width)
        tail = like.new_zeros(rows, options.conv_size - 1, options.channels)
        return {"memory": like.new_zeros(shape, dtype=compute_dtype(like.dtype)), "tail": tail}

    def step_(
        self, x_B1D: Tensor, projected: dict[str, Tensor], layout: TokenLayout, state: State
    ) -> Tensor:
        """Mixes one token of each row [B, 1, D], writing into the state; for inference.

        Arguments as in `GatedSlotAttention.step_`.
        """
        u, delta, rate, write, read, tail = self._select(projected["v"], layout, state["tail"])
        output, _ = selective_step(u, delta, rate, write, read, state["memory"], inplace=True)
        state["tail"].copy_(tail)
        return self._combine(output, u, projected["g"])

    def _select(
        self, v_BTE: Tensor, layout: TokenLayout, tail: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u, Δ (0 at padding, so that it changes nothing), A, B and C; and the tail for later."""
        options = self.options
        K, R = options.key_width, options.gate_low_rank
        u, after = self.v_conv(v_BTE, layout, tail)
        low, write, read = self.select_proj(u).split([R, K, K], -1)
        dtype = compute_dtype(u.dtype)
        raised = F.linear(low, self.step_proj.weight)
        delta = F.softplus(raised.to(dtype) + self.step_proj.bias.to(dtype))
        if layout.pads is not None:
            delta = delta.masked_fill(layout.pads[..., None], 0.0)
        return u, delta, -torch.exp(self.log_rate.to(dtype)), write, read, after

    def _combine(self, output_BTE: Tensor, u_BTE: Tensor, gate: Tensor) -> Tensor:
        output = output_BTE + self.skip.to(u_BTE.dtype) * u_BTE
        return self.o_proj(output * F.silu(gate))


def replay_mamba(options: MambaOptions, state: State | None, step: State) -> State:
    """The state after the tokens of `step`, given the state before them (None at the start)."""
    memory, tail = (None, None) if state is None else (state["memory"], state["tail"])
    u, delta, rate, write = step["u"], step["delta"], step["rate"][0, 0], step["write"]
    return {
        "memory": selective_scan(u, delta, rate, write, write, initial_memory=memory).memory,
        "tail": next_tail(step["v"], step.get("pads"), tail, options.conv_size),
    }
