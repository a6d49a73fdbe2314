"""One token against the memory, for decoding: Triton kernels and their launch.

    memory' = Diag(exp(log_forget)) · memory + write ⊗ [k ; v]
    output  = activation(scale · memory'[:, :K] · q)ᵀ · memory'[:, K:]

(paper Eq. 6, arXiv 2409.07146). A step is as fast as the memory is read once and written once.

`advance_kernel`: a program owns a block of slots of one key/value head. It reads their rows,
forgets, writes, stores and scores them (a slot's score needs its own row only: no program waits for
another, and the update may be in place), and for each query head of the group sums its values,
weighted. For softmax the weights are relative to the block's largest score, kept beside their sum.
`combine_kernel` adds a query head's sums in a fixed order. One block needs no combining. Where few
rows make every launch count, `advance_kernel` does it all: whoever of a key/value head's programs
is the last to finish adds what all have left, in the same fixed order (as sums are in CUDA's sample
threadFenceReduction). Queries and keys may be turned by their position on the way in: each program
does it for itself, the cosines while the kernel before still works.

What is compiled depends on H, G, K, V, M, dtypes and options only: no argument is specialised on
its value or alignment, and `step_op.py` brings every tensor to the alignment that K and V promise.
So a row gives the same bits whatever stands beside it, and products are not fused into sums, so
that it gives the same bits in a pool and by itself. All arithmetic is fp32.

Letters beyond the package's: N blocks of S slots · C columns held at once · P numbers of a partial
result.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def exp_and_complement(x):
    """(exp(x), 1 - exp(x)) for fp32 x <= 0, each to about an ulp, the second near x = 0 too.

    x = n·ln 2 + r, exp(x) = 2^n (1 + p(r)). The device's own exponential errs by |x| ulp.
    """
    x = tl.where(x < -128.0, -128.0, x)  # a maximum would hide NaN
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = r * (1.0 / 720.0 + r * (1.0 / 5040.0))
    p = r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + p)))
    p = r + r * r * (0.5 + p)
    power = (tl.maximum(n.to(tl.int32) + 127, 0) << 23).to(tl.float32, bitcast=True)
    return power + power * p, (1.0 - power) - power * p


@triton.jit
def vector(pointer, offset, columns, ALIGNED: tl.constexpr):
    """Pointers to `columns` of the vector at `offset`.

    The promise of four numbers at a time spreads them over the threads like a row of the memory.
    """
    start = pointer + offset
    if ALIGNED:
        start = tl.multiple_of(start, pointer.dtype.element_ty.primitive_bitwidth // 2)
    return start + columns


@triton.jit
def load_vector(pointer, offset, columns, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    target = vector(pointer, offset, columns, ALIGNED)
    return tl.load(target, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def store_vector(pointer, offset, columns, value_C, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    target = vector(pointer, offset, columns, ALIGNED)
    tl.store(target, value_C.to(pointer.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def tile_of(row_S, columns, mine_S, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets [S, C] of `columns`, of WIDTH, in vectors that start at row_S + SHIFT; their mask."""
    offsets = row_S[:, None] + (SHIFT + columns)[None, :]
    return offsets, mine_S[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def renew(after, offsets, mask, old_SC, token_C, forget_S, write_S):
    """Forgets and writes a tile of the memory, stores it and returns it."""
    new_SC = forget_S[:, None] * old_SC + write_S[:, None] * token_C[None, :]
    tl.store(after + offsets, new_SC, mask=mask)
    return new_SC


@triton.jit
def read_weights(score_SR, inside_S, ACTIVATION: tl.constexpr):
    """Weights of the slots [S, R], for softmax relative to the largest score [R] among them."""
    top_R = tl.max(score_SR, 0)
    if ACTIVATION == "softmax":
        score_SR = tl.where(inside_S[:, None], score_SR, -float("inf"))
        top_R = tl.max(score_SR, 0)
        zero_R = tl.where(top_R == -float("inf"), 0.0, top_R)  # never -inf - -inf
        score_SR, _ = exp_and_complement(score_SR - zero_R[None, :])
    elif ACTIVATION == "swish":
        small_SR, _ = exp_and_complement(-tl.abs(score_SR))
        score_SR = score_SR * tl.where(score_SR < 0.0, small_SR, 1.0) / (1.0 + small_SR)
    elif ACTIVATION == "relu":
        score_SR = tl.where(score_SR < 0.0, 0.0, score_SR)
    elif ACTIVATION == "relu2":
        score_SR = tl.where(score_SR < 0.0, 0.0, score_SR * score_SR)
    return score_SR, top_R


@triton.jit
def turn_of(position, frequency, columns, K: tl.constexpr, FACTOR: tl.constexpr):
    """(cos, sin) [C] that turn columns of a head [K]: sin with the sign of its term there.

    As `gsa.layers.rope.rotate` makes them; (0, 0) without frequencies.
    """
    cos_C = tl.zeros([columns.shape[0]], tl.float32)
    sin_C = cos_C
    if frequency is not None:
        pairs = columns % (K // 2)
        angle_C = position * tl.load(frequency + pairs, mask=columns < K, other=0.0)
        cos_C, sin_C = tl.cos(angle_C) * FACTOR, tl.sin(angle_C) * FACTOR
        sin_C = tl.where(columns < K // 2, -sin_C, sin_C)
    return cos_C, sin_C


@triton.jit
def load_turned(
    pointer, offset, columns, frequency, cos_C, sin_C, K: tl.constexpr, ALIGNED: tl.constexpr
):
    """Columns of a head [K], turned if there are frequencies, rounded as the layer rounds them."""
    head_C = load_vector(pointer, offset, columns, K, ALIGNED)
    if frequency is not None:
        partners = tl.where(columns < K // 2, columns + K // 2, columns - K // 2)
        partner_C = tl.load(pointer + offset + partners, mask=columns < K, other=0.0)
        head_C = head_C * cos_C + partner_C.to(tl.float32) * sin_C
        head_C = head_C.to(pointer.dtype.element_ty).to(tl.float32)
    return head_C


@triton.jit
def advance_keys(
    keys_SC, cos_C, sin_C, q, k, position, frequency, pair, before, after, row_S, mine_S, forget_S,
    write_S, K: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Renews the keys of the block; returns keys · q for each query head, [S, HEADS].

    keys_SC, cos_C, sin_C: of the first C columns, before.
    """
    S: tl.constexpr = row_S.shape[0]
    heads = tl.arange(0, HEADS)
    score_SR = tl.zeros([S, HEADS], tl.float32)
    for start in range(0, K, C):
        columns = start + tl.arange(0, C)
        offsets, mask = tile_of(row_S, columns, mine_S, 0, K)
        k_C = load_turned(k, pair * K, columns, frequency, cos_C, sin_C, K, ALIGNED)
        q_C = load_turned(q, pair * R * K, columns, frequency, cos_C, sin_C, K, ALIGNED)
        keys_SC = renew(after, offsets, mask, keys_SC, k_C, forget_S, write_S)
        for r in range(R):
            score_S = tl.sum(keys_SC * q_C[None, :], 1)
            score_SR += tl.where(heads[None, :] == r, score_S[:, None], 0.0)
            # the next head's, ahead of its use (after the last head: unused)
            head = (pair * R + min(r + 1, R - 1)) * K
            q_C = load_turned(q, head, columns, frequency, cos_C, sin_C, K, ALIGNED)
        offsets, mask = tile_of(row_S, columns + C, mine_S, 0, K)
        keys_SC = tl.load(before + offsets, mask=mask, other=0.0)
        cos_C, sin_C = turn_of(position, frequency, columns + C, K, FACTOR)
    return score_SR


@triton.jit
def store_sums(
    weight_SR, values_SC, result, first, columns,
    V: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Stores weight[:, r]ᵀ · values of each query head r at first + r·STRIDE."""
    heads = tl.arange(0, weight_SR.shape[1])
    for r in range(R):
        weight_S = tl.sum(tl.where(heads[None, :] == r, weight_SR, 0.0), 1)
        sum_C = tl.sum(weight_S[:, None] * values_SC, 0)
        store_vector(result, first + r * STRIDE, columns, sum_C, V, ALIGNED)


@triton.jit
def combine(
    partials, output, head, columns, V: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Adds the sums of a head's N blocks, in their order, and stores them.

    Read past L1, which may hold what was there before another program wrote.
    """
    blocks = tl.arange(0, triton.next_power_of_2(N))
    partials += head * N * P
    if ALIGNED:
        partials = tl.multiple_of(partials, 16)
    offsets, mask = tile_of(blocks * P, columns, blocks < N, 0, V)
    sum_NC = tl.load(partials + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    if ACTIVATION == "softmax":
        last = partials + (blocks * P + P)
        top_N = tl.load(last - 2, mask=blocks < N, other=-float("inf"), cache_modifier=".cg")
        total_N = tl.load(last - 1, mask=blocks < N, other=0.0, cache_modifier=".cg")
        share_N, _ = exp_and_complement(top_N - tl.max(top_N, 0))
        # made once and handed round: otherwise every thread makes every share, and loads wait
        share_N = tl.gather(share_N, blocks, 0)
        sum_C = tl.sum(share_N[:, None] * sum_NC, 0) / tl.sum(share_N * total_N, 0)
    else:
        sum_C = tl.sum(sum_NC, 0)
    store_vector(output, head * V, columns, sum_C, V, ALIGNED)


# q [B, H, K], k [B, G, K], v [B, G, V], log_forget and write (or None) [B, G, M]: dense.
# before, after: fp32 [pool, G, M, K+V], each row dense; may be one. rows: int64 [B] or None.
# result: fp32 [B, H, N, P], P = V sums, .., largest score, sum of weights; if N = 1 the output.
# arrivals: int32 [B, G], 0 before and after: then output [B, H, V] is written here, too; or None.
# positions: int64 [B] and frequency: fp32 [K/2], to turn q and k by their product; or None.
@triton.jit(do_not_specialize=[*range(17)])
def advance_kernel(
    q, k, v, log_forget, write, before, after, rows, result, output, arrivals, positions, frequency,
    scale: tl.float32, row_stride: tl.int64, row_stride_after: tl.int64, pool: tl.int64,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr, COMBINED: tl.constexpr, P: tl.constexpr, FACTOR: tl.constexpr,
    ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr, CHAINED: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    if CHAINED or FOLLOWS:  # the next kernel may be set up while this one works
        gdc_launch_dependents()
    pair = (tl.program_id(0) // N).to(tl.int64)  # b·G + g
    block = tl.program_id(0) % N
    slots = block * S + tl.arange(0, S)
    inside_S = slots < M
    row = pair // G
    valid = True
    if rows is not None:
        row = tl.load(rows + row)
        valid = (row >= 0) & (row < pool)  # any other is not touched, and reads as NaN
    mine_S = inside_S & valid
    first = ((pair % G) * M + block * S) * (K + V)
    before += row * row_stride + first
    after += row * row_stride_after + first
    if ALIGNED:
        before = tl.multiple_of(before, 16)
        after = tl.multiple_of(after, 16)
    row_S = tl.arange(0, S) * (K + V)

    # The first values and keys are asked for before all else: both are then under way together.
    columns = tl.arange(0, VALUE_COLUMNS)
    offsets, mask = tile_of(row_S, columns, mine_S, K, V)
    values_SC = tl.load(before + offsets, mask=mask, other=0.0)
    key_columns = tl.arange(0, KEY_COLUMNS)
    key_offsets, key_mask = tile_of(row_S, key_columns, mine_S, 0, K)
    keys_SC = tl.load(before + key_offsets, mask=key_mask, other=0.0)
    position = 0.0
    if positions is not None:
        position = tl.load(positions + pair // G).to(tl.float32)
    cos_C, sin_C = turn_of(position, frequency, key_columns, K, FACTOR)
    if FOLLOWS:  # q, k, v and the gates are the work of the kernel before
        gdc_wait()
    log_forget_S = tl.load(log_forget + pair * M + slots, mask=inside_S, other=0.0)
    forget_S, write_S = exp_and_complement(log_forget_S.to(tl.float32))
    if write is not None:
        write_S = tl.load(write + pair * M + slots, mask=inside_S, other=0.0).to(tl.float32)
    v_C = load_vector(v, pair * V, columns, V, ALIGNED)
    score_SR = advance_keys(
        keys_SC, cos_C, sin_C, q, k, position, frequency, pair, before, after, row_S, mine_S,
        forget_S, write_S, K, R, HEADS, KEY_COLUMNS, FACTOR, ALIGNED,
    )  # fmt: skip
    values_SC = renew(after, offsets, mask, values_SC, v_C, forget_S, write_S)

    score_SR = tl.where(valid, scale * score_SR, float("nan"))
    weight_SR, top_R = read_weights(score_SR, inside_S, ACTIVATION)
    STRIDE: tl.constexpr = V if N == 1 else N * P
    mine = pair * R * STRIDE + block * P
    if ACTIVATION == "softmax":
        total_R = tl.sum(weight_SR, 0)
        if N == 1:
            weight_SR = weight_SR / total_R[None, :]
        else:
            heads = tl.arange(0, HEADS)
            tl.store(result + (mine + heads * STRIDE + P - 2), top_R, mask=heads < R)
            tl.store(result + (mine + heads * STRIDE + P - 1), total_R, mask=heads < R)
    store_sums(weight_SR, values_SC, result, mine, columns, V, R, STRIDE, ALIGNED)
    for start in range(VALUE_COLUMNS, V, VALUE_COLUMNS):
        columns = start + tl.arange(0, VALUE_COLUMNS)
        offsets, mask = tile_of(row_S, columns, mine_S, K, V)
        values_SC = tl.load(before + offsets, mask=mask, other=0.0)
        v_C = load_vector(v, pair * V, columns, V, ALIGNED)
        values_SC = renew(after, offsets, mask, values_SC, v_C, forget_S, write_S)
        store_sums(weight_SR, values_SC, result, mine, columns, V, R, STRIDE, ALIGNED)
    if arrivals is not None:
        tl.debug_barrier()  # what the other threads stored comes before what one of them announces
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel", scope="gpu") == N - 1:
            for r in range(R):
                for start in range(0, V, COMBINED):
                    combine(
                        result, output, pair * R + r, start + tl.arange(0, COMBINED), V, N, P,
                        ACTIVATION, ALIGNED,
                    )  # fmt: skip
            tl.store(arrivals + pair, 0)


# partials: fp32 [B·H, N, P], as above. output: [B·H, V]. C columns of one head to a program.
@triton.jit(do_not_specialize=["partials", "output"])
def combine_kernel(
    partials, output, V: tl.constexpr, N: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    ACTIVATION: tl.constexpr, ALIGNED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    pieces: tl.constexpr = (V + C - 1) // C
    head = (tl.program_id(0) // pieces).to(tl.int64)
    columns = (tl.program_id(0) % pieces) * C + tl.arange(0, C)
    combine(partials, output, head, columns, V, N, P, ACTIVATION, ALIGNED)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


class Turn(NamedTuple):
    """What turns queries and keys, as `gsa.layers.rope.rotate` does."""

    positions: Tensor
    """int64 [B, 1]."""
    frequency: Tensor
    """fp32 [K/2], radians a position."""
    factor: float
    """On the result."""


class StepTiles(NamedTuple):
    """slots and warps of a program, and the columns of keys and of values it holds at once."""

    slots: int
    key_columns: int
    value_columns: int
    warps: int


@cache
def step_tiles(K: int, V: int, M: int, R: int) -> StepTiles:
    """How the memory is cut into programs.

    A block of S slots moves 2·S·(K+V) numbers and adds R·V numbers of partial results, written and
    read again: 8 slots, 16 for groups of heads, keep those small beside it. Beyond that a block is
    32 KiB (64 for groups): small, so that one sequence already occupies many multiprocessors, yet
    enough bytes under way; where rows are short it holds every slot and nothing needs combining.
    A thread holds at most 32 numbers of keys and as many of values, if it can four side by side of
    each slot, so that sums over slots stay within it; fewer where scores of many heads need room.
    """
    least, most = (8, 8192) if R == 1 else (16, 16384)
    slots = 1 << (max(most // (K + V), least).bit_length() - 1)
    slots = min(slots, 256, power_of_two(M))
    columns = max((8192 if R == 1 else 4096) // slots, 128)
    key_columns = min(columns, power_of_two(K))
    value_columns = min(columns, power_of_two(V))
    whole = key_columns >= K and value_columns >= V
    held = max(4, min(32 if R == 1 or whole else 16, 128 // power_of_two(R)))
    warps = slots * max(key_columns, value_columns) // (32 * held)
    return StepTiles(slots, key_columns, value_columns, max(1, min(16, warps)))


@cache
def chaining(device: torch.device) -> dict[str, bool]:
    """How to launch a kernel that is set up while the one before it still works (Hopper and newer);
    nothing where that cannot be."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"launch_pdl": True} if able and torch.version.cuda else {}


def launch(
    token: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    before: Tensor,
    after: Tensor,
    rows: Tensor | None,
    scale: float,
    slot_activation: str,
    aligned: bool,
    arrivals: Tensor | None = None,
    turn: Turn | None = None,
) -> Tensor:
    """Fills `after`, which may be `before`, and returns the output [B, 1, H, V] in q's dtype.

    `token` is (q, k, v, log_forget, write). Tensors lie as `advance_kernel` wants them; `aligned`:
    all but gates and rows start at a multiple of 16 bytes, and K, V and row strides are multiples
    of 4. `arrivals`: int32 [B, G], all 0, which no other launch may use at the same time; then one
    kernel does it all, leaving them 0, and the kernel launched before it lets the next be set up
    while it works, and writes neither memory nor `rows` nor positions. `turn`: what turns q and k;
    None for such as are turned, or not to be.
    """
    q, k, v, log_forget, write = token
    B, _, H, K = q.shape
    pool, G, M, _ = before.shape
    V, R = v.shape[3], H // G
    output = torch.empty((B, 1, H, V), dtype=q.dtype, device=q.device)
    if B == 0:
        return output
    tiles, follows = step_tiles(K, V, M, R), arrivals is not None
    if follows:  # few rows: more and smaller programs are the sooner done
        tiles = tiles._replace(slots=max(1, tiles.slots // 2))
    N, P = -(-M // tiles.slots), -(-(V + 2) // 4) * 4  # rounded up
    N_BLOCK = power_of_two(N)
    result, separate = output, N > 1 and not follows
    if N > 1:
        result = torch.empty((B, H, N, P), dtype=torch.float32, device=q.device)
    else:
        arrivals = None
    positions, frequency, factor = (None, None, 1.0) if turn is None else turn
    chained = chaining(q.device)
    combined = min(power_of_two(V), max(32, 2048 * tiles.warps // N_BLOCK))
    with torch.cuda.device_of(q):
        advance_kernel[(B * G * N,)](
            q, k, v, log_forget, write, before, after, rows, result, output, arrivals,
            positions, frequency, scale, before.stride(0), after.stride(0), pool,
            G, R, K, V, M, N, tiles.slots, power_of_two(R), tiles.key_columns,
            tiles.value_columns, combined, P, factor, slot_activation, aligned,
            separate and bool(chained), follows and bool(chained), num_warps=tiles.warps,
            enable_fp_fusion=False, **(chained if follows else {}),
        )  # fmt: skip
        if separate:  # small programs, one warp where that will do: this kernel is all latency
            C = min(power_of_two(V), max(32, 1024 // N_BLOCK))
            combine_kernel[(B * H * -(-V // C),)](
                result, output, V, N, C, P, slot_activation, aligned, bool(chained),
                num_warps=max(1, min(8, N_BLOCK * C // 1024)), enable_fp_fusion=False, **chained,
            )  # fmt: skip
    return output
