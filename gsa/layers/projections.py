"""Linear layers that share an input, some of them followed by swish."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gsa.ops.triton.swish_op  # noqa: F401  (registers the operator)


def project_swished(x: Tensor, layers: Mapping[str, nn.Module], swished: str) -> dict[str, Tensor]:
    """What each layer makes of x [..., D], by name; after swish for names in `swished`."""
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and x.is_cuda:
        plain = {name: layer for name, layer in layers.items() if is_plain(layer)}
        if set(swished) <= set(plain):
            together = project_together(x, plain, swished)
            return {n: together[n] if n in plain else layers[n](x) for n in layers}
    made = {name: layer(x) for name, layer in layers.items()}
    return {name: F.silu(y) if name in swished else y for name, y in made.items()}


def project_together(x: Tensor, layers: Mapping[str, nn.Module], swished: str) -> dict[str, Tensor]:
    """The same for plain layers, with gradients that are two products (`_Projections`)."""
    names = [*swished, *(name for name in layers if name not in swished)]
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    weights = [layers[name].weight.to(dtype) for name in names]
    parts = _Projections.apply(x.to(dtype), len(swished), *weights)
    return dict(zip(names, parts, strict=True))  # pyright: ignore[reportArgumentType]


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a product with its weight and nothing else: no bias, adapter or hook."""
    return type(layer) is nn.Linear and layer.bias is None and not layer._forward_hooks


class _Projections(torch.autograd.Function):
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
