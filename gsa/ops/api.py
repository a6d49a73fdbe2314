"""The operator's public functions: validation, and the choice of an implementation."""

from importlib.util import find_spec

import torch
from torch import Tensor

from gsa.ops.chunked_op import chunked_attention
from gsa.ops.reference import (
    linear_advance,
    reference_attention,
    reference_linear_attention,
    reference_step,
)
from gsa.ops.triton.op import triton_attention, unfit_for_triton
from gsa.ops.triton.step_op import triton_step
from gsa.ops.types import (
    Impl,
    SlotActivation,
    SlotAttentionOutput,
    compute_dtype,
    without_autocast,
)
from gsa.ops.validation import (
    check_impl,
    check_inputs,
    check_linear_inputs,
    check_memory,
    check_options,
    check_packing,
    check_scale,
    check_step,
    refuse_tangents,
)

HAS_TRITON = find_spec("triton") is not None


def triton_problem(device: torch.device) -> str:
    """Why the Triton kernels cannot run on a device; empty if they can."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type == "cuda":
        # Not while tracing: what asks a device about itself would break the graph.
        if not torch.compiler.is_compiling():
            major, minor = torch.cuda.get_device_capability(device)
            if torch.version.cuda and major < 8:
                return f"they need compute capability 8.0 or newer, {device} has {major}.{minor}"
        return ""
    if device.type != "cpu":
        return f"they run on CUDA devices, not on {device.type}"
    from gsa.ops.triton.plan import INTERPRETED

    return "" if INTERPRETED else "they need a CUDA device (or Triton's interpreter, on a CPU)"


def describe_impl(impl: Impl, device: torch.device, unfit: str = "") -> tuple[str, str]:
    """Which implementation `impl` means on `device`, and why.

    Args:
        unfit: what the Triton kernels cannot do about the inputs at hand; empty if nothing.

    Returns:
        (name, reason), name one of reference, chunked, triton.

    Raises:
        ValueError: a named implementation cannot run there. Only "auto" ever chooses.
    """
    if impl in ("reference", "chunked") or (impl == "auto" and device.type != "cuda"):
        if impl == "auto":
            return "chunked", f"the fastest form for {device.type}"
        return impl, "asked for by name"
    problem = unfit or triton_problem(device)
    if not problem:
        return "triton", "asked for by name" if impl == "triton" else "the fastest form for cuda"
    if impl == "triton":
        raise ValueError(
            f"impl: expected an implementation that can run here, got 'triton': Triton kernels: "
            f"{problem}; use impl='auto'"
        )
    return "chunked", f"Triton kernels: {problem}"


def gated_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    *,
    write: Tensor | None = None,
    scale: float = 1.0,
    slot_activation: SlotActivation = "softmax",
    initial_memory: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    recompute: bool = True,
    impl: Impl = "auto",
) -> SlotAttentionOutput:
    """Attends over a recurrent memory of M slots, written through gates, read through a softmax.

        memory_t = Diag(f_t) · memory_{t-1} + w_t ⊗ [k_t ; v_t]        f = exp(log_forget)
        output_t = activation(scale · memory_t[:, :K] · q_t)ᵀ · memory_t[:, K:]

    "Gated Slot Attention for Efficient Linear-Time Sequence Modeling", Eq. 6 (arXiv 2409.07146).
    Differentiable in every floating argument, the initial memory included, from both results. Time
    is linear in T. No input is modified.

    Args:
        q: [B, T, H, K], fp64, fp32, bf16 or fp16; k and v share its dtype. Any strides.
        k: [B, T, G, K]; H is a multiple of G, and query heads h·H/G … share key/value head h.
        v: [B, T, G, V].
        log_forget: [B, T, G, M], log f, finite and <= 0, in q's dtype or fp32. 0 keeps everything.
        write: [B, T, G, M], w, in q's dtype or fp32. None means 1 - f (the paper's choice).
        scale: factor on the scores; 1 in the paper and in the published checkpoints.
        slot_activation: softmax, identity, swish, relu or relu2 (the paper's Table 2).
        initial_memory: [B, G, M, K+V], fp32 (fp64 for fp64 inputs); zeros if None.
        cu_seqlens: [S+1] int32 or int64 on the CPU or q's device, the boundaries of S sequences
            packed in one row (B = 1, memory [S, G, M, K+V]); sequences may be empty. Contents are
            checked on the CPU; `check_cu_seqlens` checks a device tensor.
        recompute: True keeps little for the backward pass (inputs, scores, a few memories); False
            also keeps the memory at every chunk boundary (triton: every 512 tokens, which is what
            its backward pass looks at).
        impl: auto, reference, chunked or triton. A named one never falls back; auto takes triton
            on a CUDA device for what its kernels can do, else chunked.

    Returns:
        SlotAttentionOutput: output [B, T, H, V] in q's dtype; memory after the last token in fp32
        (fp64 for fp64 inputs).

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: forward-mode differentiation, but for impl "reference".
    """
    check_options(scale, slot_activation, impl)
    sizes = check_inputs(q, k, v, log_forget, write)
    if not isinstance(recompute, bool):
        raise ValueError(f"recompute: expected True or False, got {recompute!r}")
    if cu_seqlens is not None:
        check_packing(q, cu_seqlens)
    if initial_memory is not None:
        memories = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "B, G, M, K+V" if cu_seqlens is None else "S, G, M, K+V"
        check_memory("initial_memory", initial_memory, q, (memories, *sizes), letters)
    arguments = (q, k, v, log_forget, write, scale, slot_activation, initial_memory, cu_seqlens)
    chosen, _ = describe_impl(impl, q.device, unfit_for_triton(q, log_forget))
    refuse_tangents(chosen, q, k, v, log_forget, write, initial_memory)
    with without_autocast(q.device.type):
        if chosen == "reference":
            return reference_attention(*arguments)
        if chosen == "triton":
            return triton_attention(*arguments, recompute)
        return chunked_attention(*arguments, recompute)


@torch.no_grad()
def gated_slot_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    memory: Tensor,
    *,
    write: Tensor | None = None,
    scale: float = 1.0,
    slot_activation: SlotActivation = "softmax",
    inplace: bool = False,
    rows: Tensor | None = None,
    impl: Impl = "auto",
) -> SlotAttentionOutput:
    """Advances the memory by one token and reads it: one step of `gated_slot_attention`.

    For inference only: no gradient flows through it.

    Args:
        q, k, v, log_forget, write: as in `gated_slot_attention`, with T = 1 (q [B, 1, H, K]).
        memory: [B, G, M, K+V], fp32 (fp64 for fp64 inputs); with `rows`, a pool [P, G, M, K+V].
        scale, slot_activation: as in `gated_slot_attention`.
        inplace: True updates `memory` and returns it; False leaves it alone.
        rows: int64 [B], distinct, only with inplace=True: the rows of the pool to advance.
        impl: auto, reference, chunked or triton. One token is one chunk: reference and chunked are
            the same here.

    Returns:
        SlotAttentionOutput: output [B, 1, H, V] in q's dtype, and the memory.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    check_options(scale, slot_activation, impl)
    check_step(q, memory, rows, inplace, check_inputs(q, k, v, log_forget, write))
    chosen, _ = describe_impl(impl, q.device, unfit_for_triton(q, log_forget))
    if chosen == "triton":
        return triton_step(
            q, k, v, log_forget, write, memory, scale, slot_activation, inplace, rows
        )
    with without_autocast(q.device.type):
        before = memory if rows is None else memory.index_select(0, rows)
        output, after = reference_step(q, k, v, log_forget, write, before, scale, slot_activation)
        if not inplace:
            return SlotAttentionOutput(output, after)
        if rows is None:
            memory.copy_(after)
        else:
            memory.index_copy_(0, rows, after)
        return SlotAttentionOutput(output, memory)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_memory: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> SlotAttentionOutput:
    """Linear attention over a memory that decays: what gated slot attention is made of, by itself.

        memory_t = Diag(exp(log_decay_t)) · memory_{t-1} + k_t ⊗ v_t
        output_t = scale · memory_tᵀ q_t

    "Gated Linear Attention Transformers with Hardware-Efficient Training" (arXiv 2312.06635); with
    one constant decay per head "Retentive Network" (arXiv 2307.08621); with log_decay 0 plain
    linear attention without a normaliser. Differentiable in every floating argument, the initial
    memory included, from both results. Time is linear in T. No input is modified.

    Args:
        q: [B, T, H, K], fp64, fp32, bf16 or fp16; k and v share its dtype. Any strides.
        k: [B, T, G, K]; H is a multiple of G, and query heads h·H/G … share key/value head h.
        v: [B, T, G, V].
        log_decay: [B, T, G, K], finite and <= 0, in q's dtype or fp32. A decay that is the same for
            all keys or tokens may be expanded: strides of 0 are fine.
        scale: factor on the outputs; the papers have 1/sqrt(K).
        initial_memory: [B, G, K, V], fp32 (fp64 for fp64 inputs); zeros if None.
        cu_seqlens: [S+1], as in `gated_slot_attention` (B = 1, memory [S, G, K, V]).
        impl: as in `gated_slot_attention`; the kernels take K <= 256.

    Returns:
        SlotAttentionOutput: output [B, T, H, V] in q's dtype; memory [B, G, K, V] after the last
        token in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: naming the argument, what was expected and what came.
        NotImplementedError: forward-mode differentiation, but for impl "reference".
    """
    check_scale(scale)
    check_impl(impl)
    sizes = check_linear_inputs(q, k, v, log_decay)
    if cu_seqlens is not None:
        check_packing(q, cu_seqlens)
    if initial_memory is not None:
        memories = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "B, G, K, V" if cu_seqlens is None else "S, G, K, V"
        check_memory("initial_memory", initial_memory, q, (memories, *sizes), letters)
    chosen, _ = describe_impl(impl, q.device, unfit_for_triton(q, log_decay, "K"))
    refuse_tangents(chosen, q, k, v, log_decay, initial_memory)
    with without_autocast(q.device.type):
        if chosen == "reference":
            return reference_linear_attention(q, k, v, log_decay, scale, initial_memory, cu_seqlens)
        # A memory without keys: k is what is written, and q the read weights of its K rows.
        no_keys = k.new_empty(*k.shape[:3], 0)
        arguments = (q, no_keys, v, log_decay, k, scale, "identity", initial_memory, cu_seqlens)
        compute = triton_attention if chosen == "triton" else chunked_attention
        return compute(*arguments, True)


@torch.no_grad()
def gated_linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    *,
    scale: float = 1.0,
    inplace: bool = False,
) -> SlotAttentionOutput:
    """Advances the memory by one token and reads it: one step of `gated_linear_attention`.

    For inference only: no gradient flows through it.

    Args:
        q, k, v, log_decay: as in `gated_linear_attention`, with T = 1.
        memory: [B, G, K, V], fp32 (fp64 for fp64 inputs).
        scale: factor on the output.
        inplace: True updates `memory` and returns it; False leaves it alone.

    Returns:
        SlotAttentionOutput: output [B, 1, H, V] in q's dtype, and the memory.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    check_scale(scale)
    check_step(q, memory, None, inplace, check_linear_inputs(q, k, v, log_decay), "B, G, K, V")
    dtype = compute_dtype(q.dtype)
    with without_autocast(q.device.type):
        now_q, now_k, now_v, decay = (x[:, 0].to(dtype) for x in (q, k, v, log_decay))
        output, after = linear_advance(now_q, now_k, now_v, decay, memory, scale)
        output = output[:, None].to(q.dtype)
        if not inplace:
            return SlotAttentionOutput(output, after)
        return SlotAttentionOutput(output, memory.copy_(after))
