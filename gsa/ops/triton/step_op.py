"""The one-token step on a GPU as `torch.library` operators: one node for torch.compile.

Imports torch only; Triton is loaded when a step first runs. Registered by `torch.library.define`:
what `custom_op` adds costs, for an operator in place, several times the step itself.
"""

import torch
from torch import Tensor
from torch.library import infer_schema

from gsa.ops.types import SlotActivation, SlotAttentionOutput


def copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def dense(x: Tensor, aligned: bool = False) -> Tensor:
    """x without gaps and, if asked for, at a multiple of 16 bytes: itself or a copy."""
    return x if x.is_contiguous() and not (aligned and x.data_ptr() % 16) else copy(x)


def rows_are_dense(memory: Tensor, aligned: bool) -> bool:
    """Whether the kernel can take a memory [P, G, M, X] as it lies, also to write into it."""
    P, G, M, X = memory.shape
    across_P, across_G, across_M, across_X = memory.stride()
    if across_X != 1 or (M > 1 and across_M != X) or (G > 1 and across_G != M * X):
        return False
    if P > 1 and across_P < G * M * X:  # expanded: rows share numbers
        return False
    return not (aligned and (memory.data_ptr() % 16 or across_P % 4))


def run(
    token: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    memory: Tensor,
    inplace: bool,
    rows: Tensor | None,
    scale: float,
    slot_activation: str,
) -> tuple[Tensor, Tensor]:
    """Returns (output, the memory after the token)."""
    from gsa.ops.triton import step

    q, k, v, log_forget, write = token
    # 16 bytes at a time wherever K and V let rows of keys and of values start at a multiple of them
    aligned = q.shape[3] % 4 == 0 and v.shape[3] % 4 == 0
    write = None if write is None else dense(write)
    token = (dense(q, aligned), dense(k, aligned), dense(v, aligned), dense(log_forget), write)
    rows = None if rows is None else dense(rows)
    options = (scale, slot_activation, aligned)
    fits = rows_are_dense(memory, aligned)
    if not inplace:
        before = memory if fits else copy(memory)
        after = torch.empty(memory.shape, dtype=memory.dtype, device=memory.device)
        return step.launch(token, before, after, None, *options), after
    if fits:
        return step.launch(token, memory, memory, rows, *options), memory
    work = copy(memory if rows is None else memory.index_select(0, rows))
    output = step.launch(token, work, work, None, *options)
    if rows is None:
        memory.copy_(work)
    else:
        memory.index_copy_(0, rows, work)
    return output, memory


def step_new(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    write: Tensor | None,
    memory: Tensor,
    scale: float,
    slot_activation: str,
) -> tuple[Tensor, Tensor]:
    """Returns (output, a new memory)."""
    token = (q, k, v, log_forget, write)
    return run(token, memory, False, None, scale, slot_activation)


def step_new_fake(q, k, v, log_forget, write, memory, scale, slot_activation):
    output = q.new_empty(q.shape[0], 1, q.shape[2], v.shape[3])
    return output, memory.new_empty(memory.shape)


def step_inplace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    write: Tensor | None,
    memory: Tensor,
    rows: Tensor | None,
    scale: float,
    slot_activation: str,
) -> Tensor:
    """Updates the memory, or the given rows of it; returns the output."""
    token = (q, k, v, log_forget, write)
    torch.autograd.graph.increment_version(memory)  # kernels write behind autograd's back
    return run(token, memory, True, rows, scale, slot_activation)[0]


def step_inplace_fake(q, k, v, log_forget, write, memory, rows, scale, slot_activation):
    return q.new_empty(q.shape[0], 1, q.shape[2], v.shape[3])


for name, function, fake, mutates in (
    ("gsa::triton_step", step_new, step_new_fake, ()),
    ("gsa::triton_step_", step_inplace, step_inplace_fake, ("memory",)),
):
    schema = infer_schema(function, mutates_args=mutates)
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)


def triton_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    write: Tensor | None,
    memory: Tensor,
    scale: float,
    slot_activation: SlotActivation,
    inplace: bool,
    rows: Tensor | None,
) -> SlotAttentionOutput:
    """`reference_step` by Triton kernels, also in place and on rows of a pool. No gradient.

    Args:
        q, k, v: [B, 1, H, K], [B, 1, G, K], [B, 1, G, V], one of fp32, bf16, fp16. Any strides.
        log_forget, write: [B, 1, G, M], in q's dtype or fp32; write None means 1 - exp(log_forget).
        memory: fp32 [B, G, M, K+V], with `rows` a pool [P, G, M, K+V]. Any strides, but a copy is
            made unless a row [G, M, K+V] is contiguous (and, for K and V multiples of 4, aligned).
        scale, slot_activation: as in `gated_slot_step`.
        inplace: True updates `memory` and returns it.
        rows: int64 [B], distinct, only with inplace. A row outside the pool changes nothing and
            reads as NaN.

    Returns:
        SlotAttentionOutput: output [B, 1, H, V] in q's dtype, and the memory.
    """
    token, options = (q, k, v, log_forget, write), (float(scale), slot_activation)
    if inplace:
        output = torch.ops.gsa.triton_step_.default(*token, memory, rows, *options)
        return SlotAttentionOutput(output, memory)
    return SlotAttentionOutput(*torch.ops.gsa.triton_step.default(*token, memory, *options))
