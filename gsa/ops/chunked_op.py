"""The chunked form as a differentiable operator: segments, the scan over chunks, what is saved.

Forward walks over segments of chunks with the memory carried across; backward walks back with its
gradient. Between the two only the inputs, the scores and one memory per segment are held
(`recompute=True`), or one memory per chunk. Both directions are `torch.library` operators, so that
torch.compile sees one node and no host code.
"""

from functools import cache
from typing import cast

import torch
from torch import Tensor

from gsa.ops.chunked import (
    Read,
    Written,
    beyond_fast,
    memory_update,
    readout_backward,
    readout_forward,
    write_backward,
    write_factors,
)
from gsa.ops.chunked_exact import Tiles
from gsa.ops.reference import write_strength
from gsa.ops.tiling import Tiling, max_chunks, segment_chunks
from gsa.ops.types import SlotActivation, SlotAttentionOutput, compute_dtype, without_autocast
from gsa.ops.validation import check_cu_seqlens


@cache
def keep_freed_memory() -> None:
    """Has the C library keep what a segment frees, for the next segment.

    glibc returns freed memory to the system beyond twice the largest block it saw freed, up to
    32 MB. Until then every segment's tiles, of a few MB, are mapped and zeroed anew, which took a
    third of the time. Freeing one block of that size, its pages never touched, settles it.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def plan(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> Tiling:
    B, T, G = q.shape[0], q.shape[1], k.shape[2]
    if cu_seqlens is None:
        return Tiling.of_batch(B, T, G)
    bounds = cu_seqlens.cpu()
    check_cu_seqlens(bounds, T)
    return Tiling.of_packed(bounds, T, G, q.device)


def load(
    tiling: Tiling, chunks: range, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
) -> Tiles:
    """The tiles of a segment, from (q, k, v, log_forget, write)."""
    q, k, v, log_forget, write = inputs
    dtype = compute_dtype(q.dtype)
    R = q.shape[2] // k.shape[2]
    q_tiles, k_tiles, v_tiles, log_f = (
        tiling.gather(x, chunks, dtype).flatten(0, 2) for x in (q, k, v, log_forget)
    )
    strength = (
        write_strength(log_f)
        if write is None
        else tiling.gather(write, chunks, dtype).flatten(0, 2)
    )
    decay_sum = log_f.cumsum(1, dtype=torch.float64)
    return Tiles(q_tiles.unflatten(0, (-1, R)), k_tiles, v_tiles, strength, log_f, decay_sum)


def memory_forward(
    tiling: Tiling,
    chunks: range,
    tiles: Tiles,
    written: Written,
    carry: Tensor,
    initial: Tensor | None,
    final: Tensor | None,
) -> Tensor:
    """The memory before each chunk [n, B, G, M, X]; `carry` [B, G, M, X] becomes the one after all.

    For packed sequences, a sequence's first chunk starts from its row of `initial` [S, G, M, X]
    (zeros if None), and its last chunk leaves its memory in `final`, if given.
    """
    update = memory_update(tiles, written).unflatten(0, (len(chunks), *carry.shape[:2]))
    fade = written.fade.unflatten(0, (len(chunks), *carry.shape[:2]))
    starts = torch.empty_like(update)
    for i, chunk in enumerate(chunks):
        if chunk in tiling.first:
            carry.zero_() if initial is None else carry.copy_(initial[tiling.first[chunk]])
        starts[i] = carry
        torch.addcmul(update[i], fade[i], carry, out=carry)
        if final is not None and chunk in tiling.last:
            final[tiling.last[chunk]] = carry[0]
    return starts


def memory_backward(
    tiling: Tiling, chunks: range, written: Written, d_starts: Tensor, carry: Tensor, d_ends: Tensor
) -> Tensor:
    """Gradient of the memory after each chunk, from that before it by the read side (`d_starts`).

    The scan of `memory_forward` backwards: `carry` and the rows of `d_ends` are replaced likewise.
    """
    fade = written.fade.unflatten(0, d_starts.shape[:3])
    d_after = torch.empty_like(d_starts)
    for i in reversed(range(len(chunks))):
        chunk = chunks[i]
        if chunk in tiling.last:
            carry.copy_(d_ends[tiling.last[chunk]])
        d_after[i] = carry
        torch.addcmul(d_starts[i], fade[i], carry, out=carry)
        if chunk in tiling.first:
            d_ends[tiling.first[chunk]] = carry[0]
    return d_after


@torch.library.custom_op("gsa::chunked_forward", mutates_args=())
def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    write: Tensor | None,
    initial_memory: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    slot_activation: str,
    keep_scores: bool,
    keep_every_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (output, final memory, scores [B, T, H, M], kept memories [.., B, G, M, X])."""
    if q.device.type == "cpu":
        keep_freed_memory()
    tiling = plan(q, k, cu_seqlens)
    output, ends, scores, kept = allocate(
        q, k, v, log_forget, cu_seqlens, keep_scores, keep_every_memory
    )
    if initial_memory is None:
        ends.zero_()
    else:
        ends.copy_(initial_memory)
    carry = ends if cu_seqlens is None else torch.zeros_like(ends[:1])
    read = Read(scale, cast(SlotActivation, slot_activation))
    keep_every_score = keep_scores and k.shape[3] > 0
    with without_autocast(q.device.type):
        for index, chunks in enumerate(tiling.segments()):
            tiles = load(tiling, chunks, (q, k, v, log_forget, write))
            exact = beyond_fast(tiles)
            if keep_scores and not keep_every_memory:
                kept[index] = carry
            starts = memory_forward(
                tiling, chunks, tiles, write_factors(tiles, exact), carry, initial_memory, ends
            )
            if keep_scores and keep_every_memory:
                kept[chunks.start : chunks.stop] = starts
            shape = (len(chunks), q.shape[0], q.shape[2])
            out, score = readout_forward(tiles, exact, starts.flatten(0, 2), read)
            tiling.scatter(out.flatten(0, 1).unflatten(0, shape), chunks, output)
            if keep_every_score:
                tiling.scatter(score.flatten(0, 1).unflatten(0, shape), chunks, scores)
    return output, ends, scores, kept


@chunked_forward.register_fake
def allocate_fake(
    q, k, v, log_forget, write, initial_memory, cu_seqlens, scale, slot_activation, keep_scores,
    keep_every_memory,
):  # fmt: skip
    return allocate(q, k, v, log_forget, cu_seqlens, keep_scores, keep_every_memory)


def allocate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    cu_seqlens: Tensor | None,
    keep_scores: bool,
    keep_every_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised results of `chunked_forward`."""
    B, T, H, _ = q.shape
    G, K, V, M = k.shape[2], k.shape[3], v.shape[3], log_forget.shape[3]
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = compute_dtype(q.dtype)
    segment = segment_chunks(B, G)
    memories = max_chunks(T, sequences)
    if not keep_every_memory:
        memories = (memories + segment - 1) // segment
    return (
        q.new_empty(B, T, H, V),
        q.new_empty((B if sequences is None else sequences, G, M, K + V), dtype=dtype),
        q.new_empty((B, T, H, M) if keep_scores and K else (0,), dtype=dtype),
        q.new_empty((memories, B, G, M, K + V) if keep_scores else (0,), dtype=dtype),
    )


@torch.library.custom_op("gsa::chunked_backward", mutates_args=())
def chunked_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    write: Tensor | None,
    initial_memory: Tensor | None,
    cu_seqlens: Tensor | None,
    scores: Tensor,
    kept: Tensor,
    d_output: Tensor,
    d_memory: Tensor | None,
    scale: float,
    slot_activation: str,
    keep_every_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (q, k, v, log_forget, write, initial_memory); empty for a derived write."""
    tiling = plan(q, k, cu_seqlens)
    inputs = (q, k, v, log_forget, write)
    results = allocate_gradients(q, k, v, log_forget, write, cu_seqlens)
    d_ends = results[5]
    if d_memory is None:
        d_ends.zero_()
    else:
        d_ends.copy_(d_memory)
    carry = d_ends if cu_seqlens is None else torch.zeros_like(d_ends[:1])
    read = Read(scale, cast(SlotActivation, slot_activation))
    dtype = compute_dtype(q.dtype)
    with without_autocast(q.device.type):
        for index, chunks in reversed(list(enumerate(tiling.segments()))):
            tiles = load(tiling, chunks, inputs)
            exact = beyond_fast(tiles)
            written = write_factors(tiles, exact)
            if keep_every_memory:
                starts = kept[chunks.start : chunks.stop]
            else:
                starts = memory_forward(
                    tiling, chunks, tiles, written, kept[index].clone(), initial_memory, None
                )
            start = starts.flatten(0, 2)
            heads = tiles.q.shape[1]
            d_out, score = (
                tiling.gather(x, chunks, dtype).flatten(0, 2).unflatten(0, (-1, heads))
                for x in (d_output, scores if scores.dim() == 4 else q)
            )
            if scores.dim() != 4:
                score.mul_(scale)
            gradients, d_start = readout_backward(tiles, exact, start, score, d_out, read)
            d_end = memory_backward(
                tiling, chunks, written, d_start.view(starts.shape), carry, d_ends
            )
            d_log_forget = write_backward(tiles, written, start, d_end.flatten(0, 2), gradients)
            if write is None:
                d_log_forget.addcmul_(1 - tiles.write, gradients.write, value=-1)
            store(tiling, chunks, (*gradients[:3], d_log_forget, gradients.write), results)
    return results


def store(
    tiling: Tiling, chunks: range, gradients: tuple[Tensor, ...], results: tuple[Tensor, ...]
) -> None:
    """Scatters the gradients of (q, k, v, log_forget, write) of a segment to their tokens."""
    n, B = len(chunks), results[0].shape[0]
    for tiles, out in zip(gradients, results[:5], strict=True):
        if out.dim() == 4:
            C, width = tiles.shape[-2:]
            tiling.scatter(tiles.reshape(n, B, out.shape[2], C, width), chunks, out)


def allocate_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    write: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised results of `chunked_backward`."""
    memories = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    G, K, V, M = k.shape[2], k.shape[3], v.shape[3], log_forget.shape[3]
    d_q, d_k, d_v, d_log_forget = (x.new_empty(x.shape) for x in (q, k, v, log_forget))
    return (
        d_q,
        d_k,
        d_v,
        d_log_forget,
        q.new_empty(0) if write is None else write.new_empty(write.shape),
        q.new_empty((memories, G, M, K + V), dtype=compute_dtype(q.dtype)),
    )


@chunked_backward.register_fake
def allocate_gradients_fake(
    q, k, v, log_forget, write, initial_memory, cu_seqlens, scores, kept, d_output, d_memory, scale,
    slot_activation, keep_every_memory,
):  # fmt: skip
    return allocate_gradients(q, k, v, log_forget, write, cu_seqlens)


def remember(ctx, inputs, output) -> None:
    q, k, v, log_forget, write, initial_memory, cu_seqlens, scale, slot_activation, _, every = (
        inputs
    )
    _, _, scores, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(scores, kept)
    ctx.save_for_backward(q, k, v, log_forget, write, initial_memory, cu_seqlens, scores, kept)
    ctx.options = (scale, slot_activation, every)


def backward(ctx, d_output, d_memory, d_scores, d_kept):
    tensors = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(tensors[0][..., :1]).expand(
            *tensors[0].shape[:3], tensors[2].shape[3]
        )
    gradients = chunked_backward(*tensors, d_output, d_memory, *ctx.options)
    return (
        *(
            gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)
        ),
        None,
        None,
        None,
        None,
        None,
    )


chunked_forward.register_autograd(backward, setup_context=remember)


def chunked_attention(
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
    """`reference_attention`, in chunks."""
    floating = (q, k, v, log_forget, write, initial_memory)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floating)
    output, memory, _, _ = chunked_forward(
        q, k, v, log_forget, write, initial_memory, cu_seqlens, float(scale), slot_activation, keep,
        not recompute,
    )  # fmt: skip
    return SlotAttentionOutput(output, memory)
