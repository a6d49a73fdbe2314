"""The write side: what tokens left in the memory, and backwards what became of it.

`write_back` walks from the end to the beginning with the gradient of the memory on chip, keys and
values alike. `scan` and `combine` find the memory (or its gradient) at the borders of segments, so
that the segments of a long sequence can be walked side by side.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

import triton
import triton.language as tl

from gsa.ops.triton.common import find_span, span_number
from gsa.ops.triton.memory import (
    border_memory,
    is_border,
    load_fades,
    load_memory,
    load_rows,
    load_tile,
    next_steep,
    snapshot_row,
    store_memory,
    store_rows,
    store_tile,
)


@triton.jit
def read_inside(x_CW, z_CM, y_CW, d_lifted_CM, FACTOR: tl.constexpr, OPERAND: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """d_lifted_j with Σ_{i>j} (x_i · y_j) z_i added."""
    rows = tl.arange(0, x_CW.shape[0])
    inside = tl.dot(y_CW.to(FACTOR), tl.trans(x_CW.to(FACTOR)), input_precision=PRECISION)
    inside = tl.where(rows[:, None] < rows[None, :], inside, 0.0).to(OPERAND)
    return tl.dot(inside, z_CM, d_lifted_CM, input_precision=PRECISION)


@triton.jit
def mixed_inside(x_CW, z_CM, lifted_CM, d_y_CW, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """d_y_j with Σ_{i>=j} (z_i · lifted_j) x_i added."""
    rows = tl.arange(0, x_CW.shape[0])
    mix = tl.dot(lifted_CM, tl.trans(z_CM), input_precision=PRECISION)
    mix = tl.where(rows[:, None] <= rows[None, :], mix, 0.0).to(OPERAND)
    return tl.dot(mix, x_CW.to(OPERAND), d_y_CW, input_precision=PRECISION)


@triton.jit
def write_back_walk(
    program,
    z,  # [tokens, H, M] read weights or d scores, times `grow`
    x,  # [tokens, H, W] d output or queries, rows x_stride apart
    y,  # [tokens, G, W] values or keys, rows y_stride apart
    lifted, log_forget,  # [tokens, G, M]
    fades, steep_flags,  # [chunks, G, 2, M], [chunks, G]
    d_final, ends, d_initial,  # gradients of memories [sequences or units, G, M, X]
    snapshots, final,  # memories [borders, G, M, W], [sequences, G, M, X]
    d_y,  # out [tokens, G, W]
    d_lifted,  # out [slices, tokens, G, M] fp32, own token excluded
    crossing,  # out [slices, spans, G, M] fp32: rows of memory ⊙ d memory after each span
    z_tiles, x_tiles, y_tiles, lifted_tiles, d_y_tiles, d_lifted_tiles,
    owners, bounds, tokens, batch, spans, x_stride, y_stride,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    COLUMN: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, SNAPSHOT: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """d_y_j = lifted_j · D + Σ_{i>=j} (z_i · lifted_j) x_i
    d_lifted_j = D y_j + Σ_{i>j} (x_i · y_j) z_i

    D: gradient of the memory after the chunk, times exp(G_C - S). After the chunk comes
    exp(S) (D + Σ_i z_i ⊗ x_i), the gradient of the memory before it.
    """
    SLICES: tl.constexpr = (W + BLOCK - 1) // BLOCK
    R: tl.constexpr = H // G
    part, group, unit = program % SLICES, program // SLICES % G, program // (SLICES * G)
    owner, begin, end, start, stop = find_span(unit, owners, bounds, tokens, UNIT, PACKED)
    size = tl.maximum(stop - start, 0).to(tl.int32)
    count = (size + C - 1) // C
    slots, cols = tl.arange(0, M_PAD), part * BLOCK + tl.arange(0, BLOCK)
    wanted, present = cols < W, slots < M
    chunk = span_number(owner, begin, start, tokens, C, PACKED)
    d_memory = border_memory(ends, d_final, (stop == end) | (count == 0), unit * G + group,
                             owner * G + group, X, M, COLUMN + cols, wanted, M_PAD)  # fmt: skip
    row = 0 if PACKED else owner
    origin = 0 if PACKED else begin
    # Chunks are counted from the end; only the last of a sequence can be ragged.
    ragged = count if x_tiles is None else ((size % C + C - 1) // C if PACKED else 0)
    span = span_number(owner, begin, start, tokens, SNAPSHOT, PACKED)
    crossing += ((part * spans + span).to(tl.int64) * G + group) * M + slots
    if (stop == end) & (count > 0):
        after = load_memory(final, owner * G + group, X, M, COLUMN + cols, wanted, M_PAD)
        last_span = (count - 1) // (SNAPSHOT // C)
        tl.store(crossing + last_span * (G * M), tl.sum(after * d_memory, 1), mask=present)
    y += group * W
    d_y += group * W
    d_lifted += (part.to(tl.int64) * batch * tokens * G + group) * M
    position = 0
    while position < count:
        last_flag = (chunk + count - 1) * G + group
        steep = next_steep(steep_flags, last_flag, -G, position, count, UNIT // C)
        i = count - 1 - position
        first = start + i * C
        if snapshots is not None:
            if is_border(i, first, end, C, SNAPSHOT):
                border = snapshot_row(owner, begin, first, tokens, group, G, C, SNAPSHOT, PACKED)
                after = load_memory(snapshots, border, W, M, cols, wanted, M_PAD)
                sums = tl.sum(after * d_memory, 1)
                tl.store(crossing + i // (SNAPSHOT // C) * (G * M), sums, mask=present)
        if position == steep:
            wide = d_memory.to(WIDE)
            many = (tl.minimum(first + C, stop) - first).to(tl.int32)
            for back in range(many):
                t = first + many - 1 - back
                y_W = tl.load(y + t * y_stride + cols, mask=wanted, other=0.0).to(WIDE)
                gate_row = (t * G + group) * M + slots
                log_f = tl.load(log_forget + gate_row, mask=present, other=0.0).to(WIDE)
                w = tl.load(lifted + gate_row, mask=present, other=0.0).to(WIDE)
                d_lifted_M = tl.sum(wide * y_W[None, :], 1)
                tl.store(d_lifted + t * (G * M) + slots, d_lifted_M, mask=present)
                for r in range(R):
                    head = group * R + r
                    x_W = tl.load(x + t * x_stride + head * W + cols, mask=wanted, other=0.0)
                    z_M = tl.load(z + (t * H + head) * M + slots, mask=present, other=0.0)
                    wide += z_M.to(WIDE)[:, None] * x_W.to(WIDE)[None, :]
                d_y_W = tl.sum(w[:, None] * wide, 0)
                tl.store(d_y + t * (G * W) + cols, d_y_W, mask=wanted)
                wide *= tl.exp(log_f)[:, None]
            d_memory = wide.to(tl.float32)
            position += 1
        elif position < ragged:
            y_CW = load_rows(y, y_stride, first, stop, cols, wanted, C)
            lifted_CM = load_rows(lifted + group * M, G * M, first, stop, slots, present, C)
            fade_in, fade_out = load_fades(fades, (chunk + i) * G + group, M, M_PAD)
            d_memory *= fade_out[:, None]
            after = d_memory.to(OPERAND)
            d_y_CW = tl.dot(lifted_CM, after, input_precision=PRECISION)
            d_lifted_CM = tl.dot(y_CW.to(OPERAND), tl.trans(after), input_precision=PRECISION)
            for r in range(R):
                head = group * R + r
                x_CW = load_rows(x + head * W, x_stride, first, stop, cols, wanted, C)
                z_CM = load_rows(z + head * M, H * M, first, stop, slots, present, C)
                d_lifted_CM = read_inside(x_CW, z_CM, y_CW, d_lifted_CM, FACTOR, OPERAND, PRECISION)
                d_y_CW = mixed_inside(x_CW, z_CM, lifted_CM, d_y_CW, OPERAND, PRECISION)
                d_memory = tl.dot(
                    tl.trans(z_CM), x_CW.to(OPERAND), d_memory, input_precision=PRECISION
                )
            d_memory *= fade_in[:, None]
            store_rows(d_y, d_y_CW, G * W, first, stop, cols, wanted, C)
            store_rows(d_lifted, d_lifted_CM, G * M, first, stop, slots, present, C)
            position += 1
        elif x_tiles is not None:
            # A run ends before the next border, which leaves nothing but products in the loop.
            halt = tl.minimum(steep, count - i // (SNAPSHOT // C) * (SNAPSHOT // C))
            for place_back in range(position, halt):
                place = (start - origin).to(tl.int32) + (count - 1 - place_back) * C
                y_CW = load_tile(y_tiles, row, group, place, part * BLOCK, C, BLOCK)
                lifted_CM = load_tile(lifted_tiles, row, group, place, 0, C, M_PAD)
                flag = (chunk + count - 1 - place_back) * G + group
                fade_in, fade_out = load_fades(fades, flag, M, M_PAD)
                d_memory *= fade_out[:, None]
                after = d_memory.to(OPERAND)
                # One result after the other, each stored at once: they would not fit side by side.
                d_lifted_CM = tl.dot(y_CW.to(OPERAND), tl.trans(after), input_precision=PRECISION)
                for r in tl.static_range(R):
                    x_CW = load_tile(x_tiles, row, group * R + r, place, part * BLOCK, C, BLOCK)
                    z_CM = load_tile(z_tiles, row, group * R + r, place, 0, C, M_PAD)
                    d_lifted_CM = read_inside(
                        x_CW, z_CM, y_CW, d_lifted_CM, FACTOR, OPERAND, PRECISION
                    )
                    if r == 0:
                        d_y_CW = tl.dot(lifted_CM, after, input_precision=PRECISION)
                    if r == R - 1:
                        store_tile(d_lifted_tiles, d_lifted_CM, part * batch + row, group, place, 0,
                                   C, M_PAD)  # fmt: skip
                    d_y_CW = mixed_inside(x_CW, z_CM, lifted_CM, d_y_CW, OPERAND, PRECISION)
                    d_memory = tl.dot(
                        tl.trans(z_CM), x_CW.to(OPERAND), d_memory, input_precision=PRECISION
                    )
                d_memory *= fade_in[:, None]
                store_tile(d_y_tiles, d_y_CW, row, group, place, part * BLOCK, C, BLOCK)
            position = halt
    if d_initial is not None:
        if start == begin:
            store_memory(d_initial, owner * G + group, d_memory, X, M, COLUMN + cols, wanted,
                         M_PAD)  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "batch", "spans", "value_programs"])
def write_back_kernel(
    key_z, key_x, key_y, key_d_y, key_snapshots, key_d_lifted, key_crossing,
    key_z_tiles, key_x_tiles, key_y_tiles, key_d_y_tiles, key_d_lifted_tiles,
    value_z, value_x, value_y, value_d_y, value_snapshots, value_d_lifted, value_crossing,
    value_z_tiles, value_x_tiles, value_y_tiles, value_d_y_tiles, value_d_lifted_tiles,
    lifted, log_forget, fades, steep_flags, d_final, ends, d_initial, final,
    lifted_tiles, owners, bounds, tokens, batch, spans, value_programs,
    key_x_stride, key_y_stride, value_x_stride, value_y_stride,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, UNIT: tl.constexpr, SNAPSHOT: tl.constexpr, M_PAD: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, FACTOR: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`write_back_walk` over values and keys side by side, to fill a GPU twice.

    A walk waits for one product after another; a second one on the same processor fills the gaps.
    """
    program = tl.program_id(0)
    if program < value_programs:
        write_back_walk(
            program, value_z, value_x, value_y, lifted, log_forget, fades, steep_flags, d_final,
            ends, d_initial, value_snapshots, final, value_d_y, value_d_lifted, value_crossing,
            value_z_tiles, value_x_tiles, value_y_tiles, lifted_tiles, value_d_y_tiles,
            value_d_lifted_tiles, owners, bounds, tokens, batch, spans, value_x_stride,
            value_y_stride, H, G, M, V, K + V, K, C, UNIT, SNAPSHOT, M_PAD, VALUE_BLOCK, FACTOR,
            OPERAND, PRECISION, PACKED, WIDE,
        )  # fmt: skip
    else:
        write_back_walk(
            program - value_programs, key_z, key_x, key_y, lifted, log_forget, fades, steep_flags,
            d_final, ends, d_initial, key_snapshots, final, key_d_y, key_d_lifted, key_crossing,
            key_z_tiles, key_x_tiles, key_y_tiles, lifted_tiles, key_d_y_tiles,
            key_d_lifted_tiles, owners, bounds, tokens, batch, spans, key_x_stride,
            key_y_stride, H, G, M, K, K + V, 0, C, UNIT, SNAPSHOT, M_PAD, KEY_BLOCK, FACTOR,
            OPERAND, PRECISION, PACKED, WIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def scan_kernel(
    u,  # [tokens, G · R, M] `lifted` (R = 1), or z backwards
    y,  # [tokens, G · R, W] keys or values, or x backwards; rows y_stride apart
    log_forget,  # [tokens, G, M]
    fades, steep_flags,  # [chunks, G, 2, M], [chunks, G]
    local,  # out [units, G, M, X] fp32: what a segment adds to the memory after it (before it)
    decays,  # out [units, G, M] fp32: what it leaves of the memory before it (after it)
    u_tiles, y_tiles,
    owners, bounds, tokens, y_stride,
    R: tl.constexpr, G: tl.constexpr, M: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    COLUMN: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, M_PAD: tl.constexpr,
    BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Walks a segment from an empty memory (BACKWARD: from no gradient behind it)."""
    SLICES: tl.constexpr = (W + BLOCK - 1) // BLOCK
    part, group = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES % G
    unit = tl.program_id(0) // (SLICES * G)
    owner, begin, end, start, stop = find_span(unit, owners, bounds, tokens, UNIT, PACKED)
    # Nothing lies beyond the outermost segment that would want to know.
    needed = (start > begin if BACKWARD else stop < end) & (start < stop)
    size = tl.where(needed, stop - start, 0).to(tl.int32)
    count = (size + C - 1) // C
    slots, cols = tl.arange(0, M_PAD), part * BLOCK + tl.arange(0, BLOCK)
    wanted, present = cols < W, slots < M
    chunk = span_number(owner, begin, start, tokens, C, PACKED)
    row = 0 if PACKED else owner
    origin = 0 if PACKED else begin
    # Places are counted from the end if BACKWARD; only the last chunk of a sequence can be ragged.
    ragged = count if y_tiles is None else (
        (size % C + C - 1) // C if BACKWARD and PACKED else 0
    )  # fmt: skip
    memory = tl.zeros([M_PAD, BLOCK], tl.float32)
    decay = tl.full([M_PAD], 1.0, tl.float32)
    flag = (chunk + count - 1 if BACKWARD else chunk) * G + group
    position = 0
    while position < count:
        steep = next_steep(steep_flags, flag, -G if BACKWARD else G, position, count, UNIT // C)
        if y_tiles is not None:
            for place_back in range(position, tl.where(position < ragged, position, steep)):
                i = count - 1 - place_back if BACKWARD else place_back
                place = (start + i * C - origin).to(tl.int32)
                fade_in, fade_out = load_fades(fades, (chunk + i) * G + group, M, M_PAD)
                memory *= fade_out[:, None] if BACKWARD else fade_in[:, None]
                for r in tl.static_range(R):
                    y_CW = load_tile(y_tiles, row, group * R + r, place, part * BLOCK, C, BLOCK)
                    u_CM = load_tile(u_tiles, row, group * R + r, place, 0, C, M_PAD)
                    memory = tl.dot(
                        tl.trans(u_CM), y_CW.to(OPERAND), memory, input_precision=PRECISION
                    )
                memory *= fade_in[:, None] if BACKWARD else fade_out[:, None]
                decay *= fade_in * fade_out
            position = tl.where(position < ragged, position, tl.maximum(position, steep))
        if position < count:
            i = count - 1 - position if BACKWARD else position
            first = start + i * C
            if position == steep:
                wide, wide_decay = memory.to(WIDE), decay.to(WIDE)
                many = (tl.minimum(first + C, stop) - first).to(tl.int32)
                for step in range(many):
                    t = first + many - 1 - step if BACKWARD else first + step
                    gate_row = (t * G + group) * M + slots
                    log_f = tl.load(log_forget + gate_row, mask=present, other=0.0).to(WIDE)
                    if not BACKWARD:
                        wide *= tl.exp(log_f)[:, None]
                    for r in range(R):
                        head = group * R + r
                        y_W = tl.load(y + t * y_stride + head * W + cols, mask=wanted, other=0.0)
                        u_M = tl.load(u + (t * (G * R) + head) * M + slots, mask=present, other=0.0)
                        wide += u_M.to(WIDE)[:, None] * y_W.to(WIDE)[None, :]
                    if BACKWARD:
                        wide *= tl.exp(log_f)[:, None]
                    wide_decay *= tl.exp(log_f)
                memory, decay = wide.to(tl.float32), wide_decay.to(tl.float32)
            else:
                fade_in, fade_out = load_fades(fades, (chunk + i) * G + group, M, M_PAD)
                memory *= fade_out[:, None] if BACKWARD else fade_in[:, None]
                for r in range(R):
                    head = group * R + r
                    y_CW = load_rows(y + head * W, y_stride, first, stop, cols, wanted, C)
                    u_CM = load_rows(u + head * M, G * R * M, first, stop, slots, present, C)
                    memory = tl.dot(
                        tl.trans(u_CM), y_CW.to(OPERAND), memory, input_precision=PRECISION
                    )
                memory *= fade_in[:, None] if BACKWARD else fade_out[:, None]
                decay *= fade_in * fade_out
        position += 1
    if needed:
        store_memory(local, unit * G + group, memory, X, M, COLUMN + cols, wanted, M_PAD)
        if part == 0:
            tl.store(decays + (unit.to(tl.int64) * G + group) * M + slots, decay, mask=present)


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    outer,  # [sequences, G, M, X] initial memory, or d final backwards
    local,  # in and out [units, G, M, X]: becomes the memory before (BACKWARD: after) each segment
    decays,  # [units, G, M]
    bounds, tokens,
    G: tl.constexpr, M: tl.constexpr, X: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Walks over the segments of a sequence, one block of memory numbers a program."""
    BLOCKS: tl.constexpr = (M * X + BLOCK - 1) // BLOCK
    block, head = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS % G
    owner = tl.program_id(0) // (BLOCKS * G)
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(bounds + owner).to(tl.int64), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(bounds + owner + 1).to(tl.int64), begin), tokens)
        unit = (begin // UNIT + owner).to(tl.int32)
        units = ((end - begin + UNIT - 1) // UNIT).to(tl.int32)
    else:
        units = (tokens + UNIT - 1) // UNIT
        unit = owner * tl.maximum(units, 1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    mask = place < M * X
    memory = tl.zeros([BLOCK], tl.float32)
    if outer is not None:
        memory = tl.load(outer + (owner.to(tl.int64) * G + head) * (M * X) + place, mask=mask)
    here = (unit + units - 1 if BACKWARD else unit).to(tl.int64)
    # A sequence without tokens has no segment to look at.
    added = tl.load(local + (here * G + head) * (M * X) + place, mask=mask & (units > 0))
    for _ in range(units - 1):
        there = here - 1 if BACKWARD else here + 1
        decay = tl.load(decays + (here * G + head) * M + place // X, mask=mask)
        memory = memory * decay + added
        spot = local + (there * G + head) * (M * X) + place
        added = tl.load(spot, mask=mask)
        tl.store(spot, memory, mask=mask)
        here = there
