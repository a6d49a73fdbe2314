"""The kernels as a differentiable operator, for autograd and torch.compile.

Imports torch only, so that tracing sees the operators before triton is loaded; the kernels are
imported where they are launched. Registered piece by piece: what `custom_op` adds to a call takes
longer than a kernel.
"""

from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import infer_schema

from gsa.ops.triton.sizes import KeptRooms, Sizes, number_dtype
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, final memory, what the backward pass needs: `KeptRooms`, empty without `keep`)."""
    from gsa.ops.triton import run

    options = (scale, cast(SlotActivation, slot_activation), keep, keep_memories)
    with torch.cuda.device_of(q):
        tokens = (q, k, v, log_forget, write, cu_seqlens)
        found = run.run_forward(tokens, initial_memory, *options)
    output, memory = found[:2]
    return output, memory, found[2] if keep else q.new_empty(0, dtype=torch.uint8)


def triton_forward_fake(
    q, k, v, log_forget, write, initial_memory, cu_seqlens, scale, slot_activation, keep,
    keep_memories,
):  # fmt: skip
    from gsa.ops.triton.plan import operand_dtype

    n = Sizes.of(q, k, v, log_forget, cu_seqlens)
    rooms = KeptRooms.of(n, number_dtype(q.dtype), operand_dtype(q.dtype), keep_memories)
    return (
        q.new_empty(n.B, n.T, n.H, n.V),
        q.new_empty(n.S, n.G, n.M, n.X, dtype=torch.float32),
        q.new_empty(rooms.bytes if keep else 0, dtype=torch.uint8),
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
    kept: Tensor,
    d_output: Tensor,
    d_memory: Tensor | None,
    scale: float,
    slot_activation: str,
    keep_memories: bool,
) -> list[Tensor]:
    """Gradients of q, k, v, log_forget, and of write and the initial memory if they are given."""
    from gsa.ops.triton import run

    options = (scale, cast(SlotActivation, slot_activation), keep_memories)
    with torch.cuda.device_of(q):
        tokens = (q, k, v, log_forget, write, cu_seqlens)
        return run.run_backward(tokens, initial_memory, memory, kept, d_output, d_memory, *options)


def triton_backward_fake(
    q, k, v, log_forget, write, initial_memory, cu_seqlens, memory, kept, d_output, d_memory, scale,
    slot_activation, keep_memories,
):  # fmt: skip
    given = (q, k, v, log_forget, write, initial_memory)
    return [x.new_empty(x.shape) for x in given if x is not None]


for name, function, fake in (
    ("gsa::triton_forward", triton_forward, triton_forward_fake),
    ("gsa::triton_backward", triton_backward, triton_backward_fake),
):
    schema = infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)


def unwatched(*inputs: object) -> bool:
    """Whether nobody looks at operators as they are called: no tracing, no transform, no mode, no
    kind of tensor of its own. Then a function is called without the dispatcher, which twice takes
    as long as all that it is there to find."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._dispatch_tls_is_dispatch_key_included(EARLY)
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and all(type(x) in PLAIN for x in inputs if isinstance(x, Tensor))
    )


PLAIN = (Tensor, torch.nn.Parameter)
EARLY = torch._C.DispatchKey.PreDispatch
"""There are modes that see an operator before autograd does, as in `make_fx(pre_dispatch=True)`."""


class Attention(torch.autograd.Function):
    """`triton_forward` with its gradient."""

    @staticmethod
    def forward(ctx, *inputs):
        if unwatched(*inputs):
            outputs = triton_forward(*inputs)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = torch.ops.gsa.triton_forward.default(*inputs)
        *tensors, scale, slot_activation, _, keep_memories = inputs
        _, memory, kept = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(*tensors, memory, kept)
        ctx.options = (scale, slot_activation, keep_memories)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, d_memory, _):
        q, k, v, log_forget, write, initial_memory, cu_seqlens, memory, kept = ctx.saved_tensors
        inputs = (q, k, v, log_forget, write, initial_memory)
        if d_output is None:
            d_output = q.new_zeros(*q.shape[:3], v.shape[3])
        given = (*inputs, cu_seqlens, memory, kept, d_output, d_memory, *ctx.options)
        compute = torch.ops.gsa.triton_backward.default
        gradients = iter((triton_backward if unwatched(*given) else compute)(*given))
        found = [None if x is None else next(gradients) for x in inputs]
        needed = zip(found, ctx.needs_input_grad, strict=False)
        return *(x if need else None for x, need in needed), None, None, None, None, None


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
    options = (float(scale), slot_activation, keep, not recompute)
    inputs = (q, k, v, log_forget, write, initial_memory, cu_seqlens, *options)
    compute = torch.ops.gsa.triton_forward.default
    if not torch.compiler.is_compiling() and unwatched(*inputs):
        compute = Attention.apply if keep else triton_forward
    output, memory, _ = compute(*inputs)
    return SlotAttentionOutput(output, memory)
