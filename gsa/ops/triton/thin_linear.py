"""Products of one row with large weights, for decoding: as fast as weights are read.

A program holds whole rows of a weight in registers. It asks for them before it waits for the kernel
before it (`CHAINED`, Hopper and newer), so that memory is busy while one kernel ends and the next
begins; nothing that was written on the device is read before that. What stands before and behind a
product in a model's block is part of it: RMSNorm, swish, the gate, the residual sum.

Letters beyond the package's: N numbers out, R of them a program's; the D columns are held as A and,
where D is no power of two, B more. All arithmetic is fp32.
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

from gsa.ops.triton.step import chaining, power_of_two


@triton.jit
def load_weight(weight, rows_R, N: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr,
                COLUMNS: tl.constexpr):  # fmt: skip
    """[R, COLUMNS] of weight [N, D], from column FIRST on; 0 beyond it."""
    columns = FIRST + tl.arange(0, COLUMNS)
    mask = (rows_R < N)[:, None] & (columns < D)[None, :]
    place = rows_R.to(tl.int64)[:, None] * D + columns[None, :]
    return tl.load(weight + place, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_scale(norm_weight, D: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of a norm's weight, 1 if it has none."""
    scale = tl.full([COLUMNS], 1.0, tl.float32)
    if norm_weight is not None:
        columns = FIRST + tl.arange(0, COLUMNS)
        scale = tl.load(norm_weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    return scale


@triton.jit
def load_input(x, D: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr,
               SWISH: tl.constexpr):  # fmt: skip
    columns = FIRST + tl.arange(0, COLUMNS)
    part = tl.load(x + columns, mask=columns < D, other=0.0).to(tl.float32)
    return part * tl.sigmoid(part) if SWISH else part


@triton.jit
def multiply(tile_RC, part_C):
    return tl.sum(tile_RC.to(tl.float32) * part_C[None, :], 1)


@triton.jit
def root_of(squares, D: tl.constexpr, EPS: tl.constexpr):
    return 1 / tl.sqrt(squares / D + EPS)


@triton.jit
def rounded(value, like):
    """As a layer of the model would hand it on."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def log_gate(logit, TAU: tl.constexpr):
    """logsigmoid(logit) / TAU, to full precision where the gate is near 1."""
    small = tl.exp(-tl.abs(logit))
    more = 1.0 + small
    # log(1 + small) = small · log(more) / (more - 1): what rounding took from `more` cancels
    log = tl.where(more == 1.0, small, small * tl.log(more) / tl.where(more == 1.0, 1.0, more - 1))
    return (tl.minimum(logit, 0.0) - log) / TAU


@triton.jit
def product(x, norm_weight, weight, rows_R, D: tl.constexpr, N: tl.constexpr, A: tl.constexpr,
            B: tl.constexpr, SWISH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
            CHAINED: tl.constexpr):  # fmt: skip
    """Numbers `rows_R` of W x, x [D] first through swish, RMSNorm, or both."""
    a_RA = load_weight(weight, rows_R, N, D, 0, A)
    scale_A = load_scale(norm_weight, D, 0, A)
    if B > 0:
        b_RB = load_weight(weight, rows_R, N, D, A, B)
        scale_B = load_scale(norm_weight, D, A, B)
    if CHAINED:
        gdc_wait()
    x_A = load_input(x, D, 0, A, SWISH)
    squares = tl.sum(x_A * x_A, 0)
    y_R = multiply(a_RA, x_A * scale_A)
    if B > 0:
        x_B = load_input(x, D, A, B, SWISH)
        squares += tl.sum(x_B * x_B, 0)
        y_R += multiply(b_RB, x_B * scale_B)
    return y_R * root_of(squares, D, EPS) if NORM else y_R


@triton.jit
def project(x, norm_weight, asleep, weight, bias, out, rows_R, D: tl.constexpr, N: tl.constexpr,
            A: tl.constexpr, B: tl.constexpr, EPS: tl.constexpr, TAU: tl.constexpr,
            SWISH: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    """Rows of one projection of `inputs_kernel`; the gate's if TAU is not 0."""
    y_R = product(x, norm_weight, weight, rows_R, D, N, A, B, False, True, EPS, CHAINED)
    if bias is not None:
        y_R += tl.load(bias + rows_R, mask=rows_R < N, other=0.0).to(tl.float32)
    y_R = rounded(y_R, x)
    if TAU != 0.0:
        y_R = tl.where(tl.load(asleep) != 0, 0.0, log_gate(y_R, TAU))
    elif SWISH:
        y_R = y_R * tl.sigmoid(y_R)
    tl.store(out + rows_R, y_R, mask=rows_R < N)


@triton.jit
def inputs_kernel(
    x, norm_weight, asleep,  # [D], [D] or None, bool
    q_weight, k_weight, v_weight, f_weight,  # [NQ, D], [NK, D], [NV, D], [NF, D]
    q_bias, k_bias, v_bias, f_bias,  # or None
    q, k, v, log_forget,  # out [N]; log_forget fp32
    D: tl.constexpr, NQ: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr,
    NF: tl.constexpr, R: tl.constexpr, A: tl.constexpr, B: tl.constexpr, EPS: tl.constexpr,
    TAU: tl.constexpr, SWISH_KEYS: tl.constexpr, SWISH_VALUES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """h = RMSNorm(x); q, k, v = swish(W h) or W h; log f = logsigmoid(W h) / TAU, 0 if asleep."""
    KS: tl.constexpr = (NQ + R - 1) // R
    VS: tl.constexpr = KS + (NK + R - 1) // R
    FS: tl.constexpr = VS + (NV + R - 1) // R
    if CHAINED:
        gdc_launch_dependents()
    program = tl.program_id(0)
    rows = tl.arange(0, R)
    if program < KS:
        project(x, norm_weight, asleep, q_weight, q_bias, q, program * R + rows, D, NQ, A, B, EPS,
                0.0, SWISH_KEYS, CHAINED)  # fmt: skip
    elif program < VS:
        project(x, norm_weight, asleep, k_weight, k_bias, k, (program - KS) * R + rows, D, NK, A, B,
                EPS, 0.0, SWISH_KEYS, CHAINED)  # fmt: skip
    elif program < FS:
        project(x, norm_weight, asleep, v_weight, v_bias, v, (program - VS) * R + rows, D, NV, A, B,
                EPS, 0.0, SWISH_VALUES, CHAINED)  # fmt: skip
    else:
        project(x, norm_weight, asleep, f_weight, f_bias, log_forget, (program - FS) * R + rows, D,
                NF, A, B, EPS, TAU, False, CHAINED)  # fmt: skip


@triton.jit
def gate_up_kernel(
    x, norm_weight, gate_weight, up_weight, out,  # [D], [D] or None, [N, D], [N, D], [N]
    D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    EPS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """h = RMSNorm(x); out = swish(W_gate h) ⊙ W_up h."""
    if CHAINED:
        gdc_launch_dependents()
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    gate_RA = load_weight(gate_weight, rows_R, N, D, 0, A)
    up_RA = load_weight(up_weight, rows_R, N, D, 0, A)
    scale_A = load_scale(norm_weight, D, 0, A)
    if B > 0:
        gate_RB = load_weight(gate_weight, rows_R, N, D, A, B)
        up_RB = load_weight(up_weight, rows_R, N, D, A, B)
        scale_B = load_scale(norm_weight, D, A, B)
    if CHAINED:
        gdc_wait()
    x_A = load_input(x, D, 0, A, False)
    squares = tl.sum(x_A * x_A, 0)
    gate_R = multiply(gate_RA, x_A * scale_A)
    up_R = multiply(up_RA, x_A * scale_A)
    if B > 0:
        x_B = load_input(x, D, A, B, False)
        squares += tl.sum(x_B * x_B, 0)
        gate_R += multiply(gate_RB, x_B * scale_B)
        up_R += multiply(up_RB, x_B * scale_B)
    root = root_of(squares, D, EPS)
    gate_R, up_R = rounded(gate_R * root, x), rounded(up_R * root, x)
    tl.store(out + rows_R, gate_R * tl.sigmoid(gate_R) * up_R, mask=rows_R < N)


@triton.jit
def output_kernel(
    x, norm_weight, weight, residual, out,  # [D], [D] or None, [N, D], [N] or None, [N]
    D: tl.constexpr, N: tl.constexpr, R: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    SWISH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """out = residual + W x, x as in `product`."""
    if CHAINED:
        gdc_launch_dependents()
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    y_R = product(x, norm_weight, weight, rows_R, D, N, A, B, SWISH, NORM, EPS, CHAINED)
    if residual is not None:
        kept_R = tl.load(residual + rows_R, mask=rows_R < N, other=0.0)
        y_R = kept_R.to(tl.float32) + rounded(y_R, x)
    tl.store(out + rows_R, y_R, mask=rows_R < N)


class ThinTile(NamedTuple):
    """R, A, B and warps of a program."""

    R: int
    A: int
    B: int
    warps: int


MOST_BYTES = 16384
"""Of weights that a program holds."""
WARP_BYTES = 8192
"""Of them that a warp of it holds."""
PAIR_BYTES = 24576
"""Two rows of a weight, if a row has more than half of `MOST_BYTES`, that one warp holds: 192 of
its registers. It was faster so than a row by itself, and than two of them in more warps."""
ENOUGH_PROGRAMS = 512
"""That keep memory busy."""


def thin_tile(N: int, D: int, itemsize: int, weights: int = 1, parts: int = 1) -> ThinTile:
    """How `weights` weights [N, D] side by side are cut into programs.

    parts: 1, or 2 for programs half as large, of warps with a quarter each: where much stands
    behind a product, as in `inputs_kernel`.
    """
    A = 1 << (D.bit_length() - 1)
    B = power_of_two(D - A) if D > A else 0
    R = max(1, MOST_BYTES // (parts * D * itemsize * weights))
    R = 1 << (R.bit_length() - 1)
    while R > 1 and N < R * ENOUGH_PROGRAMS:
        R //= 2
    row = (A + B) * itemsize * weights
    if R == 1 and weights == 1 and 2 * row <= PAIR_BYTES and N >= 2 * ENOUGH_PROGRAMS:
        return ThinTile(2, A, B, 1)
    warps = power_of_two(R * row * parts * parts // WARP_BYTES)
    return ThinTile(R, A, B, max(1, min(8, warps, A // 256)))


class Norm(NamedTuple):
    """An RMSNorm: its weight [D], or None, and eps."""

    weight: Tensor | None
    eps: float


class Weights(NamedTuple):
    """A linear layer: weight [N, D] and bias [N], or None. Dense."""

    weight: Tensor
    bias: Tensor | None


def thin_inputs(
    x: Tensor, norm: Norm, asleep: Tensor, layers: tuple[Weights, Weights, Weights, Weights],
    tau: float, swish_keys: bool, swish_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(q, k, v, log_forget) of a row x [1, D]: as `GatedSlotAttention` makes them, each [1, N].

    asleep: bool [1, 1], whether log_forget is to be 0. layers: of q, k, v and the gate.
    swish_keys, swish_values: whether q and k, and v, go through swish.
    """
    D, counts = x.shape[1], [len(layer.weight) for layer in layers]
    tile = thin_tile(sum(counts), D, x.element_size(), parts=2)
    q, k, v = (x.new_empty(1, n) for n in counts[:3])
    log_forget = x.new_empty(1, counts[3], dtype=torch.float32)
    chained = chaining(x.device)
    with torch.cuda.device_of(x):
        inputs_kernel[(sum(-(-n // tile.R) for n in counts),)](
            x, norm.weight, asleep, *(layer.weight for layer in layers),
            *(layer.bias for layer in layers), q, k, v, log_forget, D, *counts, tile.R, tile.A,
            tile.B, norm.eps, tau, swish_keys, swish_values, bool(chained), num_warps=tile.warps,
            **chained,
        )  # fmt: skip
    return q, k, v, log_forget


def thin_gate_up(x: Tensor, norm: Norm, gate: Tensor, up: Tensor) -> Tensor:
    """swish(W_gate h) ⊙ W_up h [1, F] of h = RMSNorm(x), x [1, D]; weights [F, D]."""
    D, N = x.shape[1], len(gate)
    tile, chained, out = thin_tile(N, D, x.element_size(), 2), chaining(x.device), x.new_empty(1, N)
    with torch.cuda.device_of(x):
        gate_up_kernel[(-(-N // tile.R),)](
            x, norm.weight, gate, up, out, D, N, tile.R, tile.A, tile.B, norm.eps,
            bool(chained), num_warps=tile.warps, **chained,
        )  # fmt: skip
    return out


def thin_output(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, *, norm: Norm | None = None,
    swish: bool = False,
) -> Tensor:  # fmt: skip
    """residual + W · RMSNorm(swish(x)) [1, N], of x [1, D]; without what is not asked for."""
    D, N = x.shape[1], len(weight)
    tile, chained, out = thin_tile(N, D, x.element_size()), chaining(x.device), x.new_empty(1, N)
    scale, eps = (None, 0.0) if norm is None else norm
    with torch.cuda.device_of(x):
        output_kernel[(-(-N // tile.R),)](
            x, scale, weight, residual, out, D, N, tile.R, tile.A, tile.B, swish, norm is not None,
            eps, bool(chained), num_warps=tile.warps, **chained,
        )  # fmt: skip
    return out
