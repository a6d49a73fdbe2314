"""A causal depthwise convolution over the last few tokens, that knows padding and documents."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.layers.token_layout import TokenLayout


class ShortConvolution(nn.Module):
    """y_t = swish(Σ_j weight[:, 0, conv_size-1-j] · x_{t-j} + bias), j < conv_size, by channel.

    `t-j` counts real tokens of the same sequence: padding is stepped over, and nothing crosses the
    border of a packed document. Weight [width, 1, conv_size], oldest tap first, as fla stores it.

    Args:
        width: number of channels.
        conv_size: taps, >= 2; the tail to carry between calls is [B, conv_size-1, width].
        bias: whether there is one.
    """

    def __init__(self, width: int, conv_size: int, *, bias: bool = False):
        super().__init__()
        self.conv_size = conv_size
        self.weight = nn.Parameter(torch.empty(width, 1, conv_size))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.conv_size**-0.5), self.conv_size**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x_BTD: Tensor, layout: TokenLayout, tail: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the convolved [B, T, width] and the tail for the next call."""
        history, order = _real_tokens_first(x_BTD, layout.pads, tail, self.conv_size)
        T, newest = x_BTD.shape[1], self.conv_size - 1
        position_T = layout.positions[0] if layout.documents is not None else None
        tap_KD = self.weight[:, 0].T.flip(0)
        y = history[:, newest:] * tap_KD[0]
        for j in range(1, self.conv_size):
            shifted = history[:, newest - j : newest - j + T]
            if position_T is not None:
                shifted = shifted * (position_T >= j)[:, None].to(shifted.dtype)
            y = y + shifted * tap_KD[j]
        y = y if self.bias is None else y + self.bias
        if order is not None:
            y = torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)
        return F.silu(y).to(x_BTD.dtype), _last_real_tokens(history, layout.pads, self.conv_size)


def previous_tokens(
    x_BTD: Tensor, layout: TokenLayout, tail: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The real token before each of x [B, T, D], 0 before the first of a sequence.

    tail: [B, 1, D], as returned for the tokens before; None at the start.
    """
    history, order = _real_tokens_first(x_BTD, layout.pads, tail, 2)
    before = history[:, :-1]
    if layout.documents is not None:
        before = before.masked_fill((layout.positions == 0)[..., None], 0.0)
    if order is not None:
        before = torch.zeros_like(before).scatter(1, order[..., None].expand_as(before), before)
    return before, _last_real_tokens(history, layout.pads, 2)


def next_tail(x_BTD: Tensor, pads: Tensor | None, tail: Tensor | None, conv_size: int) -> Tensor:
    """The tail after tokens x, given the one before them (None at the start)."""
    history, _ = _real_tokens_first(x_BTD, pads, tail, conv_size)
    return _last_real_tokens(history, pads, conv_size)


def _real_tokens_first(
    x_BTD: Tensor, pads: Tensor | None, tail: Tensor | None, conv_size: int
) -> tuple[Tensor, Tensor | None]:
    """The tail and then the tokens, real ones first; and their order, if it is not T's own."""
    B, _, width = x_BTD.shape
    order = None
    if pads is not None and x_BTD.shape[1] > 1:
        order = pads.to(torch.int8).argsort(dim=1, stable=True)
        x_BTD = x_BTD.gather(1, order[..., None].expand_as(x_BTD))
    if tail is None:
        tail = x_BTD.new_zeros(B, conv_size - 1, width)
    return torch.cat([tail.to(x_BTD.dtype), x_BTD], 1), order


def _last_real_tokens(history: Tensor, pads: Tensor | None, conv_size: int) -> Tensor:
    if pads is None:
        # A copy: a view would keep the whole history alive in a cache.
        return history[:, history.shape[1] - conv_size + 1 :].clone()
    first = (~pads).sum(1, keepdim=True)
    index = first + torch.arange(conv_size - 1, device=history.device)
    return history.gather(1, index[..., None].expand(-1, -1, history.shape[2]))
