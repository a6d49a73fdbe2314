"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.ops.types import compute_dtype


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, computed in fp32 (fp64 for fp64).

    Args:
        width: size of the last axis.
        eps: added to the mean square.
        affine: False leaves the weight out.
    """

    def __init__(self, width: int, eps: float, *, affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.dtype)
        weight = None if self.weight is None else self.weight.to(dtype)
        if torch.compiler.is_compiling():  # fuses better than rms_norm's own backward pass does
            wide = x.to(dtype)
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return (wide if weight is None else wide * weight).to(x.dtype)
        return F.rms_norm(x.to(dtype), x.shape[-1:], weight, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, affine={self.weight is not None}"


class HeadNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) · weight + bias of each head, in fp32 (fp64 for fp64).

    RWKV6's group norm, on [..., heads, width]. Weight and bias [heads, width].

    Args:
        affine: False leaves weight and bias out.
    """

    def __init__(self, heads: int, width: int, eps: float, *, affine: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(heads, width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.dtype)
        normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=self.eps)
        if self.weight is not None and self.bias is not None:
            normed = normed * self.weight.to(dtype) + self.bias.to(dtype)
        return normed.to(x.dtype)
