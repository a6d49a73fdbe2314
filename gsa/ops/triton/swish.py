"""Swish beside the operator, where torch.compile makes several passes over memory of one.

Kernels take rows of numbers, evenly apart, and compute in fp32 (fp64 for fp64).
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa.ops.types import compute_dtype

MOST_COLUMNS = 2048
"""Of a program of `join_kernel`: sixteen a thread."""
PROGRAMS = 1024
"""That share the rows of `normed_swish_backward_kernel`, each with a sum of its own."""


@triton.jit
def join_kernel(
    y, d, joined, width, y_stride, d_stride, stride,
    SWISH: tl.constexpr, BLOCK: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Columns of a row of `joined`, from a pointer on: d, times swish's slope at y if SWISH."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gradient = tl.load(d + row * d_stride + columns, mask=inside, other=0.0).to(NUMBER)
    if SWISH:
        x = tl.load(y + row * y_stride + columns, mask=inside, other=0.0).to(NUMBER)
        gate = 1 / (1 + tl.exp(-x))
        gradient *= gate * (1 + x * (1 - gate))
    tl.store(joined + row * stride + columns, gradient, mask=inside)


def join(ys: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """As `swish_op.join_gradients`."""
    rows, widths = len(gradients[0]), [d.shape[1] for d in gradients]
    joined = gradients[0].new_empty(rows, sum(widths))
    begin = 0
    for i, (d, width) in enumerate(zip(gradients, widths, strict=True)):
        y = ys[i] if i < len(ys) else d
        block = min(MOST_COLUMNS, triton.next_power_of_2(max(width, 16)))
        if rows and width:
            join_kernel[rows, triton.cdiv(width, block)](
                y, d, joined[:, begin:], width, y.stride(0), d.stride(0), joined.stride(0),
                SWISH=i < len(ys), BLOCK=block, NUMBER=number(d),
            )  # fmt: skip
        begin += width
    return joined


@triton.jit
def normed_swish_kernel(
    x, weight, y, roots, width, x_stride,
    EPS: tl.constexpr, BLOCK: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """A row: y = swish(x) · root · weight, root = 1 / sqrt(mean(swish(x)²) + eps)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    wide = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(NUMBER)
    swished = wide / (1 + tl.exp(-wide))
    root = 1 / tl.sqrt(tl.sum(swished * swished, 0) / width + EPS)
    result = swished * root
    if weight is not None:
        result *= tl.load(weight + columns, mask=inside, other=0.0).to(NUMBER)
    tl.store(y + row * width + columns, result, mask=inside)
    tl.store(roots + row, root)


@triton.jit
def normed_swish_backward_kernel(
    x, weight, roots, d_y, d_x, y, d_weights, rows, width, x_stride, d_y_stride,
    BLOCK: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Every so-manieth row: d_x, and y again; and of these rows the weight's gradient."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.full([BLOCK], 1, NUMBER)
    if weight is not None:
        scale = tl.load(weight + columns, mask=inside, other=0.0).to(NUMBER)
    d_weight = tl.zeros([BLOCK], NUMBER)
    for i in range((rows - tl.program_id(0) + programs - 1) // programs):
        place = program + i * programs
        wide = tl.load(x + place * x_stride + columns, mask=inside, other=0.0).to(NUMBER)
        slope = tl.load(d_y + place * d_y_stride + columns, mask=inside, other=0.0).to(NUMBER)
        root = tl.load(roots + place)
        gate = 1 / (1 + tl.exp(-wide))
        normed = wide * gate * root
        tl.store(y + place * width + columns, normed * scale, mask=inside)
        d_weight += slope * normed
        slope *= scale
        slope = (slope - normed * (tl.sum(slope * normed, 0) / width)) * root
        slope *= gate * (1 + wide * (1 - gate))
        tl.store(d_x + place * width + columns, slope, mask=inside)
    if weight is not None:
        tl.store(d_weights + program * width + columns, d_weight, mask=inside)


def normed(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """As `swish_op.normed_swish`."""
    rows, width = x.shape
    y, roots = x.new_empty(rows, width), x.new_empty(rows, dtype=compute_dtype(x.dtype))
    if rows:
        normed_swish_kernel[(rows,)](
            x, weight, y, roots, width, x.stride(0), EPS=eps, **whole_rows(x)
        )
    return y, roots


def normed_backward(
    x: Tensor, weight: Tensor | None, roots: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `swish_op.normed_swish_backward`."""
    rows, width = x.shape
    programs = min(PROGRAMS, rows)
    y, d_x = x.new_empty(rows, width), x.new_empty(rows, width)
    d_weights = roots.new_empty(0 if weight is None else programs, width)
    if rows:
        normed_swish_backward_kernel[(programs,)](
            x, weight, roots, d_y, d_x, y, d_weights, rows, width, x.stride(0), d_y.stride(0),
            **whole_rows(x),
        )  # fmt: skip
    return d_x, y, x.new_empty(0) if weight is None else d_weights.sum(0).to(weight.dtype)


def whole_rows(x: Tensor) -> dict[str, object]:
    """Compile-time parameters of a kernel that holds a row: sixteen numbers a thread."""
    block = triton.next_power_of_2(max(x.shape[1], 16))
    return dict(BLOCK=block, NUMBER=number(x), num_warps=max(1, min(16, block // 512)))


def number(x: Tensor) -> tl.dtype:
    return tl.float64 if compute_dtype(x.dtype) == torch.float64 else tl.float32
