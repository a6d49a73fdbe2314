"""The read side of a chunk for any decay, however strong: factors are never above 1.

exp(G_i - G_j) cannot be split at a point shared by the whole chunk once G spans more than the
dtype's exponents. It can be split at any point between j and i. So the chunk is halved again and
again: for i in the right and j in the left half of a block, split at the border between them; both
factors are at most 1. The blocks of one level are multiplied together, log2(C) levels, and i = j
needs no factor at all.

Slower than whole tiles, and only for the tiles that need it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gsa.ops.activation import activate, activation_backward
from gsa.ops.types import SlotActivation


def halvings(chunk: int) -> Iterator[int]:
    """Half lengths of the blocks: C/2, C/4, ..., 1."""
    half = chunk // 2
    while half:
        yield half
        half //= 2


def border_factors(write: Tensor, decay_sum: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Factors of blocks of 2·half tokens, each [U, blocks, half, M].

    exp(G_i - G_border) right of the border, w_j · exp(G_border - G_j) left of it.
    """
    G = decay_sum.unflatten(1, (-1, 2, half))
    border = G[:, :, 0, -1:]
    right = (G[:, :, 1] - border).to(write.dtype).exp()
    left = (border - G[:, :, 0]).to(write.dtype).exp()
    return right, left * write.unflatten(1, (-1, 2, half))[:, :, 0]


def blocks_below(square_URCC: Tensor, half: int) -> Tensor:
    """The (right, left) blocks of each level: a view [U, R, blocks, half, half]."""
    split = square_URCC.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return split[:, :, :, 1, :, :, 0, :].diagonal(dim1=2, dim2=4).movedim(-1, 2)


def scores_inside(inside_URCC: Tensor, write: Tensor, decay_sum: Tensor) -> Tensor:
    """Σ_{j≤i} exp(G_i - G_j) · w_j · inside_ij: [U, R, C, M]."""
    score = inside_URCC.diagonal(dim1=-2, dim2=-1)[..., None] * write[:, None]
    for half in halvings(write.shape[1]):
        right, left = border_factors(write, decay_sum, half)
        part = right[:, None] * (blocks_below(inside_URCC, half) @ left[:, None])
        empty = torch.zeros_like(part)
        score = score + torch.stack([empty, part], 3).flatten(2, 4)
    return score


def mix_inside(weight_URCM: Tensor, write: Tensor, decay_sum: Tensor) -> Tensor:
    """Σ_m weight_im · exp(G_im - G_jm) · w_jm for j <= i, else 0: [U, R, C, C]."""
    mix = torch.diag_embed((weight_URCM * write[:, None]).sum(-1))
    for half in halvings(write.shape[1]):
        right, left = border_factors(write, decay_sum, half)
        weight = weight_URCM.unflatten(2, (-1, 2, half))[:, :, :, 1]
        blocks_below(mix, half).copy_((weight * right[:, None]) @ left[:, None].mT)
    return mix


def readout_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor,
    decay_sum: Tensor,
    start: Tensor,
    scale: float,
    slot_activation: SlotActivation,
) -> tuple[Tensor, Tensor]:
    """`readout_forward` without a bound on the decay. Returns (output, score)."""
    K = k.shape[-1]
    grow = decay_sum.to(write.dtype).exp()[:, None]
    inside = scores_inside(q @ k[:, None].mT, write, decay_sum)
    score = scale * (grow * (q @ start[:, None, :, :K].mT) + inside)
    weight = activate(score, slot_activation)
    mix = mix_inside(weight, write, decay_sum)
    return (weight * grow) @ start[:, None, :, K:] + mix @ v[:, None], score


class PairGradients:
    """Gradients of w and G through exp(G_i - G_j) · w_j, gathered over levels and both uses.

    The border cancels: it is subtracted on the right as often as it is added on the left.
    """

    def __init__(self, write: Tensor, decay_sum: Tensor) -> None:
        self.write_in, self.decay_in = write, decay_sum
        self.write = torch.zeros_like(write)
        self.decay_sum = torch.zeros_like(write)

    def add(self, half: int, d_right: Tensor, d_left: Tensor) -> None:
        """d_right, d_left: gradients of `border_factors`, [U, blocks, half, M]."""
        right, left = border_factors(self.write_in, self.decay_in, half)
        fade, _ = border_factors(torch.ones_like(self.write_in), self.decay_in, half)[::-1]
        d_write, d_decay = (x.unflatten(1, (-1, 2, half)) for x in (self.write, self.decay_sum))
        d_write[:, :, 0] += d_left * fade
        d_decay[:, :, 1] += d_right * right
        d_decay[:, :, 0] -= d_left * left


def mix_inside_backward(
    weight: Tensor, d_mix: Tensor, write: Tensor, decay_sum: Tensor, pairs: PairGradients
) -> Tensor:
    """Gradient of `mix_inside` for the weights; those of w and G are added to `pairs`."""
    d_same = d_mix.diagonal(dim1=-2, dim2=-1)[..., None]
    d_weight = d_same * write[:, None]
    pairs.write += (d_same * weight).sum(1)
    for half in halvings(write.shape[1]):
        right, left = border_factors(write, decay_sum, half)
        read = weight.unflatten(2, (-1, 2, half))[:, :, :, 1]
        d_block = blocks_below(d_mix, half)
        d_read = d_block @ left[:, None]
        d_weight.unflatten(2, (-1, 2, half))[:, :, :, 1] += d_read * right[:, None]
        d_left = (d_block.mT @ (read * right[:, None])).sum(1)
        pairs.add(half, (d_read * read).sum(1), d_left)
    return d_weight


def scores_inside_backward(
    inside: Tensor, d_score: Tensor, write: Tensor, decay_sum: Tensor, pairs: PairGradients
) -> Tensor:
    """Gradient of `scores_inside` for `inside`; those of w and G are added to `pairs`."""
    d_inside = torch.diag_embed((d_score * write[:, None]).sum(-1))
    pairs.write += (d_score * inside.diagonal(dim1=-2, dim2=-1)[..., None]).sum(1)
    for half in halvings(write.shape[1]):
        right, left = border_factors(write, decay_sum, half)
        block = blocks_below(inside, half)
        d_part = d_score.unflatten(2, (-1, 2, half))[:, :, :, 1]
        d_product = d_part * right[:, None]
        blocks_below(d_inside, half).copy_(d_product @ left[:, None].mT)
        d_left = (block.mT @ d_product).sum(1)
        pairs.add(half, (d_part * (block @ left[:, None])).sum(1), d_left)
    return d_inside


def readout_exact_backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    d_output: Tensor,
    scale: float,
    slot_activation: SlotActivation,
) -> tuple[Tensor, ...]:
    """Gradients for `inputs` = (q, k, v, write, decay_sum, start)."""
    q, k, v, write, decay_sum, start = inputs
    K = k.shape[-1]
    start_k, start_v = start[:, None, :, :K], start[:, None, :, K:]
    grow = decay_sum.to(write.dtype).exp()[:, None]
    inside = q @ k[:, None].mT
    before = grow * (q @ start_k.mT)
    score = scale * (before + scores_inside(inside, write, decay_sum))
    weight = activate(score, slot_activation)
    mix = mix_inside(weight, write, decay_sum)
    pairs = PairGradients(write, decay_sum)

    d_weight_before = grow * (d_output @ start_v.mT)
    d_mix = (d_output @ v[:, None].mT).tril()
    d_weight_inside = mix_inside_backward(weight, d_mix, write, decay_sum, pairs)
    d_score = scale * activation_backward(
        score, weight, d_weight_before + d_weight_inside, slot_activation
    )
    d_inside = scores_inside_backward(inside, d_score, write, decay_sum, pairs)
    d_before = d_score * grow
    d_decay = (d_weight_before * weight + d_score * before).sum(1)
    d_start_k = (d_before.mT @ q).sum(1)
    d_start_v = ((weight * grow).mT @ d_output).sum(1)
    return (
        d_inside @ k[:, None] + d_before @ start_k,
        (d_inside.mT @ q).sum(1),
        (mix.mT @ d_output).sum(1),
        pairs.write,
        pairs.decay_sum + d_decay,
        torch.cat([d_start_k, d_start_v], -1),
    )
