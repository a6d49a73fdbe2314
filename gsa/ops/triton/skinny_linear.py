"""Products of up to 64 rows with large weights, for decoding pools: as fast as weights are read.

A program owns a block of the numbers out, for all rows. The weight is the wide side of the tensor
cores' product, so that few rows cost little; both sides come by the copy engine (TMA), stages
ahead. What stands behind a product in a model's block is part of it: swish and the gate. What needs
a whole row first (RMSNorm, and the sum before it of residual and of a product's parts) is
`rows_kernel`. A kernel is set up, and asks for the weights that it begins with, while the one
before it works (`CHAINED`); nothing that was written on the device is read before that.

No sum depends on the rows beside it or on their number. Sums are fp32.

Letters beyond the package's: L rows, at most ROWS · N numbers out, BLOCK of them a program's ·
D columns, STEP of them multiplied at once, STAGES steps under way, AHEAD columns asked for early;
SPLIT parts.
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

from gsa.ops.triton.step import chaining, power_of_two
from gsa.ops.triton.thin_linear import Norm, Weights, load_scale, log_gate, root_of, rounded

MOST_ROWS = 64
"""As many as were measured; of more, products are no longer a matter of reading weights."""


@triton.jit
def ask_for(weight, first, column, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
            AHEAD: tl.constexpr):  # fmt: skip
    """Has AHEAD columns of a block of weight [N, D] brought to the L2 cache; does not wait."""
    rows = tl.minimum(first + tl.arange(0, BLOCK), N - 1).to(tl.int64)
    size = tl.minimum(AHEAD, D - column) * (weight.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [weight + rows * D + column, size], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def product(x, weight, first, begin, end, ROWS: tl.constexpr, BLOCK: tl.constexpr,
            STEP: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Steps begin to end of W x, [BLOCK, ROWS]. Descriptors give 0 beyond rows and columns."""
    sum_NL = tl.zeros([BLOCK, ROWS], tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        weight_ND = weight.load([first, step * STEP])
        sum_NL = tl.dot(weight_ND, x.load([0, step * STEP]).T, sum_NL)
    return sum_NL


@triton.jit
def store(out, y_NL, numbers, L, N: tl.constexpr):
    """Into out [L, N]."""
    rows = tl.arange(0, y_NL.shape[1])
    mask = (numbers < N)[:, None] & (rows < L)[None, :]
    tl.store(out + (rows[None, :].to(tl.int64) * N + numbers[:, None]), y_NL, mask=mask)


# x, weight: descriptors of [L, D] and [NQ + NK + NV + NF, D]; `at`: the weight itself.
# bias: [NQ + NK + NV + NF] or None. asleep: bool [L]. q, k, v, log_forget (fp32): out [L, N].
@triton.jit(do_not_specialize=["L"])
def inputs_kernel(
    x, weight, at, bias, asleep, q, k, v, log_forget, L, D: tl.constexpr,
    NQ: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr, NF: tl.constexpr, TAU: tl.constexpr,
    SWISH_KEYS: tl.constexpr, SWISH_VALUES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """q, k, v = swish(W x) or W x; log f = logsigmoid(W x) / TAU, 0 where asleep."""
    KS: tl.constexpr = (NQ + BLOCK - 1) // BLOCK
    VS: tl.constexpr = KS + (NK + BLOCK - 1) // BLOCK
    FS: tl.constexpr = VS + (NV + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    first, begin = program * BLOCK, 0  # of the projection; the projection's in the weight
    if program >= FS:
        first, begin = (program - FS) * BLOCK, NQ + NK + NV
    elif program >= VS:
        first, begin = (program - VS) * BLOCK, NQ + NK
    elif program >= KS:
        first, begin = (program - KS) * BLOCK, NQ
    if CHAINED:
        gdc_launch_dependents()
        ask_for(at, begin + first, 0, NQ + NK + NV + NF, D, BLOCK, AHEAD)
        gdc_wait()
    y_NL = product(x, weight, begin + first, 0, (D + STEP - 1) // STEP, ROWS, BLOCK, STEP, STAGES)
    numbers = first + tl.arange(0, BLOCK)
    if bias is not None:
        inside = begin + numbers < NQ + NK + NV + NF
        y_NL += tl.load(bias + begin + numbers, mask=inside, other=0.0).to(tl.float32)[:, None]
    y_NL = rounded(y_NL, q)
    if program >= FS:
        rows = tl.arange(0, ROWS)
        asleep_L = tl.load(asleep + rows, mask=rows < L, other=0) != 0
        y_NL = tl.where(asleep_L[None, :], 0.0, log_gate(y_NL, TAU))
        store(log_forget, y_NL, numbers, L, NF)
    else:
        if program >= VS:
            store(v, y_NL * tl.sigmoid(y_NL) if SWISH_VALUES else y_NL, numbers, L, NV)
        else:
            y_NL = y_NL * tl.sigmoid(y_NL) if SWISH_KEYS else y_NL
            if program >= KS:
                store(k, y_NL, numbers, L, NK)
            else:
                store(q, y_NL, numbers, L, NQ)


# x, gate, up: descriptors of [L, D] and twice [N, D]; gate_at, up_at: the weights. out: [L, N].
@triton.jit(do_not_specialize=["L"])
def gate_up_kernel(
    x, gate, up, gate_at, up_at, out, L, D: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """out = swish(W_gate x) ⊙ W_up x."""
    first = tl.program_id(0) * BLOCK
    if CHAINED:
        gdc_launch_dependents()
        ask_for(gate_at, first, 0, N, D, BLOCK, AHEAD)
        ask_for(up_at, first, 0, N, D, BLOCK, AHEAD)
        gdc_wait()
    gate_NL = tl.zeros([BLOCK, ROWS], tl.float32)
    up_NL = tl.zeros([BLOCK, ROWS], tl.float32)
    for step in tl.range(0, (D + STEP - 1) // STEP, num_stages=STAGES):
        x_DL = x.load([0, step * STEP]).T
        gate_NL = tl.dot(gate.load([first, step * STEP]), x_DL, gate_NL)
        up_NL = tl.dot(up.load([first, step * STEP]), x_DL, up_NL)
    gate_NL, up_NL = rounded(gate_NL, out), rounded(up_NL, out)
    gate_NL = rounded(gate_NL * tl.sigmoid(gate_NL), out)
    store(out, gate_NL * up_NL, first + tl.arange(0, BLOCK), L, N)


# x, weight: descriptors of [L, D] and [N, D]; `at`: the weight. out: [SPLIT, L, N].
@triton.jit(do_not_specialize=["L"])
def parts_kernel(
    x, weight, at, out, L, D: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, SPLIT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """W x in parts, each over its share of the columns."""
    STEPS: tl.constexpr = (D + STEP - 1) // STEP
    part, first = tl.program_id(0) % SPLIT, tl.program_id(0) // SPLIT * BLOCK
    begin, end = part * STEPS // SPLIT, (part + 1) * STEPS // SPLIT
    if CHAINED:
        gdc_launch_dependents()
        ask_for(at, first, begin * STEP, N, D, BLOCK, AHEAD)
        gdc_wait()
    sum_NL = product(x, weight, first, begin, end, ROWS, BLOCK, STEP, STAGES)
    store(out + part.to(tl.int64) * L * N, sum_NL, first + tl.arange(0, BLOCK), L, N)


# x: [L, D]. parts: fp32 [SPLIT, L, D] or None. normed, total: out [L, D]; total only with parts.
@triton.jit(do_not_specialize=["L"])
def rows_kernel(
    x, parts, norm_weight, normed, total, L, D: tl.constexpr, SPLIT: tl.constexpr, C: tl.constexpr,
    SWISH: tl.constexpr, EPS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One row: total = x + the parts' sum; normed = RMSNorm(total), or of its swish."""
    columns = tl.arange(0, C)
    if CHAINED:
        gdc_launch_dependents()
    scale_C = load_scale(norm_weight, D, 0, C)
    if CHAINED:
        gdc_wait()
    place, mask = tl.program_id(0).to(tl.int64) * D + columns, columns < D
    x_C = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if parts is not None:
        sum_C = tl.load(parts + place, mask=mask, other=0.0)
        for part in tl.static_range(1, SPLIT):
            sum_C += tl.load(parts + part * L * D + place, mask=mask, other=0.0)
        x_C = rounded(x_C + rounded(sum_C, x), x)
        tl.store(total + place, x_C, mask=mask)
    if SWISH:
        x_C = rounded(x_C * tl.sigmoid(x_C), x)
    root = root_of(tl.sum(x_C * x_C, 0), D, EPS)
    tl.store(normed + place, x_C * root * scale_C, mask=mask)


class SkinnyTile(NamedTuple):
    """ROWS, BLOCK, STEP, STAGES and AHEAD of a kernel."""

    rows: int
    block: int
    step: int
    stages: int
    ahead: int


WARPS = 4
"""Of a program: one group for the tensor cores."""
STEP = 128
"""Columns multiplied at once: 64 were up to a tenth slower."""
HELD = 224 << 10
"""Bytes of both sides that a multiprocessor has room for: one program's stages."""
MOST_STAGES = 8
PROGRAMS = 132
"""One for each multiprocessor of an H100."""


def skinny_tile(L: int, N: int, weights: int = 1) -> SkinnyTile:
    """For L rows and `weights` weights [N, D] side by side.

    64 numbers out and 16 rows are what tensor cores take at least; for the head, where there are
    enough numbers for every multiprocessor, twice as many read the rows half as often. As many
    stages as fit; asking ahead for half of them was the soonest.
    """
    rows, block = max(16, power_of_two(L)), 128 if N >= 128 * PROGRAMS else 64
    stages = min(MOST_STAGES, HELD // (2 * STEP * (block * weights + rows)))
    return SkinnyTile(rows, block, STEP, stages, STEP * stages // 2)


def skinny_split(N: int, D: int) -> int:
    """Parts of a product whose sum `skinny_rows` makes: as many as leave half of the
    multiprocessors with work, if there are columns for it; more are sooner read than added."""
    split, steps = 1, -(-D // STEP)
    while -(-N // 64) * split * 4 <= PROGRAMS and split * 4 <= steps:
        split *= 2
    return split


def tiles_of(x: Tensor, rows: int, step: int) -> TensorDescriptor:
    """x [L, D] in tiles, for the copy engine."""
    return TensorDescriptor(x, [*x.shape], [x.shape[1], 1], [rows, step])


def skinny_inputs(
    x: Tensor, inputs: Weights, counts: tuple[int, int, int, int], asleep: Tensor, tau: float,
    swish_keys: bool, swish_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(q, k, v, log_forget) of rows x [L, D]: as `GatedSlotAttention` makes them, each [L, N].

    inputs: of q, k, v and the gate, one below the other, `counts` numbers of each.
    asleep: bool [L, 1], where log_forget is to be 0. swish_keys, swish_values: whether q and k, and
    v, go through swish.
    """
    L, D = x.shape
    tile, chained = skinny_tile(L, sum(counts)), chaining(x.device)
    q, k, v = (x.new_empty(L, n) for n in counts[:3])
    log_forget = x.new_empty(L, counts[3], dtype=torch.float32)
    with torch.cuda.device_of(x):
        inputs_kernel[(sum(-(-n // tile.block) for n in counts),)](
            tiles_of(x, tile.rows, tile.step), tiles_of(inputs.weight, tile.block, tile.step),
            inputs.weight, inputs.bias, asleep, q, k, v, log_forget, L, D, *counts, tau,
            swish_keys, swish_values, *tile, bool(chained), num_warps=WARPS, **chained,
        )  # fmt: skip
    return q, k, v, log_forget


def skinny_gate_up(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """swish(W_gate x) ⊙ W_up x [L, F] of rows x [L, D]; weights [F, D]."""
    (L, D), N = x.shape, len(gate)
    tile, chained, out = skinny_tile(L, N, 2), chaining(x.device), x.new_empty(L, N)
    with torch.cuda.device_of(x):
        gate_up_kernel[(-(-N // tile.block),)](
            tiles_of(x, tile.rows, tile.step), tiles_of(gate, tile.block, tile.step),
            tiles_of(up, tile.block, tile.step), gate, up, out, L, D, N, *tile, bool(chained),
            num_warps=WARPS, **chained,
        )  # fmt: skip
    return out


def skinny_parts(x: Tensor, weight: Tensor, *, whole: bool = False) -> Tensor:
    """fp32 [SPLIT, L, N], whose sum is W x of rows x [L, D]; `whole`: one part, in x's dtype."""
    (L, D), N = x.shape, len(weight)
    split = 1 if whole else skinny_split(N, D)
    tile, chained = skinny_tile(L, N), chaining(x.device)
    out = x.new_empty(split, L, N, dtype=x.dtype if whole else torch.float32)
    with torch.cuda.device_of(x):
        parts_kernel[(-(-N // tile.block) * split,)](
            tiles_of(x, tile.rows, tile.step), tiles_of(weight, tile.block, tile.step), weight, out,
            L, D, N, *tile, split, bool(chained), num_warps=WARPS, **chained,
        )  # fmt: skip
    return out


def skinny_rows(
    x: Tensor, parts: Tensor | None, norm: Norm, *, swish: bool = False
) -> tuple[Tensor, Tensor]:
    """(total, normed) of rows x [L, D]: x + the sum of parts [SPLIT, L, D], and its RMSNorm, with
    `swish` of its swish. Without parts the total is x."""
    L, D = x.shape
    chained, C, normed = chaining(x.device), power_of_two(D), torch.empty_like(x)
    total, split = (x, 0) if parts is None else (torch.empty_like(x), len(parts))
    with torch.cuda.device_of(x):
        rows_kernel[(L,)](
            x, parts, norm.weight, normed, total, L, D, split, C, swish, norm.eps, bool(chained),
            num_warps=max(1, min(16, C // 256)), **chained,
        )  # fmt: skip
    return total, normed
