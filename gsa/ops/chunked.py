"""Gated slot attention in chunks of C tokens: matrix products instead of a loop over tokens.

Within a chunk let G_i be the sum of log f up to and including token i, and `start` the memory
before it. Then (paper Appendix A, with keys and values as one memory)

    memory after the chunk = exp(G_C) · start + Σ_j (exp(G_C - G_j) · w_j) ⊗ [k_j ; v_j]
    score_i  = scale · ( exp(G_i) · start_k q_i + Σ_{j≤i} exp(G_i - G_j) · w_j · (k_j · q_i) )
    output_i = Σ_m p_im ( exp(G_im) · start_v[m] + Σ_{j≤i} exp(G_im - G_jm) · w_jm · v_j )

The first line is the write side (`memory_forward`, `memory_backward`), the others the read side
(`readout_forward`, `readout_backward`): one function per stage, so that a kernel has a twin to be
compared with. The write side never sees a factor above 1. The read side has two forms:

- fast, here: exp(G_i - G_j) is split into exp(G_i - S) · exp(S - G_j), so that whole tiles are
  multiplied. Exact as long as both are far from overflow, which the decay of the chunk decides.
- exact for any decay, in `chunked_exact.py`, taken by the tiles that need it.

G is summed and exponentiated in fp64: in fp32 its rounding would be amplified by the size of the
sum. Nothing is ever clamped.

Two products are summed when each is complete (`bmm` + `add_`, not `baddbmm_`): accumulated on top
of a larger number, each of the C terms of the second would be rounded at that number's size.

Keys of width K = 0 mean that there are no scores: q [U, R, C, M] is the scores itself. With the
activation "identity" that is gated linear attention, k being the write and q the read weights.

Letters as in `gsa/ops/types.py`. A tile is one chunk of one key/value head; U tiles are computed
together, the query heads of a group side by side: q [U, R, C, K].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gsa.ops.activation import activate, activation_backward
from gsa.ops.chunked_exact import Tiles, decay_after, readout_exact, readout_exact_backward
from gsa.ops.types import SlotActivation

# Largest exponent of the fast form: in fp32 exp(60) leaves room for another 1e12 before overflow.
# fp64 is for checking and never takes it: G itself can't be summed more precisely.
FAST_LIMIT = {torch.float32: 60.0, torch.float64: -1.0}

STEEP = 0.9
"""A slot that decays faster per token, in log f, has a gate gradient lost in rounding noise."""


class Read(NamedTuple):
    """How the read side is computed: `scale` on the scores, then the activation."""

    scale: float
    slot_activation: SlotActivation


class Written(NamedTuple):
    """The write side of U tiles."""

    faded_write: Tensor  # [U, C, M]  exp(G_C - G_j) · w_j
    remain: Tensor  # [U, C, M]  exp(G_C - G_j)
    fade: Tensor  # [U, M, 1]  exp(G_C)


class TileGradients(NamedTuple):
    """Gradients of `Tiles`, that of G in fp64 since its parts cancel."""

    q: Tensor
    k: Tensor
    v: Tensor
    write: Tensor
    decay_sum: Tensor


def write_factors(tiles: Tiles, exact: Tensor) -> Written:
    """The difference is taken in fp64; its exponential is at most 1, so fp32 suffices for it.

    Where G is so large that even fp64 rounds it too coarsely (`exact`), the sum is taken afresh.
    """
    dtype = tiles.write.dtype
    total = tiles.decay_sum[:, -1:]
    rest = total - tiles.decay_sum
    if exact.numel():
        rest.index_copy_(0, exact, decay_after(tiles.log_forget.index_select(0, exact), 1))
    remain = rest.to(dtype).exp_()
    return Written(remain * tiles.write, remain, total.to(dtype).exp().mT)


def memory_update(tiles: Tiles, written: Written) -> Tensor:
    """What each chunk adds to the memory: [U, M, X]."""
    U, C, K = tiles.k.shape
    M, V = written.faded_write.shape[2], tiles.v.shape[2]
    update = tiles.k.new_empty(U, M, K + V)
    torch.bmm(written.faded_write.mT, tiles.k, out=update[..., :K])
    torch.bmm(written.faded_write.mT, tiles.v, out=update[..., K:])
    return update


class Fast(NamedTuple):
    """The factors of the fast form; not finite in tiles beyond it."""

    grow: Tensor  # [U, C, M]  exp(G_i - S)
    lifted: Tensor  # [U, C, M]  exp(S - G_j) · w_j
    fade_in: Tensor | None  # [U, M, 1]  exp(S), None if S = 0 throughout


def fast_factors(tiles: Tiles) -> Fast:
    """S is 0, or half of G_C in slots where G_C would take exp(-G_j) out of range.

    Not half of G_C everywhere: S = 0 depends on no later token, and costs nothing.
    """
    dtype = tiles.write.dtype
    total = tiles.decay_sum[:, -1:]
    steep = total < -FAST_LIMIT[dtype]
    if not steep.any():
        grow = tiles.decay_sum.exp().to(dtype)
        return Fast(grow, tiles.write / grow, None)
    shift = torch.where(steep, total / 2, 0.0)
    grow = (tiles.decay_sum - shift).exp_().to(dtype)
    return Fast(grow, tiles.write / grow, shift.exp_().to(dtype).mT)


def beyond_fast(tiles: Tiles) -> Tensor:
    """Indices of the tiles that the fast form cannot do: int64 [number of tiles]. Either

    - the decay of a slot is too strong, or that of all slots is: then d log f is small against the
      parts it is the difference of, and rounding would show;
    - or a value or write is not finite, which the zeros above the diagonal would carry to earlier
      tokens (0 · NaN).
    """
    total = tiles.decay_sum[:, -1]
    tokens = (tiles.log_forget.amin(-1) < 0).sum(1)  # without padding
    beyond = total.amin(-1) < -2 * FAST_LIMIT[tiles.write.dtype]
    beyond |= total.amax(-1) < -STEEP * tokens
    beyond |= ~(tiles.v.sum((1, 2)) + tiles.write.sum((1, 2))).isfinite()
    return beyond.nonzero().flatten()


def causal_(product_URCC: Tensor) -> Tensor:
    """Keeps j <= i, in place."""
    return product_URCC.tril_()


def readout_forward(
    tiles: Tiles, exact: Tensor, start: Tensor, read: Read
) -> tuple[Tensor, Tensor]:
    """Reads the memory at every token of every tile.

    exact: indices of the tiles beyond the fast form. start: [U, M, X], the memory before them.
    Returns (output [U, R, C, V], score [U, R, C, M] before the activation).
    """
    U, R, C, _ = tiles.q.shape
    K = tiles.k.shape[2]
    fast = fast_factors(tiles)
    memory = start if fast.fade_in is None else start * fast.fade_in
    score = fast_scores(tiles, fast, memory[..., :K], read.scale)
    weight = (activate(score, read.slot_activation) * fast.grow[:, None]).flatten(1, 2)
    mix = causal_(torch.bmm(weight, fast.lifted.mT).view(U, R, C, C)).view(U, R * C, C)
    output = torch.bmm(weight, memory[..., K:]).add_(torch.bmm(mix, tiles.v)).unflatten(1, (R, C))
    if exact.numel():
        redone = readout_exact(tiles.at(exact), start.index_select(0, exact), *read)
        output.index_copy_(0, exact, redone[0])
        score.index_copy_(0, exact, redone[1])
    return output, score


def fast_scores(tiles: Tiles, fast: Fast, keys: Tensor, scale: float) -> Tensor:
    """[U, R, C, M]. keys: [U, M, K], faded as the values are. Without keys, q is the scores."""
    U, R, C, _ = tiles.q.shape
    if keys.shape[2] == 0:
        return tiles.q * scale
    q = tiles.q.flatten(1, 2)
    inside = causal_(torch.bmm(q, tiles.k.mT).view(U, R, C, C)).view(U, R * C, C)
    score = torch.bmm(q, keys.mT).add_(torch.bmm(inside, fast.lifted)).unflatten(1, (R, C))
    score.mul_(fast.grow[:, None])
    return score if scale == 1 else score.mul_(scale)


def readout_backward(
    tiles: Tiles, exact: Tensor, start: Tensor, score: Tensor, d_output: Tensor, read: Read
) -> tuple[TileGradients, Tensor]:
    """Gradients of `readout_forward` for d_output [U, R, C, V]; the second result is d start."""
    U, R, C, _ = tiles.q.shape
    K = tiles.k.shape[2]
    grow, lifted, fade_in = fast_factors(tiles)
    memory = start if fade_in is None else start * fade_in
    q, d_out = tiles.q.flatten(1, 2), d_output.flatten(1, 2)
    weight = activate(score, read.slot_activation)

    d_mix = causal_(torch.bmm(d_out, tiles.v.mT).view(U, R, C, C)).view(U, R * C, C)
    d_weight = (
        torch.bmm(d_out, memory[..., K:].mT).add_(torch.bmm(d_mix, lifted)).unflatten(1, (R, C))
    )
    d_weight.mul_(grow[:, None])
    d_score = activation_backward(score, weight, d_weight, read.slot_activation)
    d_decay = d_weight.double() * weight
    if K:
        d_decay.addcmul_(score.double(), d_score.double())
    d_decay = d_decay.sum(1)

    weight = (weight * grow[:, None]).flatten(1, 2)
    mix = causal_(torch.bmm(weight, lifted.mT).view(U, R, C, C)).view(U, R * C, C)
    d_lifted = torch.bmm(d_mix.mT, weight)
    d_start = torch.empty_like(start)
    torch.bmm(weight.mT, d_out, out=d_start[..., K:])
    if K:
        d_score = (
            d_score * (grow * read.scale)[:, None] if read.scale != 1 else d_score * grow[:, None]
        )
        d_score = d_score.flatten(1, 2)
        inside = causal_(torch.bmm(q, tiles.k.mT).view(U, R, C, C)).view(U, R * C, C)
        d_inside = causal_(torch.bmm(d_score, lifted.mT).view(U, R, C, C)).view(U, R * C, C)
        d_lifted = torch.bmm(inside.mT, d_score).add_(d_lifted)
        d_q = torch.bmm(d_inside, tiles.k).add_(torch.bmm(d_score, memory[..., :K]))
        d_k = torch.bmm(d_inside.mT, q)
        torch.bmm(d_score.mT, q, out=d_start[..., :K])
    else:
        d_q, d_k = d_score * read.scale, torch.zeros_like(tiles.k)
    if fade_in is not None:
        d_start.mul_(fade_in)
    gradients = TileGradients(
        q=d_q.view(tiles.q.shape),
        k=d_k,
        v=torch.bmm(mix.mT, d_out),
        write=d_lifted / grow,
        decay_sum=d_decay.addcmul_(lifted.double(), d_lifted.double(), value=-1),
    )

    if exact.numel():
        redone = readout_exact_backward(
            tiles.at(exact), start.index_select(0, exact), d_output.index_select(0, exact), *read
        )
        for whole, part in zip((*gradients, d_start), redone, strict=True):
            whole.index_copy_(0, exact, part.to(whole.dtype))
    return gradients, d_start


def write_backward(
    tiles: Tiles, written: Written, start: Tensor, d_end: Tensor, gradients: TileGradients
) -> Tensor:
    """Adds the write side's gradients, for d_end [U, M, X], that of the memory after each chunk.

    Updates `gradients` (k, v, write) in place. Returns d_log_forget [U, C, M].

    For log f_t the read side gives Σ_{i≥t} dG_i. On the write side f_t fades every token j < t and
    the memory before the chunk: Σ_{j<t} faded_w_j · d faded_w_j + exp(G_C) · rowsum(start ⊙ d_end).
    """
    K = tiles.k.shape[2]
    d_keys, d_values = d_end[..., :K], d_end[..., K:]
    d_faded = torch.bmm(tiles.k, d_keys.mT).add_(torch.bmm(tiles.v, d_values.mT))
    gradients.k.add_(torch.bmm(written.faded_write, d_keys))
    gradients.v.add_(torch.bmm(written.faded_write, d_values))
    gradients.write.addcmul_(d_faded, written.remain)

    d_faded.mul_(written.faded_write)
    carried = (start * d_end).sum(-1).mul_(written.fade[..., 0])
    # In fp64, since they cancel; each summed from its own end, so that what is zero stays zero.
    d_log_forget = gradients.decay_sum.flip(1).cumsum(1, dtype=torch.float64).flip(1)
    d_log_forget[:, 1:] += d_faded[:, :-1].cumsum(1, dtype=torch.float64)
    return d_log_forget.add_(carried[:, None]).to(start.dtype)
