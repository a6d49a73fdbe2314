"""From logits to the next token of every row, and what follows from it: one program a row.

It does to a row what `gsa.generation.progress` says in torch, where that takes a dozen kernels.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from gsa.ops.triton.step import chaining, power_of_two


@triton.jit
def scramble(x):
    """A bijection of 64-bit integers without a visible order."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def gumbel(key, words_C):
    """Noise of words, as `gsa.generation.sampling.gumbel`; key: uint64, of seed and position."""
    bits_C = scramble(key + (words_C + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    u_C = ((bits_C >> 24).to(tl.int64).to(tl.float32) + 0.5) * 9.094947017729282e-13  # 2^-40
    u_C = tl.minimum(u_C, 0.99999994)  # 1 - 2^-24
    # -log(1 - u): the largest noise comes of the least u, where a logarithm near 1 is too coarse
    few_C = u_C * (1.0 + u_C * (0.5 + u_C * (0.33333334 + u_C * (0.25 + u_C * 0.2))))
    return -tl.log(tl.where(u_C < 0.0078125, few_C, -tl.log(1.0 - u_C)))


# logits: [P, W], any dtype. token, position, left: int64 [P]. live, asleep: bool [P].
# places: int64 [P]. stops: int64 [P, ENDS]. met: bool [P, W]. emitted: int64 [2, P].
# penalty, temperature, chance: fp32 [P]. seed: int64 [P].
@triton.jit(do_not_specialize=["P"])
def choose_kernel(
    logits, token, position, left, live, asleep, places, stops, emitted, met, penalty, temperature,
    chance, seed, P, W: tl.constexpr, ENDS: tl.constexpr, BLOCK: tl.constexpr,
    PENALTY: tl.constexpr, TEMPERED: tl.constexpr, CHANCE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    was_live = tl.load(live + row) != 0
    now = tl.load(position + row) + was_live.to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    most_C = tl.full([BLOCK], -float("inf"), tl.float32)
    where_C = lanes
    first = row * W
    for start in range(0, W, BLOCK):
        words_C = start + lanes
        inside_C = words_C < W
        value_C = tl.load(logits + first + words_C, mask=inside_C, other=0.0).to(tl.float32)
        if PENALTY:
            met_C = tl.load(met + first + words_C, mask=inside_C, other=0) != 0
            by = tl.load(penalty + row)
            changed_C = tl.where(value_C < 0.0, value_C * by, tl.div_rn(value_C, by))
            value_C = tl.where(met_C, changed_C, value_C)
        if TEMPERED:
            value_C = tl.div_rn(value_C, tl.load(temperature + row))
        if CHANCE:
            key = scramble(tl.load(seed + row).to(tl.uint64, bitcast=True))
            key = scramble(key + now.to(tl.uint64, bitcast=True))
            value_C += tl.load(chance + row) * gumbel(key, words_C)
        value_C = tl.where(value_C != value_C, float("inf"), value_C)  # NaN counts as the most
        value_C = tl.where(inside_C, value_C, -float("inf"))
        where_C = tl.where(value_C > most_C, words_C, where_C)
        most_C = tl.maximum(most_C, value_C)
    # the first of equals, as argmax has it
    best = tl.min(tl.where(most_C == tl.max(most_C, 0), where_C, W), 0).to(tl.int64)
    chosen = tl.where(was_live, best, tl.load(token + row))
    now_left = tl.load(left + row) - was_live.to(tl.int64)
    ends_E = tl.load(stops + row * ENDS + tl.arange(0, ENDS)) == chosen
    goes_on = was_live & (now_left > 0) & (tl.max(ends_E.to(tl.int32), 0) == 0)
    tl.store(token + row, chosen)
    tl.store(position + row, now)
    tl.store(left + row, now_left)
    tl.store(live + row, goes_on)
    tl.store(asleep + row, goes_on == 0)
    tl.store(places + row, tl.where(goes_on, now, -1))
    tl.store(emitted + row, tl.where(was_live, chosen, -1))
    tl.store(emitted + P + row, goes_on.to(tl.int64))
    tl.store(met + first + chosen, was_live, mask=was_live)


def choose(logits: Tensor, at: Any, choices: Any, *, shaped: bool, chance: bool,
           penalty: bool) -> None:  # fmt: skip
    """What `Progress.advance` does; at: a `Progress`, choices: `Choices` of as many rows.

    logits: [P, W]. shaped: penalty, temperature and cuts have been applied to them.
    chance, penalty: whether some row asks for it.
    """
    logits, (P, W) = logits.contiguous(), logits.shape
    BLOCK, chained = min(16384, max(128, power_of_two(W))), chaining(logits.device)
    with torch.cuda.device_of(logits):
        choose_kernel[(P,)](
            logits, at.token, at.position, at.left, at.live, at.asleep, at.places, at.stops,
            at.emitted, choices.met, choices.penalty, choices.temperature, choices.chance,
            choices.seed, P, W, at.stops.shape[1], BLOCK, penalty and not shaped,
            chance and not shaped, chance, bool(chained), num_warps=max(4, BLOCK // 512),
            enable_fp_fusion=False, **chained,
        )  # fmt: skip
