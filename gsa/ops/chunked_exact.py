"""The read side of a chunk for any decay, however strong: factors are never above 1.

exp(G_i - G_j) cannot be split at a point shared by the whole chunk once G spans more than the
dtype's exponents. It can be split at any point between j and i. So the chunk is halved again and
again: for i in the right and j in the left half of a block, split at the border between them; both
factors are at most 1. The blocks of one level are multiplied together, log2(C) levels, and i = j
needs no factor at all.

A token is never multiplied with an earlier query, so that a NaN or infinity among the values or
writes of one token does not reach the tokens before it.

Slower than whole tiles, and only for the tiles that need it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gsa.ops.activation import activate, activation_backward
from gsa.ops.types import SlotActivation


class Tiles(NamedTuple):
    """The token-wise inputs of U tiles, in the compute dtype, and G in fp64."""

    q: Tensor  # [U, R, C, K]
    k: Tensor  # [U, C, K]
    v: Tensor  # [U, C, V]
    write: Tensor  # [U, C, M]
    log_forget: Tensor  # [U, C, M]
    decay_sum: Tensor  # [U, C, M]

    def at(self, index: Tensor) -> "Tiles":
        return Tiles(*(tensor.index_select(0, index) for tensor in self))


def halvings(chunk: int) -> Iterator[int]:
    """Half lengths of the blocks: C/2, C/4, ..., 1."""
    half = chunk // 2
    while half:
        yield half
        half //= 2


def decay_after(log_forget: Tensor, dim: int) -> Tensor:
    """Sum of log f over the tokens after each one, in fp64, without a subtraction."""
    later = log_forget.narrow(dim, 1, log_forget.shape[dim] - 1)
    rest = torch.zeros(log_forget.shape, dtype=torch.float64, device=log_forget.device)
    rest.narrow(dim, 0, later.shape[dim]).copy_(
        later.flip(dim).cumsum(dim, dtype=torch.float64).flip(dim)
    )
    return rest


def border_factors(log_forget: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Factors of blocks of 2·half tokens, each [U, blocks, half, M].

    exp(G_i - G_border) right of the border, exp(G_border - G_j) left of it. Summed from the border
    outwards: a decay elsewhere in the chunk, however large, does not round these.
    """
    log_f = log_forget.unflatten(1, (-1, 2, half))
    right = log_f[:, :, 1].cumsum(2, dtype=torch.float64)
    left = decay_after(log_f[:, :, 0], 2)
    return right.to(log_forget.dtype).exp(), left.to(log_forget.dtype).exp()


def left_write(write: Tensor, half: int) -> Tensor:
    """The writes left of each border: [U, blocks, half, M]."""
    return write.unflatten(1, (-1, 2, half))[:, :, 0]


def blocks_below(square_URCC: Tensor, half: int) -> Tensor:
    """The (right, left) blocks of each level: a view [U, R, blocks, half, half]."""
    split = square_URCC.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
    return split[:, :, :, 1, :, :, 0, :].diagonal(dim1=2, dim2=4).movedim(-1, 2)


def scores_inside(inside_URCC: Tensor, write: Tensor, log_forget: Tensor) -> Tensor:
    """Σ_{j≤i} exp(G_i - G_j) · w_j · inside_ij: [U, R, C, M]."""
    score = inside_URCC.diagonal(dim1=-2, dim2=-1)[..., None] * write[:, None]
    for half in halvings(write.shape[1]):
        right, left = border_factors(log_forget, half)
        left = left * left_write(write, half)
        part = blocks_below(inside_URCC, half) @ left[:, None]
        score.unflatten(2, (-1, 2, half))[:, :, :, 1] += part * right[:, None]
    return score


def mix_inside(weight_URCM: Tensor, write: Tensor, log_forget: Tensor) -> Tensor:
    """Σ_m weight_im · exp(G_im - G_jm) · w_jm for j <= i, else 0: [U, R, C, C]."""
    mix = torch.diag_embed((weight_URCM * write[:, None]).sum(-1))
    for half in halvings(write.shape[1]):
        right, left = border_factors(log_forget, half)
        left = left * left_write(write, half)
        weight = weight_URCM.unflatten(2, (-1, 2, half))[:, :, :, 1]
        blocks_below(mix, half).copy_((weight * right[:, None]) @ left[:, None].mT)
    return mix


def apply_mix(mix_URCC: Tensor, v: Tensor) -> Tensor:
    """mix · v, block by block: what lies above the diagonal is not even multiplied by zero."""
    output = mix_URCC.diagonal(dim1=-2, dim2=-1)[..., None] * v[:, None]
    for half in halvings(v.shape[1]):
        left = v.unflatten(1, (-1, 2, half))[:, :, 0]
        part = blocks_below(mix_URCC, half) @ left[:, None]
        output.unflatten(2, (-1, 2, half))[:, :, :, 1] += part
    return output


def readout_exact(
    tiles: Tiles, start: Tensor, scale: float, slot_activation: SlotActivation
) -> tuple[Tensor, Tensor]:
    """`readout_forward` without a bound on the decay. Returns (output, score)."""
    q, k, v, write, log_forget, decay_sum = tiles
    K = k.shape[-1]
    grow = decay_sum.to(write.dtype).exp()[:, None]
    score = scale * q
    if K:
        inside = scores_inside(q @ k[:, None].mT, write, log_forget)
        score = scale * (grow * (q @ start[:, None, :, :K].mT) + inside)
    weight = activate(score, slot_activation)
    mix = mix_inside(weight, write, log_forget)
    return (weight * grow) @ start[:, None, :, K:] + apply_mix(mix, v), score


class PairGradients:
    """Gradients of w and G through exp(G_i - G_j) · w_j, gathered over levels and both uses.

    The border cancels: it is subtracted on the right as often as it is added on the left.
    """

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.write = torch.zeros_like(tiles.write)
        self.decay_sum = torch.zeros_like(tiles.decay_sum)

    def add(self, half: int, d_right: Tensor, d_left: Tensor) -> None:
        """d_right, d_left: gradients of exp(G_i - G_border) and of w_j · exp(G_border - G_j)."""
        right, left = border_factors(self.tiles.log_forget, half)
        d_write, d_decay = (x.unflatten(1, (-1, 2, half)) for x in (self.write, self.decay_sum))
        d_left = d_left * left
        d_write[:, :, 0] += d_left
        d_decay[:, :, 1] += d_right * right
        d_decay[:, :, 0] -= d_left * left_write(self.tiles.write, half)


def mix_inside_backward(weight: Tensor, d_mix: Tensor, pairs: PairGradients) -> Tensor:
    """Gradient of `mix_inside` for the weights; those of w and G are added to `pairs`."""
    write, log_forget = pairs.tiles.write, pairs.tiles.log_forget
    d_same = d_mix.diagonal(dim1=-2, dim2=-1)[..., None]
    d_weight = d_same * write[:, None]
    pairs.write += (d_same * weight).sum(1)
    for half in halvings(write.shape[1]):
        right, left = border_factors(log_forget, half)
        left = left * left_write(write, half)
        read = weight.unflatten(2, (-1, 2, half))[:, :, :, 1]
        d_block = blocks_below(d_mix, half)
        d_read = d_block @ left[:, None]
        d_weight.unflatten(2, (-1, 2, half))[:, :, :, 1] += d_read * right[:, None]
        d_left = (d_block.mT @ (read * right[:, None])).sum(1)
        pairs.add(half, (d_read * read).sum(1), d_left)
    return d_weight


def scores_inside_backward(inside: Tensor, d_score: Tensor, pairs: PairGradients) -> Tensor:
    """Gradient of `scores_inside` for `inside`; those of w and G are added to `pairs`."""
    write, log_forget = pairs.tiles.write, pairs.tiles.log_forget
    d_inside = torch.diag_embed((d_score * write[:, None]).sum(-1))
    pairs.write += (d_score * inside.diagonal(dim1=-2, dim2=-1)[..., None]).sum(1)
    for half in halvings(write.shape[1]):
        right, left = border_factors(log_forget, half)
        left = left * left_write(write, half)
        block = blocks_below(inside, half)
        d_part = d_score.unflatten(2, (-1, 2, half))[:, :, :, 1]
        d_product = d_part * right[:, None]
        blocks_below(d_inside, half).copy_(d_product @ left[:, None].mT)
        d_left = (block.mT @ d_product).sum(1)
        pairs.add(half, (d_part * (block @ left[:, None])).sum(1), d_left)
    return d_inside


def readout_exact_backward(
    tiles: Tiles,
    start: Tensor,
    d_output: Tensor,
    scale: float,
    slot_activation: SlotActivation,
) -> tuple[Tensor, ...]:
    """Gradients for (q, k, v, write, G, start), computed and returned in fp64.

    What strong decays leave of d G is small against the parts it is the difference of.
    """
    tiles = Tiles(*(tensor.double() for tensor in tiles))
    start, d_output = start.double(), d_output.double()
    q, k, v, write, log_forget, decay_sum = tiles
    K = k.shape[-1]
    start_k, start_v = start[:, None, :, :K], start[:, None, :, K:]
    grow = decay_sum.to(write.dtype).exp()[:, None]
    inside, before, score = None, None, scale * q
    if K:
        inside = q @ k[:, None].mT
        before = grow * (q @ start_k.mT)
        score = scale * (before + scores_inside(inside, write, log_forget))
    weight = activate(score, slot_activation)
    mix = mix_inside(weight, write, log_forget)
    pairs = PairGradients(tiles)

    d_weight_before = grow * (d_output @ start_v.mT)
    d_mix = (d_output @ v[:, None].mT).tril()
    d_weight_inside = mix_inside_backward(weight, d_mix, pairs)
    d_score = scale * activation_backward(
        score, weight, d_weight_before + d_weight_inside, slot_activation
    )
    d_decay = d_weight_before * weight
    d_q, d_k, d_start_k = d_score, torch.zeros_like(k), torch.zeros_like(start[..., :K])
    if inside is not None and before is not None:
        d_inside = scores_inside_backward(inside, d_score, pairs)
        d_before = d_score * grow
        d_decay += d_score * before
        d_q = d_inside @ k[:, None] + d_before @ start_k
        d_k = (d_inside.mT @ q).sum(1)
        d_start_k = (d_before.mT @ q).sum(1)
    d_start_v = ((weight * grow).mT @ d_output).sum(1)
    return (
        d_q,
        d_k,
        (mix.mT @ d_output).sum(1),
        pairs.write,
        pairs.decay_sum + d_decay.sum(1),
        torch.cat([d_start_k, d_start_v], -1),
    )
