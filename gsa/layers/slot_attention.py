"""The gated slot attention layer: projections, gate, the operator, output norm."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.layers.feature_map import FeatureMap
from gsa.layers.gate import NO_TOKENS, StaticGate, abc_gate, forget_gate
from gsa.layers.in_sight import NAMES, append, attend, trim
from gsa.layers.mixer import MixerOutput, State
from gsa.layers.norm import RMSNorm
from gsa.layers.options import SlotAttentionOptions
from gsa.layers.projections import project, project_normed
from gsa.layers.ring import attend_ring, empty_ring
from gsa.layers.rope import rotate
from gsa.layers.short_convolution import ShortConvolution, next_tail
from gsa.layers.token_layout import TokenLayout
from gsa.ops import gated_slot_attention, gated_slot_step
from gsa.ops.types import Impl, compute_dtype


class GatedSlotAttention(nn.Module):
    """Token mixing through a memory of M slots per head ("Gated Slot Attention", §3.3, Eqs. 6-9).

        q, k, v = swish(W_q x), swish(W_k x), swish(W_v x)      f = sigmoid(W_f x)^(1/tau)
        y       = W_o( RMSNorm( swish( concat over heads of slot_attention(q, k, v, f) ) ) )

    with one RMSNorm over all heads together. What may be varied is in `SlotAttentionOptions`.
    With a window branch, softmax attention on q, k, v before swish, and a share s = sigmoid(W_s x)
    for each head:

        y       = W_o( (1 − s) · RMSNorm(…) + s · window_attention )

    State: memory [B, G, M, K+V] in fp32; with an abc gate also normalizer [B, G, M]; with short
    convolutions also {q,k,v}_tail [B, conv_size-1, width]; with a window branch also what
    `gsa.layers.in_sight` keeps. Its size does not depend on T.

    Attributes:
        impl: which implementation of the operator to use; see `gsa.ops.gated_slot_attention`.
        window_share: s, where a number is to stand in for the learned one: 0 switches the window
            branch off, 1 the slots.
    """

    impl: Impl = "auto"
    window_share: float | None = None

    def __init__(self, options: SlotAttentionOptions):
        super().__init__()
        self.options = options
        D, H, G = options.hidden_size, options.num_heads, options.kv_heads
        K, V, M = options.key_width, options.value_width, options.slots
        self.q_proj = nn.Linear(D, H * K, bias=options.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=options.qkv_bias)
        self.v_proj = nn.Linear(D, G * V, bias=options.qkv_bias)
        self.o_proj = nn.Linear(H * V, D, bias=False)
        if options.gate == "data_independent":
            self.f_proj = StaticGate(G, M)
        else:
            self.f_proj = nn.Linear(D, G * M, bias=options.gate_bias)
        if options.use_short_conv:
            self.q_conv1d = ShortConvolution(H * K, options.conv_size)
            self.k_conv1d = ShortConvolution(G * K, options.conv_size)
            self.v_conv1d = ShortConvolution(G * V, options.conv_size)
        if options.qk_norm:
            self.q_norm = RMSNorm(K, options.norm_eps)
            self.k_norm = RMSNorm(K, options.norm_eps)
        self.feature_map = FeatureMap(options.feature_map, K)
        if options.output_norm:
            self.g_norm = RMSNorm(H * V, options.output_norm_eps, affine=options.elementwise_affine)
        if options.output_gate:
            self.g_proj = nn.Linear(D, H * V, bias=False)
        if options.window_branch is not None:
            self.share_proj = nn.Linear(D, H)

    def forward(
        self, x_BTD: Tensor, layout: TokenLayout | None = None, state: State | None = None
    ) -> MixerOutput:
        """Mixes tokens x [B, T, D].

        Args:
            layout: positions, padding, documents; None means plain rows without padding.
            state: as returned for the tokens before; None at the start. Not modified.
        """
        if layout is None:
            layout = TokenLayout.of_rows(x_BTD.shape[1], x_BTD.device)
        state = {} if state is None else state
        projected = self._project(x_BTD)
        q, k, v, step, after = self._heads(projected, layout, state)
        window = None
        if self.options.window_branch is not None:
            window, seen, seen_step = self._look(q, k, v, layout, state)
            step, after = step | seen_step, after | seen
        q, k, v = self._map(q, k, v, layout)
        log_forget, write, normalizer = self._gate(projected["f"], layout, state.get("normalizer"))
        step |= {"k": k, "v": v, "log_forget": log_forget}
        if write is not None and normalizer is not None:
            step |= {"write": write, "normalizer": normalizer}
            after["normalizer"] = normalizer[:, -1].clone()
        output, after["memory"] = self._attend(q, k, v, log_forget, write, layout, state)
        if window is None:
            return MixerOutput(self._combine(output, projected.get("g")), after, step)
        mixed = self._mix(x_BTD, self._finish(output, projected.get("g")), window)
        return MixerOutput(self.o_proj(mixed), after, step)

    def empty_state(self, rows: int, capacity: int) -> State:
        """The state of that many rows before their first token, for `step_`; a window is a ring.

        capacity: not used, a layer of slots has no limit.
        """
        options, like = self.options, self.q_proj.weight
        dtype, G, M = compute_dtype(like.dtype), options.kv_heads, options.slots
        K, V = options.key_width, options.value_width
        state = {"memory": like.new_zeros(rows, G, M, K + V, dtype=dtype)}
        if options.gate in ("abc", "abc_printed"):
            state["normalizer"] = like.new_full((rows, G, M), NO_TOKENS, dtype=dtype)
        if options.use_short_conv:
            for name, layer in (("q", self.q_proj), ("k", self.k_proj), ("v", self.v_proj)):
                tail = (rows, options.conv_size - 1, layer.out_features)
                state[f"{name}_tail"] = like.new_zeros(tail)
        if options.window_branch is not None:
            state |= empty_ring(like, rows, options.window_branch, G, K, V)
        return state

    def step_(
        self, x_B1D: Tensor, projected: dict[str, Tensor], layout: TokenLayout, state: State
    ) -> Tensor:
        """Mixes one token of each row [B, 1, D], writing into the state; for inference.

        Args:
            projected: q, k, v, f and, with an output gate, g: [B, 1, width], as the linear layers
                made them of x, before any activation.
            layout: positions [B, 1]; the state of rows marked as padding stays as it is.
            state: tensors as from `empty_state`.
        """
        options = self.options
        if options.swish_follows:
            projected = projected | {name: F.silu(projected[name]) for name in "qkv"}
        q, k, v, _, after = self._heads(projected, layout, state)
        window = None
        if options.window_branch is not None:
            turned = self._turn(q, k, layout)
            window = attend_ring(*turned, v, layout, state, options.window_branch)
        q, k, v = self._map(q, k, v, layout)
        log_forget, write, normalizer = self._gate(projected["f"], layout, state.get("normalizer"))
        if normalizer is not None:
            after["normalizer"] = normalizer[:, 0]
        output = gated_slot_step(
            q,
            k,
            v,
            log_forget,
            state["memory"],
            write=write,
            scale=options.score_scale,
            slot_activation=options.slot_activation,
            inplace=True,
            impl=self.impl,
        ).output
        for name, value in after.items():
            state[name].copy_(value)
        if window is None:
            return self._combine(output, projected.get("g"))
        return self.o_proj(self._mix(x_B1D, self._finish(output, projected.get("g")), window))

    def _project(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """All that linear layers make of x: q, k, v, gate logits f, and g of the output gate."""
        layers = {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj, "f": self.f_proj}
        layers |= {"g": self.g_proj} if self.options.output_gate else {}
        if self.options.swish_follows:
            return project(x_BTD, layers, "qkv")
        return {name: layer(x_BTD) for name, layer in layers.items()}

    def _heads(
        self, projected: dict[str, Tensor], layout: TokenLayout, state: State
    ) -> tuple[Tensor, Tensor, Tensor, State, State]:
        """Queries, keys, values by head; and, with short convolutions, their inputs and tails."""
        options, step, after = self.options, {}, {}
        projected = {name: projected[name] for name in "qkv"}
        if options.use_short_conv:
            step = {f"{name}_input": value for name, value in projected.items()}
            if layout.pads is not None:
                step["pads"] = layout.pads
            for name, conv in zip(
                "qkv", (self.q_conv1d, self.k_conv1d, self.v_conv1d), strict=True
            ):
                tail = state.get(f"{name}_tail")
                projected[name], after[f"{name}_tail"] = conv(projected[name], layout, tail)
        q = projected["q"].unflatten(-1, (options.num_heads, options.key_width))
        k = projected["k"].unflatten(-1, (options.kv_heads, options.key_width))
        v = projected["v"].unflatten(-1, (options.kv_heads, options.value_width))
        if options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, step, after

    def _map(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the memory takes them."""
        options = self.options
        if not options.swish_follows:
            q, k = self.feature_map(q), self.feature_map(k)
            v = F.silu(v) if options.value_activation == "swish" else v
        if options.rope_theta is not None:
            rotation = (layout.positions, options.rope_theta, options.rope_scaling)
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v

    def _look(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, state: State
    ) -> tuple[Tensor, State, State]:
        """Softmax attention over the window: (output, its part of the state after, its step)."""
        turned = self._turn(q, k, layout)
        return attend(*turned, v, layout, _in_sight(state), self.options.window_branch)

    def _turn(self, q: Tensor, k: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Queries and keys as the window branch takes them."""
        options = self.options
        if options.window_rope_theta is None:
            return q, k
        rotation = (layout.positions, options.window_rope_theta, options.window_rope_scaling)
        return rotate(q, *rotation), rotate(k, *rotation)

    def _mix(self, x_BTD: Tensor, slots: Tensor, window_BTHV: Tensor) -> Tensor:
        """Both branches, by the share of each head."""
        share = self.window_share
        if share is None:
            share = torch.sigmoid(self.share_proj(x_BTD))[..., None]
        slots_BTHV = slots.unflatten(-1, window_BTHV.shape[-2:])
        return (slots_BTHV + share * (window_BTHV - slots_BTHV)).flatten(2)

    def _gate(
        self, logits: Tensor, layout: TokenLayout, normalizer: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(log_forget, write, normalizer); write None means 1 - f."""
        options = self.options
        logits_BTGM = logits.unflatten(-1, (options.kv_heads, options.slots))
        if options.gate in ("abc", "abc_printed"):
            return abc_gate(logits_BTGM, layout, normalizer, decay=options.gate == "abc")
        return forget_gate(logits_BTGM, options.gate_logit_normalizer, layout.pads), None, None

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_forget: Tensor,
        write: Tensor | None,
        layout: TokenLayout,
        state: State,
    ) -> tuple[Tensor, Tensor]:
        scale, activation = self.options.score_scale, self.options.slot_activation
        memory = state.get("memory")
        if q.shape[1] == 1 and memory is not None and not torch.is_grad_enabled():
            return gated_slot_step(
                q,
                k,
                v,
                log_forget,
                memory,
                write=write,
                scale=scale,
                slot_activation=activation,
                impl=self.impl,
            )
        return gated_slot_attention(
            q,
            k,
            v,
            log_forget,
            write=write,
            scale=scale,
            slot_activation=activation,
            initial_memory=memory,
            cu_seqlens=layout.cu_seqlens,
            impl=self.impl,
        )

    def _combine(self, output_BTHV: Tensor, gate: Tensor | None) -> Tensor:
        """The layer's output, of slots alone."""
        options = self.options
        if options.output_norm and options.output_activation == "swish" and gate is None:
            return project_normed(output_BTHV.flatten(2), self.g_norm, self.o_proj)
        return self.o_proj(self._finish(output_BTHV, gate))

    def _finish(self, output_BTHV: Tensor, gate: Tensor | None) -> Tensor:
        """What of the slots' output enters the output projection."""
        output = output_BTHV.flatten(2)
        if self.options.output_activation == "swish":
            output = F.silu(output)
        if self.options.output_norm:
            output = self.g_norm(output)
        if gate is not None:
            output = output * F.silu(gate)
        return output


def replay_slots(options: SlotAttentionOptions, state: State | None, step: State) -> State:
    """The state after the tokens of `step`, given the state before them (None at the start).

    A recurrent memory cannot be cut back; what is kept of a rejected continuation is written again.
    """
    state = {} if state is None else state
    k, after = step["k"], {}
    if options.use_short_conv:
        for name in "qkv":
            inputs, tail = step[f"{name}_input"], state.get(f"{name}_tail")
            after[f"{name}_tail"] = next_tail(inputs, step.get("pads"), tail, options.conv_size)
    if options.window_branch is not None:
        after |= trim(append(_in_sight(state), {n: step[n] for n in NAMES}), options.window_branch)
    if "normalizer" in step:
        after["normalizer"] = step["normalizer"][:, -1].clone()
    after["memory"] = gated_slot_attention(
        torch.zeros_like(k),
        k,
        step["v"],
        step["log_forget"],
        write=step.get("write"),
        initial_memory=state.get("memory"),
    ).memory
    return after


def _in_sight(state: State) -> State | None:
    """The window branch's part of a state."""
    return {name: state[name] for name in NAMES} if "keys" in state else None
