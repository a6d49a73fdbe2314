"""Swish beside the operator, as operators that torch.compile takes as they are; see `swish.py`.

Imports torch only; Triton is loaded when one first runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import infer_schema

from gsa.ops.types import compute_dtype


def rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def join_gradients(ys: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Gradients [N, P_i] side by side, [N, sum of P_i].

    The first are those of swish(y) for each y of `ys` and become those of y; others stay what they
    are. Left to the compiler, one kernel asks at every number which part it is in, and takes four
    times as long as memory does.
    """
    from gsa.ops.triton import swish

    with torch.cuda.device_of(gradients[0]):
        return swish.join([rows(y) for y in ys], [rows(d) for d in gradients])


def join_gradients_fake(ys, gradients):
    return gradients[0].new_empty(gradients[0].shape[0], sum(d.shape[1] for d in gradients))


def normed_swish(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm(swish(x)) of rows x [N, P], times a weight [P]; and [N] what rows were multiplied by.

    eps is added to the mean square.
    """
    from gsa.ops.triton import swish

    with torch.cuda.device_of(x):
        return swish.normed(rows(x), None if weight is None else weight.contiguous(), eps)


def normed_swish_fake(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype))


def normed_swish_backward(
    x: Tensor, weight: Tensor | None, roots: Tensor, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, y again, d_weight) of `normed_swish`, whose second result is `roots`.

    d_weight is empty without a weight. Its rows are summed in one order for a number of rows.
    """
    from gsa.ops.triton import swish

    with torch.cuda.device_of(x):
        weight = None if weight is None else weight.contiguous()
        return swish.normed_backward(rows(x), weight, roots, rows(d_y))


def normed_swish_backward_fake(x, weight, roots, d_y):
    d_weight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), x.new_empty(x.shape), d_weight


for function, fake in (
    (join_gradients, join_gradients_fake),
    (normed_swish, normed_swish_fake),
    (normed_swish_backward, normed_swish_backward_fake),
):
    name = f"gsa::{function.__name__}"
    schema = infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)
