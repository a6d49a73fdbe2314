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
def load_gate(base, first, stop, head, slots, G: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
              NUMBER: tl.constexpr):  # fmt: skip
    """Tokens first … of a gate tensor [tokens, G, M]: [C, slots], 0 where there is none."""
    rows = tl.arange(0, C)
    mask = (first + rows < stop)[:, None] & (slots < M)[None, :]
    place = rows[:, None] * (G * M) + slots[None, :]
    return tl.load(base + (first * G + head) * M + place, mask=mask, other=0.0).to(NUMBER)


@triton.jit
def load_write(log_forget, write, first, stop, head, slots, G: tl.constexpr, M: tl.constexpr,
               C: tl.constexpr):  # fmt: skip
    """w [C, slots]: as given, or 1 - f."""
    if write is None:
        w = -forget_minus_one(log_forget)
    else:
        w = load_gate(write, first, stop, head, slots, G, M, C, log_forget.dtype)
    return w


@triton.jit(do_not_specialize=["tokens"])
def prepare_kernel(
    log_forget, write,  # [tokens, G, M]
    lifted,  # out [tokens, G, M]
    fades,  # out [chunks, G, 2, M]
    steep_flags,  # out [chunks, G] int32
    owners, bounds, tokens,
    G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, M_PAD: tl.constexpr,
    NUMBER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """lifted = w · exp(S - G), and exp(S), exp(G_C - S) of every chunk: see `chunk_decays`.

    A chunk is flagged where it is steep or a write is not finite, which zeros would carry to
    earlier tokens. lifted is w there.
    """
    head, chunk = tl.program_id(0) % G, tl.program_id(0) // G
    _, _, _, start, stop = find_span(chunk, owners, bounds, tokens, C, PACKED)
    rows, slots = tl.arange(0, C), tl.arange(0, M_PAD)
    log_f = load_gate(log_forget, start, stop, head, slots, G, M, C, NUMBER)
    w = load_write(log_f, write, start, stop, head, slots, G, M, C)
    _, lift, fade_in, fade_out, steep = chunk_decays(log_f)
    if write is not None:
        infinite = tl.where(tl.abs(w) < float("inf"), 0, 1)
        broken = tl.max(tl.max(infinite, 1), 0) > 0
        if broken:
            lift = tl.full(lift.shape, 1.0, NUMBER)
        steep = steep | broken
    mask = (start + rows < stop)[:, None] & (slots < M)[None, :]
    place = rows[:, None] * (G * M) + slots[None, :]
    tl.store(lifted + (start * G + head) * M + place, w * lift, mask=mask)
    fade = fades + (chunk.to(tl.int64) * G + head) * (2 * M) + slots
    tl.store(fade, fade_in, mask=slots < M)
    tl.store(fade + M, fade_out, mask=slots < M)
    tl.store(steep_flags + chunk * G + head, steep.to(tl.int32))


@triton.jit
def gate_terms(i, log_forget, write, lifted, steep_flags, d_lifted, read_terms, own_terms,
               chunk, head, start, stop, step, slots, G: tl.constexpr, M: tl.constexpr,
               C: tl.constexpr, SLICES: tl.constexpr, NUMBER: tl.constexpr):  # fmt: skip
    """Of chunk i of a span: (first token, log f, d w, what others read of each token less what it
    reads of others)."""
    rows = tl.arange(0, C)
    first = start + i * C
    row = (first * G + head) * M
    place = rows[:, None] * (G * M) + slots[None, :]
    mask = (first + rows < stop)[:, None] & (slots < M)[None, :]
    log_f = load_gate(log_forget, first, stop, head, slots, G, M, C, NUMBER)
    _grow, lift, _fade_in, _fade_out, _steep = chunk_decays(log_f)
    if tl.load(steep_flags + (chunk + i) * G + head) != 0:
        lift = tl.full(lift.shape, 1.0, NUMBER)
    d_lift = tl.zeros(lift.shape, NUMBER)
    for s in tl.static_range(SLICES):
        d_lift += tl.load(d_lifted + s * step + row + place, mask=mask, other=0.0)
    own = tl.load(own_terms + row + place, mask=mask, other=0.0).to(NUMBER)
    read = tl.load(read_terms + row + place, mask=mask, other=0.0)
    faded = tl.load(lifted + row + place, mask=mask, other=0.0).to(NUMBER)
    return first, log_f, d_lift * lift + own, faded * d_lift - read


@triton.jit
def store_gate_gradient(d_log_forget, d_write, d_gate, d_w, log_f, first, stop, head, slots,
                        G: tl.constexpr, M: tl.constexpr, C: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, C)
    place = (first * G + head) * M + rows[:, None] * (G * M) + slots[None, :]
    mask = (first + rows < stop)[:, None] & (slots < M)[None, :]
    if d_write is None:
        d_gate -= (1 + forget_minus_one(log_f)) * d_w
    else:
        tl.store(d_write + place, d_w, mask=mask)
    tl.store(d_log_forget + place, d_gate, mask=mask)


@triton.jit(do_not_specialize=["tokens", "all_tokens", "spans"])
def gate_gradient_kernel(
    log_forget, write, lifted,  # [tokens, G, M]
    steep_flags,  # [chunks, G]
    d_lifted,  # [slices, tokens, G, M]: what `write_back_kernel` left
    read_terms, own_terms,  # [tokens, G, M]: what `activate_backward_kernel` left
    crossing,  # [slices, spans, 2, G, M]: rows of memory ⊙ d memory before and after each span
    d_log_forget, d_write,  # out [tokens, G, M]
    owners, bounds, tokens, all_tokens, spans,
    G: tl.constexpr, M: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, M_BLOCK: tl.constexpr,
    SLICES: tl.constexpr, NUMBER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """d log f and d w from what tokens give and take across each token's border.

    What a gate f_t scales is what tokens before t wrote and tokens from t on read. Its gradient is
    the sum of that at the beginning of the span, plus, for tokens before t, what others read of
    them less what they read of others; or that at its end, less the same for tokens from t on. A
    token's reading of itself is in neither. Both kernels form these terms from equally rounded
    factors, so that what does not cross cancels exactly.
    The sum begins on the side where less crosses: at the end of a sequence all that is left of the
    last write may be read, and next to nothing of what came before it, or nothing at all.
    """
    M_BLOCKS: tl.constexpr = (M + M_BLOCK - 1) // M_BLOCK
    block, head = tl.program_id(0) % M_BLOCKS, tl.program_id(0) // M_BLOCKS % G
    span = tl.program_id(0) // (M_BLOCKS * G)
    owner, begin, _end, start, stop = find_span(span, owners, bounds, tokens, SPAN, PACKED)
    rows, slots = tl.arange(0, C), block * M_BLOCK + tl.arange(0, M_BLOCK)
    step = all_tokens.to(tl.int64) * (G * M)
    before = tl.zeros([M_BLOCK], NUMBER)
    after = tl.zeros([M_BLOCK], NUMBER)
    if start < stop:
        for s in tl.static_range(SLICES):
            row = crossing + ((s * spans + span).to(tl.int64) * (2 * G) + head) * M + slots
            before += tl.load(row, mask=slots < M, other=0.0)
            after += tl.load(row + G * M, mask=slots < M, other=0.0)
    chunk = span_number(owner, begin, start, tokens, C, PACKED)
    count = (tl.maximum(stop - start, 0).to(tl.int32) + C - 1) // C
    if tl.sum(tl.abs(after), 0) > tl.sum(tl.abs(before), 0):
        earlier = tl.broadcast_to(tl.maximum(rows - 1, 0)[:, None], (C, M_BLOCK))
        for i in range(count):
            first, log_f, d_w, term = gate_terms(
                i, log_forget, write, lifted, steep_flags, d_lifted, read_terms, own_terms, chunk,
                head, start, stop, step, slots, G, M, C, SLICES, NUMBER,
            )  # fmt: skip
            past = tl.gather(tl.cumsum(term, 0), earlier, 0)
            d_gate = tl.where(rows[:, None] > 0, past, 0.0) + before[None, :]
            before += tl.sum(term, 0)
            store_gate_gradient(d_log_forget, d_write, d_gate, d_w, log_f, first, stop, head, slots,
                                G, M, C)  # fmt: skip
    else:
        for back in range(count):
            first, log_f, d_w, term = gate_terms(
                count - 1 - back, log_forget, write, lifted, steep_flags, d_lifted, read_terms,
                own_terms, chunk, head, start, stop, step, slots, G, M, C, SLICES, NUMBER,
            )  # fmt: skip
            d_gate = after[None, :] - tl.cumsum(term, 0, reverse=True)
            after -= tl.sum(term, 0)
            store_gate_gradient(d_log_forget, d_write, d_gate, d_w, log_f, first, stop, head, slots,
                                G, M, C)  # fmt: skip
