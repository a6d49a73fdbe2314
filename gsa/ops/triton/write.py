"""The write side: what tokens left in the memory, and backwards what became of it.

`write_back` walks from the end to the beginning with the gradient of the memory on chip. `scan` and
`combine` find the memory (or its gradient) at the borders of segments, so that the segments of a
long sequence can be walked side by side. Both walk keys and values in one launch, which fills a GPU
twice: a walk waits for one product after another, and a second one on the same processor fills the
gaps.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

import triton
import triton.language as tl

from gsa.ops.triton.common import FEW_HEADS, find_span, span_number
from gsa.ops.triton.memory import (
    add_product,
    border_memory,
    entering,
    even_stride,
    leaving,
    load_memory,
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
def read_inside(x_CW, z_CM, y_CW, d_lifted_CM, FACTOR: tl.constexpr, OPERAND: tl.constexpr):
    """d_lifted_j with Σ_{i>j} (x_i · y_j) z_i added."""
    rows = tl.arange(0, x_CW.shape[0])
    inside = product(y_CW.to(FACTOR), tl.trans(x_CW.to(FACTOR)), d_lifted_CM.dtype)
    inside = tl.where(rows[:, None] < rows[None, :], inside, 0.0).to(OPERAND)
    return add_product(d_lifted_CM, inside, z_CM)


@triton.jit
def mixed_inside(x_CW, z_CM, lifted_CM, d_y_CW, OPERAND: tl.constexpr):
    """d_y_j with Σ_{i>=j} (z_i · lifted_j) x_i added."""
    rows = tl.arange(0, x_CW.shape[0])
    mix = product(lifted_CM, tl.trans(z_CM), d_y_CW.dtype)
    mix = tl.where(rows[:, None] <= rows[None, :], mix, 0.0).to(OPERAND)
    return add_product(d_y_CW, mix, x_CW.to(OPERAND))


@triton.jit
def cross(crossing, d_memory, i, start, begin, owner, group, snapshots, initial, tokens, cols,
          wanted, COLUMN: tl.constexpr, G: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
          X: tl.constexpr, C: tl.constexpr, SNAPSHOT: tl.constexpr, M_PAD: tl.constexpr,
          PACKED: tl.constexpr, NUMBER: tl.constexpr):  # fmt: skip
    """Stores rows of memory ⊙ d memory at the border before chunk i, where a span begins."""
    slots = tl.arange(0, M_PAD)
    first = start + i * C
    memory = tl.zeros(d_memory.shape, NUMBER)
    if first > begin:
        if snapshots is not None:
            row = snapshot_row(owner, begin, first - C, tokens, group, G, C, SNAPSHOT, PACKED)
            memory = load_memory(snapshots, row, W, M, cols, wanted, M_PAD, NUMBER)
    elif initial is not None:
        memory = load_memory(initial, owner * G + group, X, M, COLUMN + cols, wanted, M_PAD, NUMBER)
    sums = tl.sum(memory * d_memory, 1)
    border = crossing + i * C // SNAPSHOT * (2 * G * M)
    tl.store(border, sums, mask=slots < M)
    if first > begin:
        tl.store(border - G * M, sums, mask=slots < M)  # the end of the span before


@triton.jit
def write_back_walk(
    program,
    slice,  # number of the first slice of this side among those of d_lifted and crossing
    z,  # [tokens, H, M] read weights or d scores, times `grow`
    x,  # [tokens, H, W] d output or queries, rows x_stride apart
    y,  # [tokens, G, W] values or keys, rows y_stride apart
    lifted, log_forget,  # [tokens, G, M]
    fades, steep_flags,  # [chunks, G, 2, M], [chunks, G]
    d_final, ends, d_initial,  # gradients of memories [sequences or units, G, M, X]
    snapshots, initial, final,  # memories [borders, G, M, W], [sequences, G, M, X]
    d_y,  # out [tokens, G, W]
    d_lifted,  # out [slices, tokens, G, M], own token excluded
    crossing,  # out [slices, spans, 2, G, M]: rows of memory ⊙ d memory before and after spans
    z_tiles, x_tiles, y_tiles, lifted_tiles, d_y_tiles, d_lifted_tiles,
    owners, bounds, tokens, batch, spans, x_stride, y_stride,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    COLUMN: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, SNAPSHOT: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr, OPERAND: tl.constexpr,
    PACKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """d_y_j = lifted_j · D + Σ_{i>=j} (z_i · lifted_j) x_i
    d_lifted_j = D y_j + Σ_{i>j} (x_i · y_j) z_i

    D: gradient of the memory after the chunk, times exp(G_C - S). After the chunk comes
    exp(S) (D + Σ_i z_i ⊗ x_i), the gradient of the memory before it.
    """
    SLICES: tl.constexpr = (W + BLOCK - 1) // BLOCK
    PER_SPAN: tl.constexpr = SNAPSHOT // C
    R: tl.constexpr = H // G
    part, group, unit = program % SLICES, program // SLICES % G, program // (SLICES * G)
    owner, begin, end, start, stop = find_span(unit, owners, bounds, tokens, UNIT, PACKED)
    size = tl.maximum(stop - start, 0).to(tl.int32)
    count = (size + C - 1) // C
    slots, cols = tl.arange(0, M_PAD), part * BLOCK + tl.arange(0, BLOCK)
    wanted, present = cols < W, slots < M
    chunk = span_number(owner, begin, start, tokens, C, PACKED)
    d_memory = border_memory(ends, d_final, (stop == end) | (count == 0), unit * G + group,
                             owner * G + group, X, M, COLUMN + cols, wanted, M_PAD,
                             NUMBER)  # fmt: skip
    row = 0 if PACKED else owner
    origin = 0 if PACKED else begin
    # Chunks are counted from the end; only the last of a sequence can be ragged.
    ragged = count if x_tiles is None else ((size % C + C - 1) // C if PACKED else 0)
    span = span_number(owner, begin, start, tokens, SNAPSHOT, PACKED)
    if x_tiles is not None:
        x_stride, y_stride = even_stride(x, x_stride), even_stride(y, y_stride)
    slice += part
    crossing += ((slice * spans + span).to(tl.int64) * (2 * G) + group) * M + slots
    if (stop == end) & (count > 0):
        after = load_memory(final, owner * G + group, X, M, COLUMN + cols, wanted, M_PAD, NUMBER)
        last = (count - 1) // PER_SPAN * 2 + 1
        tl.store(crossing + last * (G * M), tl.sum(after * d_memory, 1), mask=present)
    y += group * W
    d_y += group * W
    d_lifted += (slice.to(tl.int64) * batch * tokens * G + group) * M
    position = 0
    while position < count:
        last_flag = (chunk + count - 1) * G + group
        steep = next_steep(steep_flags, last_flag, -G, position, count, UNIT // C)
        i = count - 1 - position
        first = start + i * C
        singly = (position == steep) | (position < ragged)
        if position == steep:
            many = (tl.minimum(first + C, stop) - first).to(tl.int32)
            for back in range(many):
                t = first + many - 1 - back
                y_W = tl.load(y + t * y_stride + cols, mask=wanted, other=0.0).to(NUMBER)
                gate_row = (t * G + group) * M + slots
                log_f = tl.load(log_forget + gate_row, mask=present, other=0.0).to(NUMBER)
                w = tl.load(lifted + gate_row, mask=present, other=0.0).to(NUMBER)
                d_lifted_M = tl.sum(d_memory * y_W[None, :], 1)
                tl.store(d_lifted + t * (G * M) + slots, d_lifted_M, mask=present)
                for r in range(R):
                    head = group * R + r
                    x_W = tl.load(x + t * x_stride + head * W + cols, mask=wanted, other=0.0)
                    z_M = tl.load(z + (t * H + head) * M + slots, mask=present, other=0.0)
                    d_memory += z_M.to(NUMBER)[:, None] * x_W.to(NUMBER)[None, :]
                d_y_W = tl.sum(w[:, None] * d_memory, 0)
                tl.store(d_y + t * (G * W) + cols, d_y_W, mask=wanted)
                d_memory *= tl.exp(log_f)[:, None]
            position += 1
        elif position < ragged:
            y_CW = load_rows(y, y_stride, first, stop, cols, wanted, C)
            lifted_CM = load_rows(lifted + group * M, G * M, first, stop, slots, present, C)
            flag = (chunk + i) * G + group
            d_memory *= entering(fades, flag, M, M_PAD, True)[:, None]
            after = d_memory.to(OPERAND)
            d_y_CW = product(lifted_CM, after, NUMBER)
            d_lifted_CM = product(y_CW.to(OPERAND), tl.trans(after), NUMBER)
            for r in range(R):
                head = group * R + r
                x_CW = load_rows(x + head * W, x_stride, first, stop, cols, wanted, C)
                z_CM = load_rows(z + head * M, H * M, first, stop, slots, present, C)
                d_lifted_CM = read_inside(x_CW, z_CM, y_CW, d_lifted_CM, FACTOR, OPERAND)
                d_y_CW = mixed_inside(x_CW, z_CM, lifted_CM, d_y_CW, OPERAND)
                d_memory = add_product(d_memory, tl.trans(z_CM), x_CW.to(OPERAND))
            d_memory *= leaving(fades, flag, M, M_PAD, True)[:, None]
            store_rows(d_y, d_y_CW, G * W, first, stop, cols, wanted, C)
            store_rows(d_lifted, d_lifted_CM, G * M, first, stop, slots, present, C)
            position += 1
        elif x_tiles is not None:
            for place_back in range(position, steep):
                at = count - 1 - place_back
                place = (start - origin).to(tl.int32) + at * C
                y_CW = load_tile(y_tiles, row, group, place, part * BLOCK, C, BLOCK)
                lifted_CM = load_tile(lifted_tiles, row, group, place, 0, C, M_PAD)
                flag = (chunk + at) * G + group
                follows = place_back > position
                before = flag + tl.where(follows, G, 0)
                d_memory *= passing(fades, flag, before, follows, M, M_PAD, True)[:, None]
                after = d_memory.to(OPERAND)
                d_lifted_CM = product(y_CW.to(OPERAND), tl.trans(after), NUMBER)
                if R <= FEW_HEADS:
                    # One result after the other, each stored at once: they would not fit side by
                    # side.
                    for r in tl.static_range(R):
                        x_CW = load_tile(x_tiles, row, group * R + r, place, part * BLOCK, C, BLOCK)
                        z_CM = load_tile(z_tiles, row, group * R + r, place, 0, C, M_PAD)
                        d_lifted_CM = read_inside(x_CW, z_CM, y_CW, d_lifted_CM, FACTOR, OPERAND)
                        if r == 0:
                            d_y_CW = product(lifted_CM, after, NUMBER)
                        if r == R - 1:
                            store_tile(d_lifted_tiles, d_lifted_CM, slice * batch + row, group,
                                       place, 0, C, M_PAD)  # fmt: skip
                        d_y_CW = mixed_inside(x_CW, z_CM, lifted_CM, d_y_CW, OPERAND)
                        d_memory = add_product(d_memory, tl.trans(z_CM), x_CW.to(OPERAND))
                else:
                    d_y_CW = product(lifted_CM, after, NUMBER)
                    for r in range(R):
                        x_CW = load_tile(x_tiles, row, group * R + r, place, part * BLOCK, C, BLOCK)
                        z_CM = load_tile(z_tiles, row, group * R + r, place, 0, C, M_PAD)
                        d_lifted_CM = read_inside(x_CW, z_CM, y_CW, d_lifted_CM, FACTOR, OPERAND)
                        d_y_CW = mixed_inside(x_CW, z_CM, lifted_CM, d_y_CW, OPERAND)
                        d_memory = add_product(d_memory, tl.trans(z_CM), x_CW.to(OPERAND))
                    store_tile(d_lifted_tiles, d_lifted_CM, slice * batch + row, group, place, 0, C,
                               M_PAD)  # fmt: skip
                store_tile(d_y_tiles, d_y_CW, row, group, place, part * BLOCK, C, BLOCK)
                if at % PER_SPAN == 0:
                    cross(crossing, d_memory * leaving(fades, flag, M, M_PAD, True)[:, None], at,
                          start, begin, owner, group, snapshots, initial, tokens, cols, wanted,
                          COLUMN, G, M, W, X, C, SNAPSHOT, M_PAD, PACKED, NUMBER)  # fmt: skip
            if position < steep:
                position = steep
                flag = (chunk + count - steep) * G + group
                d_memory *= leaving(fades, flag, M, M_PAD, True)[:, None]
        if singly & (i % PER_SPAN == 0):
            cross(crossing, d_memory, i, start, begin, owner, group, snapshots, initial, tokens,
                  cols, wanted, COLUMN, G, M, W, X, C, SNAPSHOT, M_PAD, PACKED,
                  NUMBER)  # fmt: skip
    if d_initial is not None:
        if start == begin:
            store_memory(d_initial, owner * G + group, d_memory, X, M, COLUMN + cols, wanted,
                         M_PAD)  # fmt: skip


@triton.jit(
    do_not_specialize=["tokens", "batch", "spans", "value_programs", "key_x_stride", "key_y_stride",
                       "value_x_stride", "value_y_stride"]
)  # fmt: skip
def write_back_kernel(
    key_z, key_x, key_y, key_d_y, key_snapshots,
    value_z, value_x, value_y, value_d_y, value_snapshots,
    key_z_tiles, key_x_tiles, key_y_tiles, key_d_y_tiles,
    value_z_tiles, value_x_tiles, value_y_tiles, value_d_y_tiles,
    lifted, log_forget, fades, steep_flags, d_final, ends, d_initial, initial, final,
    d_lifted, crossing, lifted_tiles, d_lifted_tiles, owners, bounds, tokens, batch, spans,
    value_programs, key_x_stride, key_y_stride, value_x_stride, value_y_stride,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, UNIT: tl.constexpr, SNAPSHOT: tl.constexpr, M_PAD: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, FACTOR: tl.constexpr,
    OPERAND: tl.constexpr, PACKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """`write_back_walk` over values and keys side by side."""
    program = tl.program_id(0)
    KEY_SLICES: tl.constexpr = (K + KEY_BLOCK - 1) // KEY_BLOCK
    if program < value_programs:
        write_back_walk(
            program, KEY_SLICES, value_z, value_x, value_y, lifted, log_forget, fades, steep_flags,
            d_final, ends, d_initial, value_snapshots, initial, final, value_d_y, d_lifted,
            crossing,
            value_z_tiles, value_x_tiles, value_y_tiles, lifted_tiles, value_d_y_tiles,
            d_lifted_tiles, owners, bounds, tokens, batch, spans, value_x_stride, value_y_stride,
            H, G, M, V, K + V, K, C, UNIT, SNAPSHOT, M_PAD, VALUE_BLOCK, FACTOR, OPERAND,
            PACKED, NUMBER,
        )  # fmt: skip
    elif K > 0:
        write_back_walk(
            program - value_programs, 0, key_z, key_x, key_y, lifted, log_forget, fades,
            steep_flags, d_final, ends, d_initial, key_snapshots, initial, final, key_d_y, d_lifted,
            crossing, key_z_tiles, key_x_tiles, key_y_tiles, lifted_tiles, key_d_y_tiles,
            d_lifted_tiles, owners, bounds, tokens, batch, spans, key_x_stride, key_y_stride,
            H, G, M, K, K + V, 0, C, UNIT, SNAPSHOT, M_PAD, KEY_BLOCK, FACTOR, OPERAND,
            PACKED, NUMBER,
        )  # fmt: skip


@triton.jit
def scan_walk(
    program,
    u,  # [tokens, G · R, M] `lifted` (R = 1), or z backwards
    y,  # [tokens, G · R, W] keys or values, or x backwards; rows y_stride apart
    log_forget,  # [tokens, G, M]
    fades, steep_flags,  # [chunks, G, 2, M], [chunks, G]
    local,  # out [units, G, M, X]: what a segment adds to the memory after it (before it)
    decays,  # out [units, G, M]: what it leaves of the memory before it (after it)
    u_tiles, y_tiles,
    owners, bounds, tokens, y_stride,
    R: tl.constexpr, G: tl.constexpr, M: tl.constexpr, W: tl.constexpr, X: tl.constexpr,
    COLUMN: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, M_PAD: tl.constexpr,
    BLOCK: tl.constexpr, OPERAND: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Walks a segment from an empty memory (BACKWARD: from no gradient behind it)."""
    SLICES: tl.constexpr = (W + BLOCK - 1) // BLOCK
    part, group, unit = program % SLICES, program // SLICES % G, program // (SLICES * G)
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
    if y_tiles is not None:
        y_stride = even_stride(y, y_stride)
    memory = tl.zeros([M_PAD, BLOCK], NUMBER)
    decay = tl.full([M_PAD], 1.0, NUMBER)
    begin_flag = (chunk + count - 1 if BACKWARD else chunk) * G + group
    position = 0
    while position < count:
        steep = next_steep(steep_flags, begin_flag, -G if BACKWARD else G, position, count,
                           UNIT // C)  # fmt: skip
        if y_tiles is not None:
            halt = tl.where(position < ragged, position, steep)
            for walked in range(position, halt):
                i = count - 1 - walked if BACKWARD else walked
                place = (start + i * C - origin).to(tl.int32)
                flag = (chunk + i) * G + group
                follows = walked > position
                before = flag + tl.where(follows, G if BACKWARD else -G, 0)
                fade = passing(fades, flag, before, follows, M, M_PAD, BACKWARD)
                memory *= fade[:, None]
                decay *= fade
                if R <= FEW_HEADS:
                    for r in tl.static_range(R):
                        y_CW = load_tile(y_tiles, row, group * R + r, place, part * BLOCK, C, BLOCK)
                        u_CM = load_tile(u_tiles, row, group * R + r, place, 0, C, M_PAD)
                        memory = add_product(memory, tl.trans(u_CM), y_CW.to(OPERAND))
                else:
                    for r in range(R):
                        y_CW = load_tile(y_tiles, row, group * R + r, place, part * BLOCK, C, BLOCK)
                        u_CM = load_tile(u_tiles, row, group * R + r, place, 0, C, M_PAD)
                        memory = add_product(memory, tl.trans(u_CM), y_CW.to(OPERAND))
            if position < halt:
                position = halt
                i = count - halt if BACKWARD else halt - 1
                fade = leaving(fades, (chunk + i) * G + group, M, M_PAD, BACKWARD)
                memory *= fade[:, None]
                decay *= fade
        if position < count:
            i = count - 1 - position if BACKWARD else position
            first = start + i * C
            if position == steep:
                many = (tl.minimum(first + C, stop) - first).to(tl.int32)
                for step in range(many):
                    t = first + many - 1 - step if BACKWARD else first + step
                    gate_row = (t * G + group) * M + slots
                    log_f = tl.load(log_forget + gate_row, mask=present, other=0.0).to(NUMBER)
                    if not BACKWARD:
                        memory *= tl.exp(log_f)[:, None]
                    for r in range(R):
                        head = group * R + r
                        y_W = tl.load(y + t * y_stride + head * W + cols, mask=wanted, other=0.0)
                        u_M = tl.load(u + (t * (G * R) + head) * M + slots, mask=present, other=0.0)
                        memory += u_M.to(NUMBER)[:, None] * y_W.to(NUMBER)[None, :]
                    if BACKWARD:
                        memory *= tl.exp(log_f)[:, None]
                    decay *= tl.exp(log_f)
            else:
                flag = (chunk + i) * G + group
                fade = entering(fades, flag, M, M_PAD, BACKWARD)
                memory *= fade[:, None]
                decay *= fade
                for r in range(R):
                    head = group * R + r
                    y_CW = load_rows(y + head * W, y_stride, first, stop, cols, wanted, C)
                    u_CM = load_rows(u + head * M, G * R * M, first, stop, slots, present, C)
                    memory = add_product(memory, tl.trans(u_CM), y_CW.to(OPERAND))
                fade = leaving(fades, flag, M, M_PAD, BACKWARD)
                memory *= fade[:, None]
                decay *= fade
        position += 1
    if needed:
        store_memory(local, unit * G + group, memory, X, M, COLUMN + cols, wanted, M_PAD)
        if part == 0:
            tl.store(decays + (unit.to(tl.int64) * G + group) * M + slots, decay, mask=present)


@triton.jit(do_not_specialize=["tokens", "value_programs", "key_y_stride", "value_y_stride"])
def scan_kernel(
    key_u, key_y, value_u, value_y, log_forget, fades, steep_flags, local, decays,
    key_u_tiles, key_y_tiles, value_u_tiles, value_y_tiles,
    owners, bounds, tokens, value_programs, key_y_stride, value_y_stride,
    R: tl.constexpr, G: tl.constexpr, M: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, UNIT: tl.constexpr, M_PAD: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, OPERAND: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """`scan_walk` over values and keys side by side."""
    program = tl.program_id(0)
    if program < value_programs:
        scan_walk(
            program, value_u, value_y, log_forget, fades, steep_flags, local, decays,
            value_u_tiles, value_y_tiles, owners, bounds, tokens, value_y_stride,
            R, G, M, V, K + V, K, C, UNIT, M_PAD, VALUE_BLOCK, OPERAND, BACKWARD, PACKED,
            NUMBER,
        )  # fmt: skip
    elif K > 0:
        scan_walk(
            program - value_programs, key_u, key_y, log_forget, fades, steep_flags, local, decays,
            key_u_tiles, key_y_tiles, owners, bounds, tokens, key_y_stride,
            R, G, M, K, K + V, 0, C, UNIT, M_PAD, KEY_BLOCK, OPERAND, BACKWARD, PACKED,
            NUMBER,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    outer,  # [sequences, G, M, X] initial memory, or d final backwards
    local,  # in and out [units, G, M, X]: becomes the memory before (BACKWARD: after) each segment
    decays,  # [units, G, M]
    bounds, tokens,
    G: tl.constexpr, M: tl.constexpr, X: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr, PACKED: tl.constexpr, NUMBER: tl.constexpr,
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
    memory = tl.zeros([BLOCK], NUMBER)
    if outer is not None:
        memory = tl.load(outer + (owner.to(tl.int64) * G + head) * (M * X) + place, mask=mask)
        memory = memory.to(NUMBER)
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
