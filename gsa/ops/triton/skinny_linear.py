"""Products of up to 64 rows with large weights, for decoding pools: as fast as weights are read.

All rows are one tile; a program owns a block of the numbers out, and where these are few, a part of
the columns: then `sum_kernel` adds the parts, in their order. Both operands come by the copy engine
(TMA), stages ahead of the tensor cores. Sums are fp32.

Letters beyond the package's: L rows · N numbers out, BLOCK of them a program's · D columns, STEP of
them multiplied at once, in SPLIT parts.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from gsa.ops.triton.step import chaining

MOST_ROWS = 64
"""What tensor cores take at once; fewer rows are padded on chip."""


@triton.jit
def finish(out, bias, sum_, place, columns, mask, N: tl.constexpr):
    """Adds the bias and stores in the dtype of `out`."""
    if bias is not None:
        sum_ += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(out + place, sum_, mask=mask)


# x, weight: descriptors of [L, D] and [N, D]. out: [L, N], or fp32 [SPLIT, L, N] if SPLIT > 1.
@triton.jit(do_not_specialize=["L"])
def skinny_kernel(
    x, weight, bias, out, L, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    STEPS: tl.constexpr = (D + STEP - 1) // STEP
    part, first = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT * BLOCK
    sum_LN = tl.zeros([ROWS, BLOCK], tl.float32)
    begin, end = part * STEPS // SPLIT, (part + 1) * STEPS // SPLIT
    for step in tl.range(begin, end, num_stages=STAGES):
        x_LD = x.load([0, step * STEP])  # 0 beyond rows and columns
        weight_ND = weight.load([first, step * STEP])
        sum_LN = tl.dot(x_LD, weight_ND.T, sum_LN)
    rows, columns = tl.arange(0, ROWS), first + tl.arange(0, BLOCK)
    mask = (rows < L)[:, None] & (columns < N)[None, :]
    place = (part * L + rows)[:, None] * N + columns[None, :]
    finish(out, bias if SPLIT == 1 else None, sum_LN, place, columns, mask, N)


@triton.jit(do_not_specialize=["L"])
def sum_kernel(
    parts, bias, out, L, N: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of out [L, N]: the sum of parts [SPLIT, L, N], and the bias."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < L * N
    sum_ = tl.load(parts + place, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLIT):
        sum_ += tl.load(parts + part * L * N + place, mask=mask, other=0.0)
    finish(out, bias, sum_, place, place % N, mask, N)


class SkinnyTile(NamedTuple):
    """BLOCK, STEP and SPLIT of `skinny_kernel`, stages of its pipeline, warps."""

    block: int
    step: int
    split: int
    stages: int
    warps: int


PROGRAMS = 132
"""One for each multiprocessor of an H100."""


def skinny_tile(N: int, D: int) -> SkinnyTile:
    """How a weight [N, D] is cut. Rows are read again for every block, from the L2 cache: narrow
    blocks would wait for that, so a narrow weight is cut along its columns instead. Two programs
    fit a multiprocessor, so that the blocks of a weight of usual size are all at work at once."""
    block, step = (128 if N >= 128 * PROGRAMS else 64), 64
    split, steps = 1, -(-D // step)
    while -(-N // block) * split * 2 <= PROGRAMS and split * 4 <= steps:
        split *= 2
    return SkinnyTile(block, step, split, 6 if block == 64 else 4, 4)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias [L, N], of x [L, D], weight [N, D] and bias [N]: bf16 or fp16, all of one dtype.

    ValueError for more than 64 rows, another dtype, or what the copy engine cannot take: tensors
    with gaps, D no multiple of 8, addresses that are no multiples of 16 bytes.
    """
    (L, D), N = x.shape, len(weight)
    if not 1 <= L <= MOST_ROWS:
        raise ValueError(f"x: expected 1 to {MOST_ROWS} rows, got {L}; use F.linear")
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        raise ValueError(
            f"x, weight: expected both bf16 or both fp16, got {x.dtype} and {weight.dtype}; "
            "use F.linear"
        )
    for name, y in (("x", x), ("weight", weight)):
        if not y.is_contiguous() or D % 8 or y.data_ptr() % 16:
            raise ValueError(
                f"{name}: expected [.., {D}] in one piece, rows and address at multiples of 16 "
                "bytes; got other; use F.linear"
            )
    tile, chained = skinny_tile(N, D), chaining(x.device)
    out = x.new_empty(L, N)
    parts = out if tile.split == 1 else x.new_empty(tile.split, L, N, dtype=torch.float32)
    with torch.cuda.device_of(x):
        skinny_kernel[(-(-N // tile.block) * tile.split,)](
            TensorDescriptor(x, [L, D], [D, 1], [MOST_ROWS, tile.step]),
            TensorDescriptor(weight, [N, D], [D, 1], [tile.block, tile.step]), bias, parts, L, N,
            D, MOST_ROWS, tile.block, tile.step, tile.split, tile.stages, bool(chained),
            num_warps=tile.warps, **chained,
        )  # fmt: skip
        if tile.split > 1:
            block = 512
            sum_kernel[(-(-L * N // block),)](
                parts, bias, out, L, N, tile.split, block, bool(chained), num_warps=4, **chained
            )
    return out
