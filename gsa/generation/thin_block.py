"""A block for one token of one row: five kernels, each begun before the one before it ends."""

from typing import Any

import torch
from torch import Tensor, nn

from gsa.layers.feature_map import VALUE_ACTIVATIONS
from gsa.layers.mixer import State
from gsa.layers.mlp import SwiGLU
from gsa.layers.norm import RMSNorm
from gsa.layers.options import SlotAttentionOptions
from gsa.layers.projections import is_linear
from gsa.layers.rope import rope_frequencies
from gsa.layers.slot_attention import GatedSlotAttention
from gsa.layers.token_layout import TokenLayout
from gsa.ops.api import describe_impl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes_thin_blocks(model: Any, rows: int) -> bool:
    """Whether every block of a model, and its head, can be a `ThinBlock`: for one row.

    It has to be on a GPU with Triton, in fp32, bf16 or fp16, with slots in every layer and of the
    usual kind: what follows the projections is swish or nothing, and perhaps the rotation; gates
    are data-dependent; the output has no gate. Biases of the inputs are welcome.
    """
    head = model.lm_head
    if (
        rows > 1
        or model.device.type != "cuda"
        or describe_impl("auto", model.device)[0] != "triton"
    ):
        return False
    plain = is_linear(head) and head.bias is None and head.weight.dtype in DTYPES
    return plain and all(is_usual(block) for block in model.model.layers)


def is_usual(block: Any) -> bool:
    """Whether a block is of the kind that `ThinBlock` computes."""
    attn, mlp = block.attn, block.mlp
    if not isinstance(attn, GatedSlotAttention) or attn.impl not in ("auto", "triton"):
        return False
    options = attn.options
    usual = options.feature_map in VALUE_ACTIVATIONS and options.gate == "data_dependent"
    usual = usual and not (options.qk_norm or options.use_short_conv or options.output_gate)
    usual = usual and options.window_branch is None
    inputs: tuple[Any, ...] = (attn.q_proj, attn.k_proj, attn.v_proj, attn.f_proj)
    outputs: tuple[Any, ...] = (attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (
        usual
        and all(is_linear(layer) for layer in inputs + outputs)
        and all(layer.bias is None and layer.weight.numel() for layer in outputs)
        and all(layer.weight.is_contiguous() for layer in inputs + outputs)
    )


class ThinBlock(nn.Module):
    """A block for one token of one row; its weights are the block's own.

    Args:
        block: a `GSABlock` of a model that `takes_thin_blocks`.
    """

    def __init__(self, block: Any):
        super().__init__()
        self.attn_norm, self.mlp_norm = block.attn_norm, block.mlp_norm
        self.attn: GatedSlotAttention = block.attn
        self.mlp: SwiGLU = block.mlp
        options, device = self.attn.options, self.attn.q_proj.weight.device
        self.arrivals = torch.zeros(1, options.kv_heads, dtype=torch.int32, device=device)
        self.frequency, self.factor = rotation_of(options, device)

    def forward(self, x_11D: Tensor, layout: TokenLayout, state: State) -> Tensor:
        """One token [1, 1, D]; writes into the tensors of `state`."""
        from gsa.ops.triton import thin_linear as thin

        attn, mlp, options, x = self.attn, self.mlp, self.attn.options, x_11D[:, 0]
        assert layout.pads is not None
        made = thin.thin_inputs(
            x, norm_of(self.attn_norm), layout.pads,
            (weights_of(attn.q_proj), weights_of(attn.k_proj), weights_of(attn.v_proj),
             weights_of(attn.f_proj)),
            options.gate_logit_normalizer, options.feature_map == "swish",
            options.value_activation == "swish",
        )  # fmt: skip
        turn = turn_of(layout, self.frequency, self.factor)
        read = advance_memory(options, made, state["memory"], self.arrivals, turn)
        x = thin.thin_output(
            read, attn.o_proj.weight, x,
            norm=norm_of(attn.g_norm) if options.output_norm else None,
            swish=options.output_activation == "swish",
        )  # fmt: skip
        h = thin.thin_gate_up(x, norm_of(self.mlp_norm), mlp.gate_proj.weight, mlp.up_proj.weight)
        return thin.thin_output(h, mlp.down_proj.weight, x)[:, None]


class ThinHead(nn.Module):
    """Logits [1, W] of what the last block returns, [1, 1, D]: the model's norm and head."""

    def __init__(self, model: Any):
        super().__init__()
        self.norm, self.lm_head = model.model.norm, model.lm_head

    def forward(self, x_11D: Tensor) -> Tensor:
        from gsa.ops.triton.thin_linear import thin_output

        return thin_output(x_11D[:, 0], self.lm_head.weight, norm=norm_of(self.norm))


def weights_of(layer: Any) -> Any:
    """As the kernels take them."""
    from gsa.ops.triton.thin_linear import Weights

    return Weights(layer.weight, layer.bias)


def rotation_of(options: SlotAttentionOptions, device: torch.device) -> tuple[Tensor | None, float]:
    """(frequencies, factor) of `step.Turn`; (None, 1) for a layer that does not rotate."""
    if options.rope_theta is None:
        return None, 1.0
    frequency = rope_frequencies(
        options.key_width, options.rope_theta, options.rope_scaling, device
    )
    return frequency, float((options.rope_scaling or {}).get("attention_factor", 1.0))


def turn_of(layout: TokenLayout, frequency: Tensor | None, factor: float) -> Any:
    """`step.Turn` of the step's tokens; None for a layer that does not rotate."""
    from gsa.ops.triton.step import Turn

    return None if frequency is None else Turn(layout.positions, frequency, factor)


def advance_memory(
    options: SlotAttentionOptions,
    made: tuple[Tensor, Tensor, Tensor, Tensor],
    memory: Tensor,
    arrivals: Tensor | None,
    turn: Any,
) -> Tensor:
    """What a token of each row reads, [P, H · V]; the memory [P, G, M, K+V] is renewed in place.

    made: q, k, v, log_forget, each [P, heads · width]. arrivals, turn: as `step.launch` has them.
    """
    from gsa.ops.triton import step

    heads = (options.num_heads, options.kv_heads, options.kv_heads, options.kv_heads)
    q, k, v, log_forget = (
        y[:, None].unflatten(-1, (n, -1)) for y, n in zip(made, heads, strict=True)
    )
    aligned = q.shape[3] % 4 == 0 and v.shape[3] % 4 == 0
    read = step.launch(
        (q, k, v, log_forget, None), memory, memory, None, options.score_scale,
        options.slot_activation, aligned, arrivals, turn,
    )  # fmt: skip
    return read.flatten(1)


def norm_of(norm: RMSNorm) -> Any:
    """As the kernels take it."""
    from gsa.ops.triton.thin_linear import Norm

    return Norm(norm.weight, norm.eps)
