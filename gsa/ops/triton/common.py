"""What the kernels share: where tokens lie, decays within a chunk, activations.

Letters as in `gsa/ops/types.py`; C tokens are a chunk, and sizes ending in _PAD are powers of two.
Tokens of all rows are counted through: token t of row b is number b·T + t.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LIMIT = tl.constexpr(86.0)
"""Largest exponent, to the base 2, of a factor exp(S - G_j): e^60 leaves room in fp32."""
LIMIT_FP64 = tl.constexpr(480.0)
"""The same where factors are fp64."""
FEW_HEADS = tl.constexpr(4)
"""Query heads of a group up to which a walk over chunks is unrolled over them. Beyond, ptxas 12.8
made wrong code of it (32 heads), after minutes."""


@triton.jit
def find_owner(index, bounds, sequences, LENGTH: tl.constexpr):
    """The packed sequence that owns span `index` (a vector): the last whose first span is <= index.

    Spans of sequence s are numbered from bounds[s] // LENGTH + s, so that none overlap and none
    must be counted; numbers in between belong to nobody and hold no tokens.
    """
    low = tl.zeros_like(index)
    high = low + (sequences - 1)
    for _ in range(32):
        middle = (low + high + 1) // 2
        first = tl.load(bounds + middle).to(tl.int32) // LENGTH + middle
        low = tl.where(first <= index, middle, low)
        high = tl.where(first <= index, high, tl.maximum(middle - 1, low))
    return low


@triton.jit(do_not_specialize=["sequences", "spans"])
def plan_kernel(owners, bounds, sequences, spans, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """owners [spans] int32: the sequence that each span of LENGTH tokens belongs to."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owner = find_owner(index, bounds, sequences, LENGTH)
    tl.store(owners + index, owner, mask=index < spans)


@triton.jit
def find_span(index, owners, bounds, tokens, LENGTH: tl.constexpr, PACKED: tl.constexpr):
    """Span `index` of LENGTH tokens: (sequence, its first token, its end, first token, end).

    tokens: T, the length of a row. Spans never reach across the end of a sequence; an empty
    sequence has one empty span. Bounds that lie are cut to the row.
    """
    if PACKED:
        owner = tl.load(owners + index)
        begin = tl.minimum(tl.maximum(tl.load(bounds + owner).to(tl.int64), 0), tokens)
        end = tl.load(bounds + owner + 1).to(tl.int64)
        end = tl.minimum(tl.maximum(end, begin), tokens)
        place = tl.maximum(index - (begin // LENGTH + owner), 0)
    else:
        per_row = tl.maximum((tokens + LENGTH - 1) // LENGTH, 1)
        owner = index // per_row
        begin = owner.to(tl.int64) * tokens
        end = begin + tokens
        place = index % per_row
    start = begin + place * LENGTH
    return owner, begin, end, start, tl.minimum(start + LENGTH, end)


@triton.jit
def span_number(owner, begin, start, tokens, LENGTH: tl.constexpr, PACKED: tl.constexpr):
    """The number of the span of LENGTH tokens that begins at `start`: int32."""
    if PACKED:
        first = begin // LENGTH + owner
    else:
        first = owner * tl.maximum((tokens + LENGTH - 1) // LENGTH, 1)
    return (first + (start - begin) // LENGTH).to(tl.int32)


@triton.jit
def boundary_number(owner, begin, start, tokens, LENGTH: tl.constexpr, PACKED: tl.constexpr):
    """Like `span_number`, counting only the boundaries between spans within a sequence."""
    if PACKED:
        first = begin // LENGTH
    else:
        first = owner * (tokens // LENGTH)
    return (first + (start - begin) // LENGTH).to(tl.int32)


@triton.jit
def exp2_scaled(exponent, shift):
    """2^(exponent + shift) for an integer shift that changes no bit of the significand."""
    whole = tl.floor(exponent)
    return tl.exp2(exponent - whole) * tl.exp2(whole + shift)


@triton.jit
def chunk_decays(log_forget):
    """Decays within a chunk from its log f [C, M] (0 where padded), in its dtype.

    Returns (grow, lift, fade_in, fade_out, steep). With G_i the sum of log f up to token i and a
    shift S, exp(G_i - G_j) = grow_i · lift_j, exp(S) = fade_in, exp(G_C - S) = fade_out. S is 0, or
    near half of G_C in slots where exp(-G_j) would overflow; it is a power of two, so that what a
    later token decays changes no bit of what is read before it.
    steep: whether the range of a slot is too wide for that. Then grow = lift = 1, and the chunk is
    to be computed token by token.
    """
    MOST: tl.constexpr = LIMIT_FP64 if log_forget.dtype == tl.float64 else LIMIT
    decay_sum = tl.cumsum(log_forget * LOG2_E, 0)
    total = tl.min(decay_sum, 0)
    shift = tl.where(total < -MOST, tl.floor(total * 0.5), 0.0)
    steep = tl.min(total, 0) < -2 * MOST
    grow = exp2_scaled(decay_sum, -shift[None, :])
    lift = exp2_scaled(-decay_sum, shift[None, :])
    fade_in = tl.exp2(shift)
    fade_out = exp2_scaled(total, -shift)
    if steep:
        grow = tl.full(grow.shape, 1.0, grow.dtype)
        lift = tl.full(lift.shape, 1.0, lift.dtype)
    return grow, lift, fade_in, fade_out, steep


@triton.jit
def forget_minus_one(log_forget):
    """f - 1 = expm1(log f), to full precision near 0."""
    TERMS: tl.constexpr = 15 if log_forget.dtype == tl.float64 else 9
    series = 1 + log_forget / TERMS
    for i in tl.static_range(TERMS - 1, 1, -1):
        series = 1 + series * log_forget / i
    return tl.where(log_forget > -0.5, log_forget * series, tl.exp(log_forget) - 1)


@triton.jit
def activate(score, present, ACTIVATION: tl.constexpr):
    """Read weights from scores [C, M]; 0 where a slot is not `present` (padding)."""
    if ACTIVATION == "softmax":
        score = tl.where(present, score, -float("inf"))
        power = tl.exp(score - tl.max(score, 1)[:, None])
        return power / tl.sum(power, 1)[:, None]
    elif ACTIVATION == "swish":
        return score * tl.sigmoid(score)
    elif ACTIVATION == "relu":
        return tl.maximum(score, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu2":
        positive = tl.maximum(score, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive
    else:
        return score


@triton.jit
def activation_backward(score, weight, d_weight, ACTIVATION: tl.constexpr):
    """Gradient of the scores from that of the read weights, all [C, M]."""
    if ACTIVATION == "softmax":
        return weight * (d_weight - tl.sum(weight * d_weight, 1)[:, None])
    elif ACTIVATION == "swish":
        gate = tl.sigmoid(score)
        return d_weight * gate * (1 + score * (1 - gate))
    elif ACTIVATION == "relu":
        return tl.where(score > 0, d_weight, 0.0)
    elif ACTIVATION == "relu2":
        return d_weight * 2 * tl.maximum(score, 0.0)
    else:
        return d_weight
