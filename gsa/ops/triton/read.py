"""The two readings of the memory, each a walk over chunks with the memory held on chip.

`contract` reads a number per slot: scores from queries and keys, or gradients of the read weights
from d output and values. `expand` reads a number per column: outputs from read weights and values,
or d queries from d scores and keys. A program walks along a segment of one sequence with some
columns of the memory; what is summed over columns is left in slices, summed by who reads it.

A chunk is walked in one of three ways: hot, where tensor descriptors fit; cold, at the end of a
packed sequence or in an uneven layout; token by token, the recurrence itself, where it is too steep
to factorise.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

import triton
import triton.language as tl

from gsa.ops.triton.common import find_span, span_number
from gsa.ops.triton.memory import (
    add_product,
    border_memory,
    entering,
    even_stride,
    is_border,
    leaving,
    load_rows,
    load_tile,
    next_steep,
    passing,
    product,
    snapshot_row,
    store_memory,
    store_rows,
    store_tile,
)


@triton.jit
def contract_chunk(x_CW, y_CW, lifted_CM, memory, FACTOR: tl.constexpr, OPERAND: tl.constexpr):
    """(scores against other tokens [C, M], x · y of each token [C], the memory after the chunk).

    memory: before the chunk, times exp(S); it comes back without exp(G_C - S).
    """
    C: tl.constexpr = x_CW.shape[0]
    rows = tl.arange(0, C)
    inside = product(x_CW.to(FACTOR), tl.trans(y_CW.to(FACTOR)), memory.dtype)
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], inside, 0.0), 1)
    inside = tl.where(rows[:, None] > rows[None, :], inside, 0.0).to(OPERAND)
    score = product(x_CW.to(OPERAND), tl.trans(memory.to(OPERAND)), memory.dtype)
    score = add_product(score, inside, lifted_CM)
    memory = add_product(memory, tl.trans(lifted_CM), y_CW.to(OPERAND))
    return score, own, memory


@triton.jit(do_not_specialize=["tokens", "batch", "x_stride", "y_stride"])
def contract_kernel(
    x,  # [tokens, H, W] queries or d output, rows x_stride apart
    y,  # [tokens, G, W] keys or values, rows y_stride apart
    lifted, log_forget,  # [tokens, G, M]
    fades, steep_flags,  # [chunks, G, 2, M], [chunks, G]
    initial, starts, final,  # memories [sequences or units, G, M, X]
    snapshots,  # out [borders, G, M, W]
    raw,  # out [slices, tokens, H, M]: scores against other tokens, without `grow`
    own,  # out [slices, tokens, H]: x · y of each token
    x_tiles, y_tiles, lifted_tiles, raw_tiles, snapshot_tiles,  # the same, as descriptors
    owners, bounds, tokens, batch, x_stride, y_stride,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    COLUMN: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, SNAPSHOT: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr, OPERAND: tl.constexpr,
    PACKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """raw_i = memory before the chunk · x_i + Σ_{j<i} (x_i · y_j) lifted_j, own_i = x_i · y_i.

    COLUMN: where the W columns of y begin in a row of the memory.
    """
    SLICES: tl.constexpr = (W + BLOCK - 1) // BLOCK
    part, head = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES % H
    unit = tl.program_id(0) // (SLICES * H)
    group, leads = head // (H // G), head % (H // G) == 0
    owner, begin, end, start, stop = find_span(unit, owners, bounds, tokens, UNIT, PACKED)
    size = tl.maximum(stop - start, 0).to(tl.int32)
    count = (size + C - 1) // C
    rows, slots, cols = tl.arange(0, C), tl.arange(0, M_PAD), part * BLOCK + tl.arange(0, BLOCK)
    wanted, present = cols < W, slots < M
    chunk = span_number(owner, begin, start, tokens, C, PACKED)
    memory = border_memory(starts, initial, (start == begin) | (count == 0), unit * G + group,
                           owner * G + group, X, M, COLUMN + cols, wanted, M_PAD,
                           NUMBER)  # fmt: skip
    row = 0 if PACKED else owner
    origin = 0 if PACKED else begin
    whole = 0 if x_tiles is None else (size // C if PACKED else count)
    if x_tiles is not None:
        x_stride, y_stride = even_stride(x, x_stride), even_stride(y, y_stride)
    x += head * W
    y += group * W
    own += part.to(tl.int64) * batch * tokens * H + head
    position = 0
    while position < count:
        steep = next_steep(steep_flags, chunk * G + group, G, position, count, UNIT // C)
        if x_tiles is not None:
            for i in range(position, tl.minimum(steep, whole)):
                first = start + i * C
                place = (first - origin).to(tl.int32)
                x_CW = load_tile(x_tiles, row, head, place, part * BLOCK, C, BLOCK)
                y_CW = load_tile(y_tiles, row, group, place, part * BLOCK, C, BLOCK)
                lifted_CM = load_tile(lifted_tiles, row, group, place, 0, C, M_PAD)
                flag = (chunk + i) * G + group
                before = (chunk + tl.maximum(i - 1, position)) * G + group
                memory *= passing(fades, flag, before, i > position, M, M_PAD)[:, None]
                score, same, memory = contract_chunk(x_CW, y_CW, lifted_CM, memory, FACTOR, OPERAND)
                store_tile(raw_tiles, score, part * batch + row, head, place, 0, C, M_PAD)
                tl.store(own + (first + rows) * H, same, mask=first + rows < stop)
                if snapshots is not None:
                    if leads & is_border(i, first, end, C, SNAPSHOT):
                        border = snapshot_row(owner, begin, first, tokens, group, G, C, SNAPSHOT,
                                              PACKED)  # fmt: skip
                        fade_out = leaving(fades, flag, M, M_PAD)
                        store_tile(snapshot_tiles, memory * fade_out[:, None], 0, border, 0,
                                   part * BLOCK, M_PAD, BLOCK)  # fmt: skip
            if position < tl.minimum(steep, whole):
                position = tl.minimum(steep, whole)
                fade_out = leaving(fades, (chunk + position - 1) * G + group, M, M_PAD)
                memory *= fade_out[:, None]
        if position < count:
            first = start + position * C
            if position == steep:
                for t in range(first, tl.minimum(first + C, stop)):
                    x_W = tl.load(x + t * x_stride + cols, mask=wanted, other=0.0).to(NUMBER)
                    y_W = tl.load(y + t * y_stride + cols, mask=wanted, other=0.0).to(NUMBER)
                    gate_row = (t * G + group) * M + slots
                    log_f = tl.load(log_forget + gate_row, mask=present, other=0.0).to(NUMBER)
                    w = tl.load(lifted + gate_row, mask=present, other=0.0).to(NUMBER)
                    memory *= tl.exp(log_f)[:, None]
                    score_row = ((part.to(tl.int64) * batch * tokens + t) * H + head) * M + slots
                    tl.store(raw + score_row, tl.sum(memory * x_W[None, :], 1), mask=present)
                    tl.store(own + t * H, tl.sum(x_W * y_W, 0))
                    memory += w[:, None] * y_W[None, :]
            else:
                x_CW = load_rows(x, x_stride, first, stop, cols, wanted, C)
                y_CW = load_rows(y, y_stride, first, stop, cols, wanted, C)
                lifted_CM = load_rows(lifted + group * M, G * M, first, stop, slots, present, C)
                flag = (chunk + position) * G + group
                memory *= entering(fades, flag, M, M_PAD)[:, None]
                score, same, memory = contract_chunk(x_CW, y_CW, lifted_CM, memory, FACTOR, OPERAND)
                memory *= leaving(fades, flag, M, M_PAD)[:, None]
                part_raw = raw + (part.to(tl.int64) * batch * tokens * H + head) * M
                store_rows(part_raw, score, H * M, first, stop, slots, present, C)
                tl.store(own + (first + rows) * H, same, mask=first + rows < stop)
            if snapshots is not None:
                if leads & is_border(position, first, end, C, SNAPSHOT):
                    border = snapshot_row(owner, begin, first, tokens, group, G, C, SNAPSHOT,
                                          PACKED)  # fmt: skip
                    store_memory(snapshots, border, memory, W, M, cols, wanted, M_PAD)
        position += 1
    if final is not None:
        if leads & (stop == end) & ((start < stop) | (start == begin)):
            store_memory(final, owner * G + group, memory, X, M, COLUMN + cols, wanted, M_PAD)


@triton.jit
def expand_chunk(z_CM, y_CW, lifted_CM, memory, careful, OPERAND: tl.constexpr):  # fmt: skip
    """(what a chunk reads [C, W], the memory after it).

    memory: before the chunk, times exp(S); it comes back without exp(G_C - S).
    careful: zeros above the diagonal times a NaN or infinity of y are NaN, in tokens before it.
    Such values are then left out of the product, and the tokens from them on are made NaN.
    """
    C: tl.constexpr = z_CM.shape[0]
    rows = tl.arange(0, C)
    mix = product(z_CM, tl.trans(lifted_CM), memory.dtype)
    mix = tl.where(rows[:, None] >= rows[None, :], mix, 0.0).to(OPERAND)
    y_CW = y_CW.to(OPERAND)
    read = product(z_CM, memory.to(OPERAND), memory.dtype)
    after = add_product(memory, tl.trans(lifted_CM), y_CW)
    if careful:
        broken = tl.where(tl.abs(y_CW.to(memory.dtype)) < float("inf"), 0, 1)
        y_CW = tl.where(broken == 0, y_CW, 0.0).to(OPERAND)
        read = tl.where(tl.cumsum(broken, 0) > 0, float("nan"), read)
    read = add_product(read, mix, y_CW)
    return read, after


@triton.jit(do_not_specialize=["tokens", "y_stride"])
def expand_kernel(
    z,  # [tokens, H, M] read weights or d scores, times `grow`
    y,  # [tokens, G, W] values or keys, rows y_stride apart
    lifted, log_forget,  # [tokens, G, M]
    fades, steep_flags,  # [chunks, G, 2, M], [chunks, G]
    initial, starts, final,  # memories [sequences or units, G, M, X]
    snapshots,  # out [borders, G, M, W]
    out,  # out [tokens, H, W] output or d queries
    z_tiles, y_tiles, lifted_tiles, out_tiles, snapshot_tiles,  # the same, as descriptors
    owners, bounds, tokens, y_stride,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    COLUMN: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, SNAPSHOT: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr,
    PACKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """out_i = z_i · memory before the chunk + Σ_{j<=i} (z_i · lifted_j) y_j.

    A value that is not finite is in the memory at the end: that is looked at once, and if so the
    segment is done again with care (`expand_chunk`).
    """
    SLICES: tl.constexpr = (W + BLOCK - 1) // BLOCK
    part, head = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES % H
    unit = tl.program_id(0) // (SLICES * H)
    group, leads = head // (H // G), head % (H // G) == 0
    owner, begin, end, start, stop = find_span(unit, owners, bounds, tokens, UNIT, PACKED)
    size = tl.maximum(stop - start, 0).to(tl.int32)
    count = (size + C - 1) // C
    slots, cols = tl.arange(0, M_PAD), part * BLOCK + tl.arange(0, BLOCK)
    wanted, present = cols < W, slots < M
    chunk = span_number(owner, begin, start, tokens, C, PACKED)
    row = 0 if PACKED else owner
    origin = 0 if PACKED else begin
    if y_tiles is not None:
        y_stride = even_stride(y, y_stride)
    y += group * W
    z += head * M
    out += head * W
    memory = tl.zeros([M_PAD, BLOCK], NUMBER)
    careful = 0
    while careful < 2:
        memory = border_memory(starts, initial, (start == begin) | (count == 0), unit * G + group,
                               owner * G + group, X, M, COLUMN + cols, wanted, M_PAD,
                               NUMBER)  # fmt: skip
        whole = 0 if y_tiles is None else (size // C if PACKED else count)
        whole = tl.where(careful == 0, whole, 0)
        position = 0
        while position < count:
            steep = next_steep(steep_flags, chunk * G + group, G, position, count, UNIT // C)
            if y_tiles is not None:
                for i in range(position, tl.minimum(steep, whole)):
                    first = start + i * C
                    place = (first - origin).to(tl.int32)
                    y_CW = load_tile(y_tiles, row, group, place, part * BLOCK, C, BLOCK)
                    z_CM = load_tile(z_tiles, row, head, place, 0, C, M_PAD)
                    lifted_CM = load_tile(lifted_tiles, row, group, place, 0, C, M_PAD)
                    flag = (chunk + i) * G + group
                    before = (chunk + tl.maximum(i - 1, position)) * G + group
                    memory *= passing(fades, flag, before, i > position, M, M_PAD)[:, None]
                    read, memory = expand_chunk(z_CM, y_CW, lifted_CM, memory, False, OPERAND)
                    store_tile(out_tiles, read, row, head, place, part * BLOCK, C, BLOCK)
                    if snapshots is not None:
                        if leads & is_border(i, first, end, C, SNAPSHOT):
                            border = snapshot_row(owner, begin, first, tokens, group, G, C,
                                                  SNAPSHOT, PACKED)  # fmt: skip
                            fade_out = leaving(fades, flag, M, M_PAD)
                            store_tile(snapshot_tiles, memory * fade_out[:, None], 0, border, 0,
                                       part * BLOCK, M_PAD, BLOCK)  # fmt: skip
                if position < tl.minimum(steep, whole):
                    position = tl.minimum(steep, whole)
                    fade_out = leaving(fades, (chunk + position - 1) * G + group, M, M_PAD)
                    memory *= fade_out[:, None]
            if position < count:
                first = start + position * C
                if position == steep:
                    for t in range(first, tl.minimum(first + C, stop)):
                        y_W = tl.load(y + t * y_stride + cols, mask=wanted, other=0.0)
                        gate_row = (t * G + group) * M + slots
                        log_f = tl.load(log_forget + gate_row, mask=present, other=0.0)
                        w = tl.load(lifted + gate_row, mask=present, other=0.0).to(NUMBER)
                        z_M = tl.load(z + t * (H * M) + slots, mask=present, other=0.0)
                        memory *= tl.exp(log_f.to(NUMBER))[:, None]
                        memory += w[:, None] * y_W.to(NUMBER)[None, :]
                        read_W = tl.sum(z_M.to(NUMBER)[:, None] * memory, 0)
                        tl.store(out + t * (H * W) + cols, read_W, mask=wanted)
                else:
                    y_CW = load_rows(y, y_stride, first, stop, cols, wanted, C)
                    z_CM = load_rows(z, H * M, first, stop, slots, present, C)
                    lifted_CM = load_rows(lifted + group * M, G * M, first, stop, slots, present, C)
                    flag = (chunk + position) * G + group
                    memory *= entering(fades, flag, M, M_PAD)[:, None]
                    read, memory = expand_chunk(z_CM, y_CW, lifted_CM, memory, careful > 0, OPERAND)
                    memory *= leaving(fades, flag, M, M_PAD)[:, None]
                    store_rows(out, read, H * W, first, stop, cols, wanted, C)
                if snapshots is not None:
                    if leads & is_border(position, first, end, C, SNAPSHOT):
                        border = snapshot_row(owner, begin, first, tokens, group, G, C, SNAPSHOT,
                                              PACKED)  # fmt: skip
                        store_memory(snapshots, border, memory, W, M, cols, wanted, M_PAD)
            position += 1
        broken = tl.max(tl.max(tl.where(tl.abs(memory) < float("inf"), 0, 1), 1), 0)
        careful = tl.where(broken == 0, 2, careful + 1)
    if final is not None:
        if leads & (stop == end) & ((start < stop) | (start == begin)):
            store_memory(final, owner * G + group, memory, X, M, COLUMN + cols, wanted, M_PAD)
