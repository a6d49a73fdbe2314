"""Gates in, gate gradients out: the kernels that see log f."""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

import triton
import triton.language as tl

from gsa.ops.triton.common import (
    chunk_decays,
    find_span,
    forget_minus_one,
    span_number,
)


@triton.jit
def load_gate(base, first, stop, head, slots, G: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """Tokens first … of a gate tensor [tokens, G, M]: fp32 [C, slots], 0 where there is none."""
    rows = tl.arange(0, C)
    mask = (first + rows < stop)[:, None] & (slots < M)[None, :]
    place = rows[:, None] * (G * M) + slots[None, :]
    return tl.load(base + (first * G + head) * M + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_write(log_forget, write, first, stop, head, slots, G: tl.constexpr, M: tl.constexpr,
               C: tl.constexpr):  # fmt: skip
    """w [C, slots]: as given, or 1 - f."""
    if write is None:
        w = -forget_minus_one(log_forget)
    else:
        w = load_gate(write, first, stop, head, slots, G, M, C)
    return w


@triton.jit(do_not_specialize=["tokens"])
def prepare_kernel(
    log_forget, write,  # [tokens, G, M]
    lifted,  # out [tokens, G, M]
    fades,  # out [chunks, G, 2, M] fp32
    steep_flags,  # out [chunks, G] int32
    owners, bounds, tokens,
    G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, M_PAD: tl.constexpr,
    EXACT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """lifted = w · exp(S - G), and exp(S), exp(G_C - S) of every chunk: see `chunk_decays`.

    A chunk is flagged where it is steep or a write is not finite, which zeros would carry to
    earlier tokens. lifted is w there.
    """
    head, chunk = tl.program_id(0) % G, tl.program_id(0) // G
    _, _, _, start, stop = find_span(chunk, owners, bounds, tokens, C, PACKED)
    rows, slots = tl.arange(0, C), tl.arange(0, M_PAD)
    log_f = load_gate(log_forget, start, stop, head, slots, G, M, C)
    w = load_write(log_f, write, start, stop, head, slots, G, M, C)
    _, lift, fade_in, fade_out, steep = chunk_decays(log_f, EXACT)
    if write is not None:
        infinite = tl.where(tl.abs(w) < float("inf"), 0, 1)
        broken = tl.max(tl.max(infinite, 1), 0) > 0
        if broken:
            lift = tl.full(lift.shape, 1.0, tl.float32)
        steep = steep | broken
    mask = (start + rows < stop)[:, None] & (slots < M)[None, :]
    place = rows[:, None] * (G * M) + slots[None, :]
    tl.store(lifted + (start * G + head) * M + place, w * lift, mask=mask)
    fade = fades + (chunk.to(tl.int64) * G + head) * (2 * M) + slots
    tl.store(fade, fade_in, mask=slots < M)
    tl.store(fade + M, fade_out, mask=slots < M)
    tl.store(steep_flags + chunk * G + head, steep.to(tl.int32))


@triton.jit(do_not_specialize=["tokens", "all_tokens", "spans"])
def gate_gradient_kernel(
    log_forget, write, lifted,  # [tokens, G, M]
    steep_flags,  # [chunks, G]
    d_lifted,  # [2 slices, tokens, G, M] fp32: what `write_back_kernel` left
    read_terms, own_terms,  # [tokens, G, M] fp32: what `activate_backward_kernel` left
    crossing,  # [2 slices, spans, G, M] fp32: rows of memory ⊙ d memory at the end of each span
    d_log_forget, d_write,  # out [tokens, G, M]
    owners, bounds, tokens, all_tokens, spans,
    G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, M_BLOCK: tl.constexpr,
    SLICES: tl.constexpr, EXACT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """d log f and d w from what tokens give and take across each token's border.

    What a gate f_t scales is what tokens before t wrote and tokens from t on read. Its gradient is
    the sum of that at the end of the span, plus, for tokens from t on, what they read of others
    less what others read of them. A token's reading of itself is in neither. Both kernels form
    these terms from equally rounded factors, so that what does not cross cancels exactly.
    """
    M_BLOCKS: tl.constexpr = (M + M_BLOCK - 1) // M_BLOCK
    block, head = tl.program_id(0) % M_BLOCKS, tl.program_id(0) // M_BLOCKS % G
    span = tl.program_id(0) // (M_BLOCKS * G)
    owner, begin, _end, start, stop = find_span(span, owners, bounds, tokens, SPAN, PACKED)
    rows, slots = tl.arange(0, C), block * M_BLOCK + tl.arange(0, M_BLOCK)
    number = tl.float64 if EXACT else tl.float32
    step = all_tokens.to(tl.int64) * (G * M)
    carry = tl.zeros([M_BLOCK], number)
    if start < stop:
        for s in tl.static_range(SLICES):
            row = ((s * spans + span).to(tl.int64) * G + head) * M
            carry += tl.load(crossing + row + slots, mask=slots < M, other=0.0).to(number)
    first_chunk = span_number(owner, begin, start, tokens, C, PACKED)
    count = (tl.maximum(stop - start, 0).to(tl.int32) + C - 1) // C
    for i in range(count):
        first = start + (count - 1 - i) * C
        row = (first * G + head) * M
        place = rows[:, None] * (G * M) + slots[None, :]
        mask = (first + rows < stop)[:, None] & (slots < M)[None, :]
        log_f = load_gate(log_forget, first, stop, head, slots, G, M, C)
        _grow, lift, _fade_in, _fade_out, _steep = chunk_decays(log_f, EXACT)
        if tl.load(steep_flags + (first_chunk + count - 1 - i) * G + head) != 0:
            lift = tl.full(lift.shape, 1.0, tl.float32)
        d_lift = tl.zeros([C, M_BLOCK], tl.float32)
        for s in tl.static_range(SLICES):
            d_lift += tl.load(d_lifted + s * step + row + place, mask=mask, other=0.0)
        own = tl.load(own_terms + row + place, mask=mask, other=0.0)
        read = tl.load(read_terms + row + place, mask=mask, other=0.0)
        faded = tl.load(lifted + row + place, mask=mask, other=0.0).to(tl.float32)
        term = read.to(number) - (faded * d_lift).to(number)
        d_gate = (tl.cumsum(term, 0, reverse=True) + carry[None, :]).to(tl.float32)
        carry += tl.sum(term, 0)
        d_w = d_lift * lift + own
        if write is None:
            d_gate -= (1 + forget_minus_one(log_f)) * d_w
        else:
            tl.store(d_write + row + place, d_w, mask=mask)
        tl.store(d_log_forget + row + place, d_gate, mask=mask)
