"""The kernels as a differentiable operator, for autograd and torch.compile.

Imports torch only, so that tracing sees the operators before triton is loaded; the kernels are
imported where they are launched. Registered piece by piece: what `custom_op` adds to a call takes
longer than a kernel.
"""

from typing import cast

import torch
from torch import Tensor
from torch.library import infer_schema

from gsa.ops.triton.sizes import Sizes, number_dtype
from gsa.ops.types import SlotActivation, SlotAttentionOutput

MAX_SLOTS = 256
"""M, rows of a memory (K of linear attention's); a program's slice of it is held in registers."""


def unfit_for_triton(q: Tensor, log_forget: Tensor, letter: str = "M") -> str:
    """What the kernels cannot do about these inputs; empty if nothing. letter: that of rows."""
    if q.dtype == torch.float64:
        return "they take fp32, bf16 and fp16, got q in torch.float64"
    if log_forget.shape[3] > MAX_SLOTS:
        return f"they take {letter} <= {MAX_SLOTS}, got {letter} = {log_forget.shape[3]}"
    return ""


def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    write: Tensor | None,
    initial_memory: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    slot_activation: str,
    keep: bool,
    keep_memories: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """(output, final memory), then what the backward pass needs, empty where it is not kept:
    raw, own, lifted, fades, steep, starts, keys, values of `Kept` in `launch.py`."""
    from gsa.ops.triton import launch

    if initial_memory is not None:
        initial_memory = initial_memory.contiguous()
    with torch.cuda.device_of(q):
        output, memory, kept = launch.run_forward(
            (q, k, v, log_forget, write, cu_seqlens), initial_memory, scale,
            cast(SlotActivation, slot_activation), keep, keep_memories,
        )  # fmt: skip
    parts = (None,) * 8 if kept is None else (*kept[:2], *kept.gates, *kept[3:])
    filled = (q.new_empty(0) if part is None else part for part in parts)
    return output, memory, *filled  # pyright: ignore[reportReturnType]


def triton_forward_fake(
    q, k, v, log_forget, write, initial_memory, cu_seqlens, scale, slot_activation, keep,
    keep_memories,
):  # fmt: skip
    from gsa.ops.triton.plan import operand_dtype

    n = Sizes.of(q, k, v, log_forget, cu_seqlens)
    operand, number = operand_dtype(q.dtype), number_dtype(q.dtype)

    def empty(*shape: int, dtype: torch.dtype = number, wanted: bool = True) -> Tensor:
        return q.new_empty(shape, dtype=dtype) if wanted else q.new_empty(0)

    chunks = n.spans(n.chunk)
    shots = keep and keep_memories and n.borders > 0
    return (
        q.new_empty(n.B, n.T, n.H, n.V),
        empty(n.S, n.G, n.M, n.X, dtype=torch.float32),
        empty(n.tokens, n.H, n.M, wanted=keep and n.K > 0),
        empty(n.tokens, n.H, wanted=keep and n.K > 0),
        empty(n.tokens, n.G, n.M, dtype=operand, wanted=keep),
        empty(chunks, n.G, 2, n.M, wanted=keep),
        empty(chunks, n.G, dtype=torch.int32, wanted=keep),
        empty(n.spans(n.unit), n.G, n.M, n.X, wanted=keep and n.segmented),
        empty(n.borders, n.G, n.M, n.K, dtype=operand, wanted=shots),
        empty(n.borders, n.G, n.M, n.V, dtype=operand, wanted=shots),
    )


def triton_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    write: Tensor | None,
    initial_memory: Tensor | None,
    cu_seqlens: Tensor | None,
    memory: Tensor,
    kept: list[Tensor],
    d_output: Tensor,
    d_memory: Tensor | None,
    scale: float,
    slot_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v, log_forget, write, initial_memory); empty for what is not given."""
    from gsa.ops.triton import launch

    raw, own, lifted, fades, steep, *rest = kept
    starts, keys, values = (x if x.numel() else None for x in rest)
    raw, own = (raw, own) if k.shape[3] else (None, None)
    gates = launch.Gates(lifted, fades, steep)
    with torch.cuda.device_of(q):
        gradients = launch.run_backward(
            (q, k, v, log_forget, write, cu_seqlens),
            None if initial_memory is None else initial_memory.contiguous(),
            memory.contiguous(),
            launch.Kept(raw, own, gates, starts, keys, values),
            d_output,
            None if d_memory is None else d_memory.contiguous(),
            scale,
            cast(SlotActivation, slot_activation),
        )
    filled = (q.new_empty(0) if x is None else x for x in gradients)
    return tuple(filled)  # pyright: ignore[reportReturnType]


def triton_backward_fake(
    q, k, v, log_forget, write, initial_memory, cu_seqlens, memory, kept, d_output, d_memory, scale,
    slot_activation,
):  # fmt: skip
    given = (q, k, v, log_forget, write, initial_memory)
    gradients = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)
    return tuple(gradients)


for name, function, fake in (
    ("gsa::triton_forward", triton_forward, triton_forward_fake),
    ("gsa::triton_backward", triton_backward, triton_backward_fake),
):
    schema = infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)


class Attention(torch.autograd.Function):
    """`triton_forward` with its gradient."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.gsa.triton_forward.default(*inputs)
        *tensors, scale, slot_activation, _, _ = inputs
        _, memory, *kept = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*tensors, memory, *kept)
        ctx.options = (scale, slot_activation)
        return outputs

    @staticmethod
    def backward(ctx, d_output, d_memory, *_):
        q, k, v, log_forget, write, initial_memory, cu_seqlens, memory, *kept = ctx.saved_tensors
        inputs = (q, k, v, log_forget, write, initial_memory)
        if d_output is None:
            d_output = q.new_zeros(*q.shape[:3], v.shape[3])
        gradients = torch.ops.gsa.triton_backward.default(
            *inputs, cu_seqlens, memory, kept, d_output, d_memory, *ctx.options
        )
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        found = (gradient if need else None for gradient, need in needed)
        return *found, None, None, None, None, None


def forward_and_remember(*inputs):
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return Attention.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.gsa.triton_forward.default(*inputs)


torch.library.impl("gsa::triton_forward", "Autograd", forward_and_remember)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    write: Tensor | None,
    scale: float,
    slot_activation: SlotActivation,
    initial_memory: Tensor | None,
    cu_seqlens: Tensor | None,
    recompute: bool,
) -> SlotAttentionOutput:
    """`reference_attention` by Triton kernels."""
    floating = (q, k, v, log_forget, write, initial_memory)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floating)
    output, memory, *_ = torch.ops.gsa.triton_forward.default(
        q, k, v, log_forget, write, initial_memory, cu_seqlens, float(scale), slot_activation, keep,
        not recompute,
    )  # fmt: skip
    return SlotAttentionOutput(output, memory)
