"""Gradients side by side, some of them through swish: a Triton kernel."""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 2048
"""Of a program: sixteen a thread."""


@triton.jit
def join_kernel(
    y, d, joined, width, y_stride, d_stride, stride,
    SWISH: tl.constexpr, BLOCK: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Some columns of a row of `joined`, from a pointer on: d, times swish's slope at y if SWISH."""
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
    """As `swish_op.join_gradients`; the last stride of all is 1."""
    rows, widths = len(gradients[0]), [d.shape[1] for d in gradients]
    joined = gradients[0].new_empty(rows, sum(widths))
    number = tl.float64 if joined.dtype == torch.float64 else tl.float32
    begin = 0
    for i, (d, width) in enumerate(zip(gradients, widths, strict=True)):
        y = ys[i] if i < len(ys) else d
        block = min(MOST_COLUMNS, triton.next_power_of_2(max(width, 16)))
        if rows and width:
            join_kernel[rows, triton.cdiv(width, block)](
                y, d, joined[:, begin:], width, y.stride(0), d.stride(0), joined.stride(0),
                SWISH=i < len(ys), BLOCK=block, NUMBER=number,
            )  # fmt: skip
        begin += width
    return joined
