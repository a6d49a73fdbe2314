"""Scores to read weights and back: the kernels that see a token's slots side by side."""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

import triton
import triton.language as tl

from gsa.ops.triton.common import activate, activation_backward, chunk_decays, find_span
from gsa.ops.triton.gates import load_gate, load_write


@triton.jit
def sum_slices(parts, place, mask, step, SLICES: tl.constexpr):
    """Adds what `contract_kernel` left for each slice of columns, `step` numbers apart."""
    total = tl.load(parts + place, mask=mask, other=0.0)
    for s in tl.static_range(1, SLICES):
        total += tl.load(parts + s * step + place, mask=mask, other=0.0)
    return total


@triton.jit
def write_and_growth(log_forget, write, steep_flags, chunk, head, start, stop, slots,
                     G: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
                     NUMBER: tl.constexpr):  # fmt: skip
    """(w, `grow` of `chunk_decays`) of a chunk, each [C, slots]; grow is 1 where it is flagged."""
    log_f = load_gate(log_forget, start, stop, head, slots, G, M, C, NUMBER)
    w = load_write(log_f, write, start, stop, head, slots, G, M, C)
    grow, _, _, _, _ = chunk_decays(log_f)
    if tl.load(steep_flags + chunk * G + head) != 0:
        grow = tl.full(grow.shape, 1.0, NUMBER)
    return w, grow


@triton.jit(do_not_specialize=["tokens", "all_tokens"])
def activate_kernel(
    raw, own,  # [slices, tokens, H, M], [slices, tokens, H]: what `contract_kernel` left; without
    # keys queries [tokens, H, M] and None
    log_forget, write,  # [tokens, G, M]
    steep_flags,  # [chunks, G]
    read,  # out [tokens, H, M]: read weights, times `grow`
    kept_raw, kept_own,  # out [tokens, H, M], [tokens, H]: the sums, for the backward pass
    owners, bounds, tokens, all_tokens, scale,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, M_PAD: tl.constexpr,
    SLICES: tl.constexpr, ACTIVATION: tl.constexpr,
    NUMBER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """score = scale · (grow · raw + w · own), read = activation(score) · grow.

    Without keys the scores are the queries themselves, times scale.
    """
    R: tl.constexpr = H // G
    group, chunk = tl.program_id(0) % G, tl.program_id(0) // G
    _, _, _, start, stop = find_span(chunk, owners, bounds, tokens, C, PACKED)
    rows, slots = tl.arange(0, C), tl.arange(0, M_PAD)
    valid, present = start + rows < stop, slots < M
    mask = valid[:, None] & present[None, :]
    w, grow = write_and_growth(log_forget, write, steep_flags, chunk, group, start, stop, slots,
                               G, M, C, NUMBER)  # fmt: skip
    step = all_tokens.to(tl.int64) * H
    for r in range(R):
        head = group * R + r
        row = start * H + head
        place = row * M + rows[:, None] * (H * M) + slots[None, :]
        raw_CM = sum_slices(raw, place, mask, step * M, SLICES)
        if own is None:
            score = scale * raw_CM.to(NUMBER)
        else:
            own_C = sum_slices(own, row + rows * H, valid, step, SLICES)
            score = scale * (grow * raw_CM + w * own_C[:, None])
        weight = activate(score, present[None, :], ACTIVATION)
        tl.store(read + place, weight * grow, mask=mask)
        if kept_raw is not None:
            tl.store(kept_raw + place, raw_CM, mask=mask)
            tl.store(kept_own + row + rows * H, own_C, mask=valid)


@triton.jit(do_not_specialize=["tokens", "all_tokens"])
def activate_backward_kernel(
    raw, own,  # [slices, tokens, H, M], [slices, tokens, H]: d output against values
    kept_raw, kept_own,  # [tokens, H, M], [tokens, H]: queries against keys; or queries and None
    log_forget, write,  # [tokens, G, M]
    steep_flags,  # [chunks, G]
    read, d_score,  # out [tokens, H, M]: read weights and d scores, times `grow`; or d queries
    read_terms, own_terms,  # out [tokens, G, M], for `gate_gradient_kernel`
    owners, bounds, tokens, all_tokens, scale,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, M_PAD: tl.constexpr,
    SLICES: tl.constexpr, ACTIVATION: tl.constexpr,
    NUMBER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores; what each token reads of others; what it reads of its own write."""
    R: tl.constexpr = H // G
    group, chunk = tl.program_id(0) % G, tl.program_id(0) // G
    _, _, _, start, stop = find_span(chunk, owners, bounds, tokens, C, PACKED)
    rows, slots = tl.arange(0, C), tl.arange(0, M_PAD)
    valid, present = start + rows < stop, slots < M
    mask = valid[:, None] & present[None, :]
    w, grow = write_and_growth(log_forget, write, steep_flags, chunk, group, start, stop, slots,
                               G, M, C, NUMBER)  # fmt: skip
    read_term = tl.zeros([C, M_PAD], NUMBER)
    own_term = tl.zeros([C, M_PAD], NUMBER)
    step = all_tokens.to(tl.int64) * H
    for r in range(R):
        head = group * R + r
        row = start * H + head
        place = row * M + rows[:, None] * (H * M) + slots[None, :]
        raw_CM = tl.load(kept_raw + place, mask=mask, other=0.0)
        if kept_own is None:
            score = scale * raw_CM.to(NUMBER)
        else:
            own_C = tl.load(kept_own + row + rows * H, mask=valid, other=0.0)
            score = scale * (grow * raw_CM + w * own_C[:, None])
        weight = activate(score, present[None, :], ACTIVATION)
        d_raw = sum_slices(raw, place, mask, step * M, SLICES)
        d_own = sum_slices(own, row + rows * H, valid, step, SLICES)
        d_weight = grow * d_raw + w * d_own[:, None]
        d_score_CM = activation_backward(score, weight, d_weight, ACTIVATION) * scale
        own_term += weight * d_own[:, None]
        # Rounded as `write_back_kernel` will see them, so that the terms of a pair are the same.
        weight = (weight * grow).to(read.dtype.element_ty)
        read_term += weight.to(NUMBER) * d_raw
        if kept_own is not None:
            own_term += d_score_CM * own_C[:, None]
            d_score_CM = (d_score_CM * grow).to(read.dtype.element_ty)
            read_term += d_score_CM.to(NUMBER) * raw_CM
        tl.store(read + place, weight, mask=mask)
        tl.store(d_score + place, d_score_CM, mask=mask)
    place = (start * G + group) * M + rows[:, None] * (G * M) + slots[None, :]
    tl.store(read_terms + place, read_term, mask=mask)
    tl.store(own_terms + place, own_term, mask=mask)
