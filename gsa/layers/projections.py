"""The layer's projections, before and behind the operator, and the swish between.

Compiled to be trained on a GPU, each side is one function with a gradient of its own: see
`_Inputs` and `_Output`. Everywhere else they are what they say.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gsa.ops.triton.swish_op  # noqa: F401  (registers operators)
from gsa.layers.norm import RMSNorm

MOST_COLUMNS = 1 << 14
"""Of a row that a program can hold."""


def project(x: Tensor, layers: Mapping[str, nn.Module], swished: str) -> dict[str, Tensor]:
    """What each layer makes of x [..., D], by name; after swish for names in `swished`."""
    if trains_compiled(x):
        plain = {name: layer for name, layer in layers.items() if is_plain(layer)}
        if set(swished) <= set(plain):
            together = project_together(x, plain, swished)
            return {n: together[n] if n in plain else layers[n](x) for n in layers}
    made = {name: layer(x) for name, layer in layers.items()}
    return {name: F.silu(y) if name in swished else y for name, y in made.items()}


def project_together(x: Tensor, layers: Mapping[str, nn.Module], swished: str) -> dict[str, Tensor]:
    """The same for plain layers, by `_Inputs`."""
    names = [*swished, *(name for name in layers if name not in swished)]
    dtype = product_dtype(x)
    weights = [layers[name].weight.to(dtype) for name in names]
    parts = _Inputs.apply(x.to(dtype), len(swished), *weights)
    return dict(zip(names, parts, strict=True))  # pyright: ignore[reportArgumentType]


def project_normed(x: Tensor, norm: RMSNorm, layer: nn.Module) -> Tensor:
    """layer(norm(swish(x))) of x [..., P]."""
    if trains_compiled(x) and is_plain(layer) and x.shape[-1] <= MOST_COLUMNS:
        return project_normed_together(x, norm, layer)
    return layer(norm(F.silu(x)))


def project_normed_together(x: Tensor, norm: RMSNorm, layer: nn.Module) -> Tensor:
    """The same for a plain layer, by `_Output`."""
    dtype = product_dtype(x)
    return _Output.apply(x.to(dtype), norm.weight, norm.eps, layer.weight.to(dtype))  # pyright: ignore[reportReturnType]


def trains_compiled(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and x.is_cuda


def product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer computes in: x's dtype, or autocast's."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a product with its weight and nothing else: no bias, adapter or hook."""
    return is_linear(layer) and layer.bias is None


def is_linear(layer: nn.Module) -> bool:
    """Whether its weight and bias are all there is to it."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and not hooks


class _Inputs(torch.autograd.Function):
    """x Wᵀ for each weight, after swish for the first `swished` of them.

    Backwards, gradients are laid side by side and weights one below the other, so that the gradient
    of x is one product: left apart, each layer's is written, read again and added up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, swished: int, *weights: Tensor) -> tuple[Tensor, ...]:
        ys = [F.linear(x, weight) for weight in weights]
        ctx.save_for_backward(x, *weights, *ys[:swished])
        ctx.count = len(weights)
        return tuple(F.silu(y) if i < swished else y for i, y in enumerate(ys))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        weights, ys = saved[: ctx.count], saved[ctx.count :]
        d_y = torch.ops.gsa.join_gradients.default(
            [y.flatten(0, -2) for y in ys], [d.flatten(0, -2) for d in gradients]
        )
        d_x = (d_y @ torch.cat(weights)).view(x.shape)
        d_weights = (d_y.T @ x.flatten(0, -2)).split([len(weight) for weight in weights])
        return d_x, None, *d_weights


class _Output(torch.autograd.Function):
    """RMSNorm(swish(x)) Wᵀ.

    Backwards, the norm's result is made again on the way to x's gradient, by a pass that reads what
    it takes anyway; so it is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor
    ) -> Tensor:
        normed, roots = torch.ops.gsa.normed_swish.default(x.flatten(0, -2), norm_weight, eps)
        ctx.save_for_backward(x, norm_weight, roots, weight)
        return F.linear(normed.view(x.shape), weight)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, norm_weight, roots, weight = ctx.saved_tensors
        d_rows = d_output.flatten(0, -2)
        d_x, normed, d_norm = torch.ops.gsa.normed_swish_backward.default(
            x.flatten(0, -2), norm_weight, roots, d_rows @ weight
        )
        d_norm = None if norm_weight is None else d_norm
        return d_x.view(x.shape), d_norm, None, d_rows.T @ normed
