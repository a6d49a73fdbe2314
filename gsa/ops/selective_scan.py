"""Mamba's selective scan: a memory of K numbers for each channel, that decays by the token.

It is gated linear attention with a head for each of E channels and values of width 1, whose
queries, keys and rates of decay are shared so widely that computing it as such would write down
T · E · K numbers three times over. Here that many exist for one segment of tokens at a time, and in
the kernels (`gsa/ops/triton/selective_scan.py`) for none.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import infer_schema

from gsa.ops.api import describe_impl
from gsa.ops.reference import reference_linear_attention
from gsa.ops.types import Impl, SlotAttentionOutput, compute_dtype, without_autocast
from gsa.ops.validation import (
    check_cu_seqlens,
    check_impl,
    check_memory,
    check_packing,
    check_scan_inputs,
    refuse_tangents,
)

SEGMENT = 64
"""Tokens of which decays and memories exist at once in the torch form."""
MAX_KEYS = 64
"""K of the kernels; a program holds them all for some channels and tokens in registers."""


def selective_scan(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    *,
    initial_memory: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> SlotAttentionOutput:
    """Every channel e has a memory of K numbers; a token decays it, adds to it and reads it.

        memory_t[e, k] = exp(delta_t[e] · rate[e, k]) · memory_{t-1}[e, k]
                         + delta_t[e] · x_t[e] · write_t[k]
        output_t[e]    = Σ_k memory_t[e, k] · read_t[k]

    "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", Algorithm 2 (arXiv
    2312.00752), where rate, write and read are A, B and C; without its skip D. Equal to
    `gated_linear_attention` of q = read, k = write, v = delta · x, log_decay = delta · rate.
    Differentiable in every floating argument, from both results. A token with delta = 0 changes
    nothing. No input is modified.

    Args:
        x: [B, T, E], fp64, fp32, bf16 or fp16; write and read share its dtype. Any strides.
        delta: [B, T, E], finite and >= 0, in x's dtype or fp32.
        rate: [E, K], finite and <= 0, fp32 (fp64 for fp64).
        write, read: [B, T, K].
        initial_memory: [B, E, K], fp32 (fp64 for fp64); zeros if None.
        cu_seqlens: [S+1], as in `gated_slot_attention` (B = 1, memory [S, E, K]).
        impl: as in `gated_slot_attention`; the kernels take K <= 64. chunked is a loop over
            tokens, a segment of them at a time.

    Returns:
        SlotAttentionOutput: output [B, T, E] in x's dtype; memory [B, E, K] after the last token.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: forward-mode differentiation, but for impl "reference".
    """
    check_impl(impl)
    sizes = check_scan_inputs(x, delta, rate, write, read)
    if cu_seqlens is not None:
        check_packing(x, cu_seqlens, "x")
    if initial_memory is not None:
        memories = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "B, E, K" if cu_seqlens is None else "S, E, K"
        check_memory("initial_memory", initial_memory, x, (memories, *sizes), letters)
    unfit = f"they take K <= {MAX_KEYS}, got K = {sizes[1]}" if sizes[1] > MAX_KEYS else ""
    if x.dtype == torch.float64 and x.device.type == "cuda":
        unfit = "they take fp32, bf16 and fp16, got x in torch.float64"
    chosen, _ = describe_impl(impl, x.device, unfit)
    refuse_tangents(chosen, x, delta, rate, write, read, initial_memory)
    with without_autocast(x.device.type):
        if chosen == "reference":
            return _reference(x, delta, rate, write, read, initial_memory, cu_seqlens)
        return SlotAttentionOutput(
            *torch.ops.gsa.selective_scan.default(
                x, delta, rate, write, read, initial_memory, cu_seqlens, chosen == "triton"
            )
        )


@torch.no_grad()
def selective_step(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    memory: Tensor,
    *,
    inplace: bool = False,
) -> SlotAttentionOutput:
    """One token of `selective_scan`, arguments as there with T = 1; for inference only.

    Args:
        memory: [B, E, K], fp32 (fp64 for fp64).
        inplace: True updates `memory` and returns it; False leaves it alone.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    sizes = check_scan_inputs(x, delta, rate, write, read)
    if x.shape[1] != 1:
        raise ValueError(f"x: expected T = 1 token (shape [B, 1, E]), got {list(x.shape)}")
    check_memory("memory", memory, x, (x.shape[0], *sizes), "B, E, K")
    dtype = compute_dtype(x.dtype)
    with without_autocast(x.device.type):
        now_x, now_delta, k, q = (one[:, 0].to(dtype) for one in (x, delta, write, read))
        after = torch.exp(now_delta[..., None] * rate) * memory
        after += (now_delta * now_x)[..., None] * k[:, None]
        output = (after @ q[..., None])[:, None, :, 0].to(x.dtype)
        return SlotAttentionOutput(output, memory.copy_(after) if inplace else after)


def _reference(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    initial_memory: Tensor | None,
    cu_seqlens: Tensor | None,
) -> SlotAttentionOutput:
    """As gated linear attention, token by token."""
    dtype, E = compute_dtype(x.dtype), x.shape[2]
    wide_delta = delta.to(dtype)
    q, k = (one.to(dtype)[:, :, None].expand(-1, -1, E, -1) for one in (read, write))
    v = (wide_delta * x.to(dtype))[..., None]
    memory = None if initial_memory is None else initial_memory[..., None]
    output, memory = reference_linear_attention(
        q, k, v, wide_delta[..., None] * rate, 1.0, memory, cu_seqlens
    )
    return SlotAttentionOutput(output[..., 0].to(x.dtype), memory[..., 0])


Sequence = tuple[slice, slice]
"""Which memories and which tokens: all rows at once, or one packed sequence."""


def _sequences(tokens: int, rows: int, cu_seqlens: Tensor | None) -> Iterator[Sequence]:
    if cu_seqlens is None:
        yield slice(0, rows), slice(0, tokens)
        return
    bounds = cu_seqlens.cpu()
    check_cu_seqlens(bounds, tokens)
    for s, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        yield slice(s, s + 1), slice(begin, end)


def _segments(tokens: slice) -> list[slice]:
    starts = range(tokens.start, tokens.stop, SEGMENT)
    return [slice(start, min(start + SEGMENT, tokens.stop)) for start in starts]


def _walk(
    tokens: slice, inputs: tuple[Tensor, Tensor, Tensor, Tensor], before: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays and memories [T, B, E, K] of a segment, tokens first, from the memory before it."""
    x, delta, rate, write = inputs
    dtype = rate.dtype
    delta_TBE = delta[:, tokens].to(dtype).transpose(0, 1)
    added = delta_TBE * x[:, tokens].to(dtype).transpose(0, 1)
    decay = torch.exp(delta_TBE[..., None] * rate)
    memories = added[..., None] * write[:, tokens].to(dtype).transpose(0, 1)[:, :, None]
    for t in range(len(memories)):
        before = torch.addcmul(memories[t], decay[t], before, out=memories[t])
    return decay, memories


def scan_forward(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    initial_memory: Tensor | None,
    cu_seqlens: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """(output, memory) of `selective_scan`."""
    if triton:
        from gsa.ops.triton import selective_scan as kernels

        with torch.cuda.device_of(x):
            return kernels.scan(x, delta, rate, write, read, initial_memory, cu_seqlens)
    output, memory = scan_forward_fake(
        x, delta, rate, write, read, initial_memory, cu_seqlens, triton
    )
    memory.copy_(initial_memory) if initial_memory is not None else memory.zero_()
    for rows, span in _sequences(x.shape[1], x.shape[0], cu_seqlens):
        carry = memory[rows]
        for tokens in _segments(span):
            _, memories = _walk(tokens, (x, delta, rate, write), carry)
            now = read[:, tokens].to(rate.dtype).transpose(0, 1)
            output[:, tokens] = (memories @ now[..., None])[..., 0].transpose(0, 1).to(x.dtype)
            carry = memories[-1]
        memory[rows] = carry
    return output, memory


def scan_forward_fake(x, delta, rate, write, read, initial_memory, cu_seqlens, triton):
    memories = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), rate.new_empty(memories, *rate.shape)


def scan_backward(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    initial_memory: Tensor | None,
    cu_seqlens: Tensor | None,
    d_output: Tensor,
    d_memory: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, rate, write, read and the initial memory (of zeros if None).

    With g_t the gradient of memory_t, g_t = read_t ⊗ d_output_t + decay_{t+1} · g_{t+1}; that of
    log_decay_t is g_t · decay_t · memory_{t-1}. Memories are computed again, by segment.
    """
    if triton:
        from gsa.ops.triton import selective_scan as kernels

        with torch.cuda.device_of(x):
            return kernels.scan_gradients(
                x, delta, rate, write, read, initial_memory, cu_seqlens, d_output, d_memory
            )
    dtype = rate.dtype
    d_x, d_delta, d_rate, d_write, d_read, d_initial = gradients_fake(
        x, delta, rate, write, read, initial_memory, cu_seqlens, d_output, d_memory, triton
    )
    d_rate.zero_()
    d_initial.zero_() if d_memory is None else d_initial.copy_(d_memory)
    for rows, span in _sequences(x.shape[1], x.shape[0], cu_seqlens):
        segments, begins = _segments(span), []
        carry = torch.zeros_like(d_initial[rows])
        carry = carry if initial_memory is None else initial_memory[rows]
        for tokens in segments:
            begins.append(carry)
            carry = _walk(tokens, (x, delta, rate, write), carry)[1][-1].clone()
        d_carry = d_initial[rows].clone()
        for tokens, begin in zip(reversed(segments), reversed(begins), strict=True):
            decay, memories = _walk(tokens, (x, delta, rate, write), begin)
            now_x, now_delta, k, q, d_y = (
                one[:, tokens].to(dtype).transpose(0, 1)
                for one in (x, delta, write, read, d_output)
            )
            d_read[:, tokens] = (d_y[:, :, None] @ memories)[:, :, 0].transpose(0, 1).to(x.dtype)
            d_memories = d_y[..., None] * q[:, :, None]
            for t in reversed(range(len(memories))):
                d_memories[t] += d_carry
                d_carry = decay[t] * d_memories[t]
            d_added = (d_memories @ k[..., None])[..., 0]
            d_log = decay.mul_(d_memories)
            d_log[1:] *= memories[:-1]
            d_log[0] *= begin
            d_x[:, tokens] = (now_delta * d_added).transpose(0, 1).to(x.dtype)
            d_now = now_x * d_added + (d_log * rate).sum(-1)
            d_delta[:, tokens] = d_now.transpose(0, 1).to(delta.dtype)
            d_rate += (d_log * now_delta[..., None]).sum((0, 1))
            d_k = (now_delta * now_x)[:, :, None] @ d_memories
            d_write[:, tokens] = d_k[:, :, 0].transpose(0, 1).to(x.dtype)
        d_initial[rows] = d_carry
    return d_x, d_delta, d_rate, d_write, d_read, d_initial


def gradients_fake(
    x, delta, rate, write, read, initial_memory, cu_seqlens, d_output, d_memory, triton
):
    memories = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_inputs = (one.new_empty(one.shape) for one in (x, delta, rate, write, read))
    return *d_inputs, rate.new_empty(memories, *rate.shape)


for name, function, fake in (
    ("gsa::selective_scan", scan_forward, scan_forward_fake),
    ("gsa::selective_scan_backward", scan_backward, gradients_fake),
):
    schema = infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)


def remember(ctx, inputs, output) -> None:
    *tensors, ctx.triton = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def backward(ctx, d_output, d_memory):
    if d_output is None:
        d_output = torch.zeros_like(ctx.saved_tensors[0])
    with without_autocast(d_output.device.type):
        gradients = torch.ops.gsa.selective_scan_backward.default(
            *ctx.saved_tensors, d_output, d_memory, ctx.triton
        )
    needed = zip(gradients, ctx.needs_input_grad, strict=False)
    return *(gradient if need else None for gradient, need in needed), None, None


torch.library.register_autograd("gsa::selective_scan", backward, setup_context=remember)
