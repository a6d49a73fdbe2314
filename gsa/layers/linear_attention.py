"""Gated linear attention as a layer: GLA, RetNet, SUPRA and HGRN2 differ in options only."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.layers.feature_map import FeatureMap
from gsa.layers.gate import bounded_gate, forget_gate
from gsa.layers.mixer import MixerOutput, State
from gsa.layers.norm import RMSNorm
from gsa.layers.options import LinearAttentionOptions
from gsa.layers.rope import rotate
from gsa.layers.token_layout import TokenLayout
from gsa.ops import gated_linear_attention, gated_linear_step
from gsa.ops.types import Impl, compute_dtype


def head_decays(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """log(1 - 2^(-5-g)) for head g = 0, 1, …: [G], RetNet's (arXiv 2307.08621)."""
    head = torch.arange(heads, device=device, dtype=dtype)
    return torch.log1p(-(2.0 ** (-5.0 - head)))


class LinearAttention(nn.Module):
    """Token mixing through a memory [K, V] per head that decays; see docs/rivals.md.

        q, k, v = φ(W_q x), φ(W_k x), W_v x                    (q and k rotated, if so asked)
        o       = linear_attention(q, k, v, decay)
        y       = W_o( RMSNorm(o of each head) ⊙ swish(W_g x) )    (the last factor if asked for)

    decay "data_dependent" is GLA's (arXiv 2312.06635): sigmoid(W_2 W_1 x + b)^(1/tau) for each key;
    "fixed" is RetNet's (arXiv 2307.08621): `head_decays`. Decays belong to key/value heads. "tied"
    is HGRN2's (arXiv 2404.07904), which has no keys of its own and norms all heads as one:

        f = γ + (1 - γ) sigmoid(W_f x)        k = 1 - f        y = W_o RMSNorm(o)

    State: memory [B, G, K, V] in fp32. Its size does not depend on T.

    Attributes:
        impl: which implementation of the operator to use; see `gsa.ops.gated_linear_attention`.
    """

    impl: Impl = "auto"

    def __init__(self, options: LinearAttentionOptions):
        super().__init__()
        self.options = options
        D, H, G = options.hidden_size, options.num_heads, options.kv_heads
        K, V = options.key_width, options.value_width
        self.q_proj = nn.Linear(D, H * K, bias=options.qkv_bias)
        self.tied = options.decay == "tied"
        if self.tied:
            self.f_proj = nn.Linear(D, G * K, bias=False)
        else:
            self.k_proj = nn.Linear(D, G * K, bias=options.qkv_bias)
        self.v_proj = nn.Linear(D, G * V, bias=options.qkv_bias)
        self.o_proj = nn.Linear(H * V, D, bias=False)
        if options.decay == "data_dependent":
            self.f_proj = nn.Linear(D, options.gate_low_rank, bias=False)
            self.f_out = nn.Linear(options.gate_low_rank, G * K)
        if options.qk_norm:
            self.q_norm = RMSNorm(K, options.norm_eps)
            self.k_norm = RMSNorm(K, options.norm_eps)
        self.feature_map = FeatureMap(options.feature_map, K)
        normed = H * V if self.tied else V
        self.g_norm = RMSNorm(normed, options.output_norm_eps, affine=options.elementwise_affine)
        if options.output_gate:
            self.g_proj = nn.Linear(D, H * V, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        layout: TokenLayout | None = None,
        state: State | None = None,
        log_bound: Tensor | None = None,
    ) -> MixerOutput:
        """Mixes tokens x [B, T, D]; arguments as in `GatedSlotAttention.forward`, and

        log_bound: log γ [G·K] of a tied decay, from `LowerBounds`; None for γ = 0.
        """
        if layout is None:
            layout = TokenLayout.of_rows(x_BTD.shape[1], x_BTD.device)
        layers = {name: getattr(self, f"{name}_proj", None) for name in "qkvfg"}
        projected = {name: layer(x_BTD) for name, layer in layers.items() if layer is not None}
        log_decay = self._decay(projected, layout, log_bound)
        q, k, v = self._heads(projected, layout, log_decay)
        memory = None if state is None else state["memory"]
        scale, decays = self.options.score_scale, log_decay.expand(k.shape)
        if q.shape[1] == 1 and memory is not None and not torch.is_grad_enabled():
            output, memory = gated_linear_step(q, k, v, decays, memory, scale=scale)
        else:
            output, memory = gated_linear_attention(
                q,
                k,
                v,
                decays,
                scale=scale,
                initial_memory=memory,
                cu_seqlens=layout.cu_seqlens,
                impl=self.impl,
            )
        step = {"k": k, "v": v, "log_decay": log_decay}
        return MixerOutput(self._combine(output, projected.get("g")), {"memory": memory}, step)

    def empty_state(self, rows: int, capacity: int) -> State:
        """The state of that many rows before their first token, for `step_`.

        capacity: not used, such a layer has no limit.
        """
        options, like = self.options, self.q_proj.weight
        shape = (rows, options.kv_heads, options.key_width, options.value_width)
        return {"memory": like.new_zeros(shape, dtype=compute_dtype(like.dtype))}

    def step_(
        self,
        x_B1D: Tensor,
        projected: dict[str, Tensor],
        layout: TokenLayout,
        state: State,
        log_bound: Tensor | None = None,
    ) -> Tensor:
        """Mixes one token of each row [B, 1, D], writing into the state; for inference.

        Arguments as in `GatedSlotAttention.step_` and `forward`; f is W_1 x, or W_f x where tied.
        """
        log_decay = self._decay(projected, layout, log_bound)
        q, k, v = self._heads(projected, layout, log_decay)
        decays = log_decay.expand(k.shape)
        output = gated_linear_step(
            q, k, v, decays, state["memory"], scale=self.options.score_scale, inplace=True
        ).output
        return self._combine(output, projected.get("g"))

    def _heads(
        self, projected: dict[str, Tensor], layout: TokenLayout, log_decay: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, as the memory takes them; keys of padding are 0."""
        options = self.options
        q = projected["q"].unflatten(-1, (options.num_heads, options.key_width))
        v = projected["v"].unflatten(-1, (options.kv_heads, options.value_width))
        v = F.silu(v) if options.value_activation == "swish" else v
        if self.tied:
            return self.feature_map(q), -torch.expm1(log_decay).to(v.dtype), v
        k = projected["k"].unflatten(-1, (options.kv_heads, options.key_width))
        if options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.feature_map(q), self.feature_map(k)
        if options.rope_theta is not None:
            rotation = (layout.positions, options.rope_theta, options.rope_scaling)
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if layout.pads is not None:
            k = k.masked_fill(layout.pads[..., None, None], 0.0)
        return q, k, v

    def _decay(
        self, projected: dict[str, Tensor], layout: TokenLayout, log_bound: Tensor | None
    ) -> Tensor:
        """log_decay [B, T, G, K], or [B, T, G, 1] where keys share it; 0 at padding."""
        options, pads = self.options, layout.pads
        if self.tied:
            logits = projected["f"].unflatten(-1, (options.kv_heads, options.key_width))
            return bounded_gate(logits, log_bound, pads)
        if options.decay == "data_dependent":
            logits = self.f_out(projected["f"]).unflatten(-1, (options.kv_heads, -1))
            return forget_gate(logits, options.gate_logit_normalizer, pads)
        k = projected["k"]
        decay_G = head_decays(options.kv_heads, k.device, compute_dtype(k.dtype))
        decay_BTG1 = decay_G[:, None].expand(*k.shape[:2], -1, -1)
        return decay_BTG1 if pads is None else decay_BTG1.masked_fill(pads[..., None, None], 0.0)

    def _combine(self, output_BTHV: Tensor, gate: Tensor | None) -> Tensor:
        output = self.g_norm(output_BTHV.flatten(2) if self.tied else output_BTHV)
        output = output if self.tied else output.flatten(2)
        return self.o_proj(output if gate is None else output * F.silu(gate))


def replay_linear(options: LinearAttentionOptions, state: State | None, step: State) -> State:
    """The state after the tokens of `step`, given the state before them (None at the start)."""
    k = step["k"]
    memory = None if state is None else state["memory"]
    return {
        "memory": gated_linear_attention(
            torch.zeros_like(k),
            k,
            step["v"],
            step["log_decay"].expand(k.shape),
            initial_memory=memory,
        ).memory
    }
