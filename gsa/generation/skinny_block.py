"""A block for one token of 2 to 64 rows: chained kernels, as those of `thin_block.py` for one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gsa.generation.step import joined_biases
from gsa.generation.thin_block import (
    advance_memory,
    is_usual,
    norm_of,
    rotation_of,
    takes_thin_blocks,
    turn_of,
)
from gsa.layers.mixer import State
from gsa.layers.mlp import SwiGLU
from gsa.layers.slot_attention import GatedSlotAttention
from gsa.layers.token_layout import TokenLayout

DTYPES = (torch.bfloat16, torch.float16)
TOGETHER = 16
"""Rows up to which the memory's step is one kernel: of few rows a launch is a large part of it."""


def takes_skinny_blocks(model: Any, rows: int) -> bool:
    """Whether every block of a model, and its head, can be a `SkinnyBlock`: for 2 to 64 rows.

    Beyond what `takes_thin_blocks` asks of one row, the GPU has to be of Hopper's kind, weights in
    bf16 or fp16, and every weight's rows start at multiples of 16 bytes.
    """
    if not takes_thin_blocks(model, 1) or torch.cuda.get_device_capability(model.device)[0] != 9:
        return False
    from gsa.ops.triton.skinny_linear import MOST_ROWS

    fits = 2 <= rows <= MOST_ROWS and can_be_tiled(model.lm_head.weight)
    return fits and all(is_skinny(block) for block in model.model.layers)


def is_skinny(block: Any) -> bool:
    """Whether a block is of the kind that `SkinnyBlock` computes."""
    if not is_usual(block):
        return False
    options, mlp = block.attn.options, block.mlp
    normed = options.output_norm or options.output_activation == "identity"
    layers = (block.attn.q_proj, block.attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return normed and all(can_be_tiled(layer.weight) for layer in layers)


def can_be_tiled(weight: Tensor) -> bool:
    """Whether the copy engine can take a weight [N, D]."""
    whole = weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return weight.dtype in DTYPES and whole and weight.shape[1] % 8 == 0


class Unfinished(NamedTuple):
    """What a block hands on: the rows [P, D] before its MLP, and the MLP's output in parts, fp32
    [.., P, D]. Whoever comes next adds them up, and norms the sum in the same kernel."""

    x: Tensor
    parts: Tensor


def begin(x: Tensor | Unfinished) -> tuple[Tensor, Tensor | None]:
    """(rows [P, D], parts to add) of what embeddings [P, 1, D] or a block have handed on."""
    return x if isinstance(x, Unfinished) else (x[:, 0], None)


class SkinnyBlock(nn.Module):
    """A block for one token of each of P rows.

    The weights of q, k, v and gate are copied, one below the other; all else is the block's own.

    Args:
        block: a `GSABlock` of a model that `takes_skinny_blocks`.
        rows: P.
    """

    inputs: Tensor
    inputs_bias: Tensor | None

    def __init__(self, block: Any, rows: int):
        super().__init__()
        self.attn_norm, self.mlp_norm = block.attn_norm, block.mlp_norm
        self.attn: GatedSlotAttention = block.attn
        self.mlp: SwiGLU = block.mlp
        layers: dict[str, Any] = {name: getattr(self.attn, f"{name}_proj") for name in "qkvf"}
        q, k, v, f = (layer.out_features for layer in layers.values())
        self.counts = (q, k, v, f)
        weights = [layer.weight.detach() for layer in layers.values()]
        self.register_buffer("inputs", torch.cat(weights))
        self.register_buffer("inputs_bias", joined_biases(layers))
        self.arrivals = None
        if rows <= TOGETHER:
            heads = self.attn.options.kv_heads
            self.arrivals = self.inputs.new_zeros(rows, heads, dtype=torch.int32)
        self.frequency, self.factor = rotation_of(self.attn.options, self.inputs.device)

    def forward(self, x: Tensor | Unfinished, layout: TokenLayout, state: State) -> Unfinished:
        """One token of each row, [P, 1, D] or what a block returns; writes into `state`."""
        from gsa.ops.triton import skinny_linear as skinny
        from gsa.ops.triton.thin_linear import Weights

        attn, mlp, options = self.attn, self.mlp, self.attn.options
        assert layout.pads is not None
        x, h = skinny.skinny_rows(*begin(x), norm_of(self.attn_norm))
        made = skinny.skinny_inputs(
            h, Weights(self.inputs, self.inputs_bias), self.counts, layout.pads,
            options.gate_logit_normalizer, options.feature_map == "swish",
            options.value_activation == "swish",
        )  # fmt: skip
        turn = turn_of(layout, self.frequency, self.factor)
        read = advance_memory(options, made, state["memory"], self.arrivals, turn)
        if options.output_norm:
            swish = options.output_activation == "swish"
            _, read = skinny.skinny_rows(read, None, norm_of(attn.g_norm), swish=swish)
        parts = skinny.skinny_parts(read, attn.o_proj.weight)
        x, h = skinny.skinny_rows(x, parts, norm_of(self.mlp_norm))
        h = skinny.skinny_gate_up(h, mlp.gate_proj.weight, mlp.up_proj.weight)
        return Unfinished(x, skinny.skinny_parts(h, mlp.down_proj.weight))


class SkinnyHead(nn.Module):
    """Logits [P, W] of what the last block returns: the model's norm and head."""

    def __init__(self, model: Any):
        super().__init__()
        self.norm, self.lm_head = model.model.norm, model.lm_head

    def forward(self, x: Tensor | Unfinished) -> Tensor:
        from gsa.ops.triton import skinny_linear as skinny

        _, h = skinny.skinny_rows(*begin(x), norm_of(self.norm))
        return skinny.skinny_parts(h, self.lm_head.weight, whole=True)[0]
