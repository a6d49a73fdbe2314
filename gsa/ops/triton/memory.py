"""Tiles of tokens and columns of the memory, on their way into and out of registers.

A tile comes in one of two ways. Whole chunks in an even layout go through tensor descriptors (the
copy engine of Hopper GPUs: no addresses in registers, and what lies beyond a row is read as zero
and not written). All else goes through masked pointers.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

import triton
import triton.language as tl

from gsa.ops.triton.common import boundary_number


@triton.jit
def product(a, b, NUMBER: tl.constexpr):
    """a · b summed in NUMBER.

    Factors are fp32 for fp16 only: in TF32 three times over, since once cuts them off, always
    towards zero.
    """
    return tl.dot(a, b, input_precision="tf32x3", out_dtype=NUMBER)


@triton.jit
def add_product(total, a, b):
    """total + a · b, like `product`."""
    return tl.dot(a, b, total, input_precision="tf32x3", out_dtype=total.dtype)


@triton.jit
def load_tile(tiles, row, head, place, column, C: tl.constexpr, BLOCK: tl.constexpr):
    """[C, BLOCK] at token `place` of a descriptor over [rows, heads, tokens, width]."""
    return tiles.load([row, head, place, column]).reshape(C, BLOCK)


@triton.jit
def store_tile(tiles, value, row, head, place, column, C: tl.constexpr, BLOCK: tl.constexpr):
    tiles.store([row, head, place, column], value.to(tiles.dtype).reshape(1, 1, C, BLOCK))


@triton.jit
def even_stride(x, stride):
    """The stride of a tensor that has a descriptor: it is a multiple of 16 bytes."""
    return tl.multiple_of(stride, 128 // x.dtype.element_ty.primitive_bitwidth)


@triton.jit
def load_rows(x, stride, first, stop, cols, wanted, C: tl.constexpr):
    """[C, columns] from token `first` on, by pointers; 0 beyond `stop` and where not `wanted`."""
    rows = tl.arange(0, C)
    mask = (first + rows < stop)[:, None] & wanted[None, :]
    return tl.load(
        x + first * stride + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0
    )


@triton.jit
def store_rows(x, value, stride, first, stop, cols, wanted, C: tl.constexpr):
    rows = tl.arange(0, C)
    mask = (first + rows < stop)[:, None] & wanted[None, :]
    tl.store(x + first * stride + rows[:, None] * stride + cols[None, :], value, mask=mask)


@triton.jit
def load_memory(base, row, X: tl.constexpr, M: tl.constexpr, cols, wanted,
                M_PAD: tl.constexpr, NUMBER: tl.constexpr):  # fmt: skip
    """Columns of memory `row` of [.., M, X]; 0 beyond M and where not `wanted`."""
    slots = tl.arange(0, M_PAD)
    mask = (slots < M)[:, None] & wanted[None, :]
    place = slots[:, None] * X + cols[None, :]
    return tl.load(base + row.to(tl.int64) * (M * X) + place, mask=mask, other=0.0).to(NUMBER)


@triton.jit
def store_memory(base, row, memory, X: tl.constexpr, M: tl.constexpr, cols, wanted,
                 M_PAD: tl.constexpr):  # fmt: skip
    slots = tl.arange(0, M_PAD)
    mask = (slots < M)[:, None] & wanted[None, :]
    place = slots[:, None] * X + cols[None, :]
    tl.store(base + row.to(tl.int64) * (M * X) + place, memory, mask=mask)


@triton.jit
def border_memory(inner, outer, is_outermost, inner_row, outer_row, X: tl.constexpr,
                  M: tl.constexpr, cols, wanted, M_PAD: tl.constexpr,
                  NUMBER: tl.constexpr):  # fmt: skip
    """The memory (or its gradient) that a walk starts from: `outer` at the sequence's border, what
    `combine_kernel` left in `inner` within it, zero where there is none."""
    memory = tl.zeros([M_PAD, cols.shape[0]], NUMBER)
    if is_outermost:
        if outer is not None:
            memory = load_memory(outer, outer_row, X, M, cols, wanted, M_PAD, NUMBER)
    elif inner is not None:
        memory = load_memory(inner, inner_row, X, M, cols, wanted, M_PAD, NUMBER)
    return memory


@triton.jit
def entering(fades, flag, M: tl.constexpr, M_PAD: tl.constexpr, BACKWARD: tl.constexpr = False):
    """What a memory is multiplied with before a chunk, [M_PAD]: exp(S) of `chunk_decays`.

    flag: number of the chunk and head. BACKWARD: what its gradient is, exp(G_C - S).
    """
    slots = tl.arange(0, M_PAD)
    fade = fades + flag.to(tl.int64) * (2 * M) + slots
    return tl.load(fade + M if BACKWARD else fade, mask=slots < M, other=0.0)


@triton.jit
def leaving(fades, flag, M: tl.constexpr, M_PAD: tl.constexpr, BACKWARD: tl.constexpr = False):
    """What it is multiplied with after the chunk."""
    slots = tl.arange(0, M_PAD)
    fade = fades + flag.to(tl.int64) * (2 * M) + slots
    return tl.load(fade if BACKWARD else fade + M, mask=slots < M, other=0.0)


@triton.jit
def passing(fades, flag, before, follows, M: tl.constexpr, M_PAD: tl.constexpr,
            BACKWARD: tl.constexpr = False):  # fmt: skip
    """Both at once between the chunk walked `before` and this one, if it `follows` that at all.

    Loads that products wait for are begun long before; after a product it would be waited for them.
    """
    left = tl.where(follows, leaving(fades, before, M, M_PAD, BACKWARD), 1.0)
    return left * entering(fades, flag, M, M_PAD, BACKWARD)


@triton.jit
def next_steep(flags, start_flag, step, position, count, COUNT: tl.constexpr):
    """The first chunk >= position that is flagged, or count. Flags lie `step` apart."""
    index = tl.arange(0, COUNT)
    flag = tl.load(flags + start_flag + index * step, mask=index < count, other=0)
    return tl.min(tl.where((flag != 0) & (index >= position), index, count), 0)


@triton.jit
def is_border(chunk, first, end, C: tl.constexpr, SNAPSHOT: tl.constexpr):
    """Whether a chunk ends where the backward pass looks at the memory, within a sequence."""
    return ((chunk + 1) % (SNAPSHOT // C) == 0) & (first + C < end)


@triton.jit
def snapshot_row(owner, begin, first, tokens, head, G: tl.constexpr, C: tl.constexpr,
                 SNAPSHOT: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """The row of [borders · G] that holds the memory after the chunk at `first`."""
    border = boundary_number(owner, begin, first + C - SNAPSHOT, tokens, SNAPSHOT, PACKED)
    return border * G + head
