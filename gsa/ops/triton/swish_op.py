"""Gradients side by side, some of them through swish, as an operator for torch.compile.

Left to the compiler, one kernel asks at every number which part it is in, and takes four times as
long as memory does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import infer_schema


def join_gradients(ys: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Gradients [N, P_i] side by side, [N, sum of P_i].

    The first are those of swish(y) for each y of `ys` and become those of y; others stay what they
    are. Swish and its slope are computed in fp32 (fp64 for fp64).
    """
    from gsa.ops.triton import swish

    def rows(x: Tensor) -> Tensor:
        return x if x.stride(-1) == 1 else x.contiguous()

    with torch.cuda.device_of(gradients[0]):
        return swish.join([rows(y) for y in ys], [rows(d) for d in gradients])


def join_gradients_fake(ys, gradients):
    return gradients[0].new_empty(gradients[0].shape[0], sum(d.shape[1] for d in gradients))


torch.library.define(
    "gsa::join_gradients",
    infer_schema(join_gradients, mutates_args=()),
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("gsa::join_gradients", "default", join_gradients)
torch.library.register_fake("gsa::join_gradients", join_gradients_fake)
