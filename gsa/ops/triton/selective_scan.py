"""Mamba's selective scan: a program walks over a span of tokens with the memories of some channels.

What each span leaves if it begins with an empty memory, and what the gradients of its outputs give
to the memory before it, is found for all spans at once (`span_kernel`). A walk over the spans of
each sequence makes of it the memories and gradients at their borders (`carry_kernel`); decays of a
span multiply to exp(rate · Σ delta). Then all spans are at work again (`output_kernel`,
`gradient_kernel`), so few long sequences keep a device as busy as many short ones.

A program is one warp that takes token by token, its memories in registers: a thread has 4 keys of
4 channels, so that sums over keys and over channels are half done before threads meet. Nothing of
T · E · K numbers is written. What programs of other channels add to the gradients of write and
read is summed afterwards, in order.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gsa.ops.triton.common import LOG2_E, find_span, plan_kernel, span_number

SPAN = 128
"""Tokens that a program walks over; a multiple of GROUP."""
GROUP = 4
"""Tokens that are loaded at once. Backward, their memories and decays are in registers."""
NUMBERS = 512
"""Numbers of memory of a program: channels times K, K rounded up to a power of two."""
WALKERS = 8
"""Programs of `gradient_kernel` for each multiprocessor: as many as its registers hold."""
BLOCK = 1024
"""Numbers of gradients that a program of `sum_kernel` makes."""
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place_of(
    index, blocks, E: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, K_PAD: tl.constexpr
):
    """What program `index` is at: (span or sequence, block, its first channel, its numbers among
    [E, K], which of them there are)."""
    block = index % blocks
    corner = block * CHANNELS
    channels, keys = corner + tl.arange(0, CHANNELS), tl.arange(0, K_PAD)
    numbers = channels[:, None] * K + keys[None, :]
    present = (channels < E)[:, None] & (keys < K)[None, :]
    return (index // blocks).to(tl.int64), block, corner, numbers, present


@triton.jit
def load_keys(
    row, stride: tl.constexpr, left, K: tl.constexpr, K_PAD: tl.constexpr, GROUP: tl.constexpr,
    NUMBER: tl.constexpr,
):  # fmt: skip
    """A tuple of GROUP rows [K_PAD] from `row` on, 0 where `left` tokens are over."""
    keys = tl.arange(0, K_PAD)
    rows = ()
    for u in tl.static_range(GROUP):
        mask = (keys < K) & (u < left)
        rows += (tl.load(row + u * stride + keys, mask=mask, other=0.0).to(NUMBER),)
    return rows


@triton.jit
def load_channels(
    row, stride: tl.constexpr, left, corner, E: tl.constexpr, CHANNELS: tl.constexpr,
    GROUP: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """The same of columns `corner` and on, as [CHANNELS].

    Loaded in halves: fewer numbers than threads are loaded by each thread that needs them, as many
    would be handed out through shared memory, one row after another.
    """
    HALF: tl.constexpr = CHANNELS // 2
    columns = corner + tl.arange(0, HALF)
    rows = ()
    for u in tl.static_range(GROUP):
        place = row + u * stride + columns
        near = tl.load(place, mask=(columns < E) & (u < left), other=0.0).to(NUMBER)
        far = tl.load(place + HALF, mask=(columns + HALF < E) & (u < left), other=0.0).to(NUMBER)
        rows += (tl.reshape(tl.permute(tl.join(near, far), 1, 0), [CHANNELS]),)
    return rows


@triton.jit
def store_keys(row, x, there, K: tl.constexpr, CHANNELS: tl.constexpr):
    """Writes x [K_PAD] to a row if `there`: by the threads that have it for the first channel."""
    channels, keys = tl.arange(0, CHANNELS)[:, None], tl.arange(0, x.shape[0])[None, :]
    x = tl.broadcast_to(x[None, :], [CHANNELS, x.shape[0]])
    tl.store(row + channels * 0 + keys, x, mask=(channels == 0) & (keys < K) & there)


@triton.jit
def store_channels(row, x, there, corner, E: tl.constexpr):
    """Writes x [CHANNELS] to columns `corner` and on of a row if `there`, in halves as well."""
    HALF: tl.constexpr = x.shape[0] // 2
    columns = corner + tl.arange(0, HALF)
    near, far = tl.split(tl.permute(tl.reshape(x, [2, HALF]), 1, 0))
    tl.store(row + columns, near, mask=(columns < E) & there)
    tl.store(row + columns + HALF, far, mask=(columns + HALF < E) & there)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def span_kernel(
    x, delta, rate, write, read, d_output, owners, bounds, totals, memories, slopes,
    tokens, blocks, x_stride: tl.constexpr, delta_stride: tl.constexpr,
    write_stride: tl.constexpr, read_stride: tl.constexpr, d_output_stride: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, K_PAD: tl.constexpr,
    SPAN: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Of each span alone: Σ delta, the memory that it leaves after an empty one and, if there is
    d_output, the gradient that this gives to the memory before the span."""
    span, _, corner, numbers, present = place_of(tl.program_id(0), blocks, E, K, CHANNELS, K_PAD)
    _, _, _, first, end = find_span(span, owners, bounds, tokens, SPAN, PACKED)
    length = (end - first).to(tl.int32)
    rates = tl.load(rate + numbers, mask=present, other=0.0) * LOG2_E
    held = tl.zeros([CHANNELS, K_PAD], NUMBER)
    total = tl.zeros([CHANNELS], NUMBER)
    if d_output is not None:
        slope = held
        decays = held + 1.0
    for start in range(0, length, GROUP):
        left, row = length - start, first + start
        step = load_channels(
            delta + row * delta_stride, delta_stride, left, corner, E, CHANNELS, GROUP, NUMBER
        )
        value = load_channels(
            x + row * x_stride, x_stride, left, corner, E, CHANNELS, GROUP, NUMBER
        )
        k = load_keys(write + row * write_stride, write_stride, left, K, K_PAD, GROUP, NUMBER)
        if d_output is not None:
            q = load_keys(read + row * read_stride, read_stride, left, K, K_PAD, GROUP, NUMBER)
            d_y = load_channels(
                d_output + row * d_output_stride, d_output_stride, left, corner, E, CHANNELS,
                GROUP, NUMBER,
            )  # fmt: skip
        for u in tl.static_range(GROUP):
            decay = tl.exp2(step[u][:, None] * rates)
            held = decay * held + (step[u] * value[u])[:, None] * k[u][None, :]
            total += step[u]
            if d_output is not None:
                decays *= decay
                slope += decays * (d_y[u][:, None] * q[u][None, :])
    store_channels(totals + span * E, total, True, corner, E)
    tl.store(memories + span * E * K + numbers, held, mask=present)
    if d_output is not None:
        tl.store(slopes + span * E * K + numbers, slope, mask=present)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def carry_kernel(
    rate, bounds, totals, borders, initial, final, tokens, blocks,
    E: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, K_PAD: tl.constexpr,
    SPAN: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, NUMBER: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """borders: of each span what it gives, in place what comes to it, from the spans before it or,
    if BACK, after it. initial: what comes to a sequence; final: what leaves it."""
    sequence, _, corner, numbers, present = place_of(
        tl.program_id(0), blocks, E, K, CHANNELS, K_PAD
    )
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(bounds + sequence).to(tl.int64), 0), tokens)
        end = tl.load(bounds + sequence + 1).to(tl.int64)
        end = tl.minimum(tl.maximum(end, begin), tokens)
    else:
        begin = sequence * tokens
        end = begin + tokens
    number = span_number(sequence, begin, begin, tokens, SPAN, PACKED).to(tl.int64)
    count = ((end - begin + SPAN - 1) // SPAN).to(tl.int32)
    rates = tl.load(rate + numbers, mask=present, other=0.0) * LOG2_E
    held = tl.zeros([CHANNELS, K_PAD], NUMBER)
    if initial is not None:
        held = tl.load(initial + sequence * E * K + numbers, mask=present, other=0.0)
    if BACK:
        number += count - 1
    ONE: tl.constexpr = -1 if BACK else 1
    for start in range(0, count, GROUP):
        left, span = count - start, number + start * ONE
        step = load_channels(totals + span * E, ONE * E, left, corner, E, CHANNELS, GROUP, NUMBER)
        place = borders + span * E * K + numbers
        given = ()
        for u in tl.static_range(GROUP):
            mask = present & (u < left)
            given += (tl.load(place + u * ONE * E * K, mask=mask, other=0.0),)
        for u in tl.static_range(GROUP):
            tl.store(place + u * ONE * E * K, held, mask=present & (u < left))
            held = tl.exp2(step[u][:, None] * rates) * held + given[u]
    tl.store(final + sequence * E * K + numbers, held, mask=present)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def output_kernel(
    x, delta, rate, write, read, owners, bounds, memories, output,
    tokens, blocks, x_stride: tl.constexpr, delta_stride: tl.constexpr,
    write_stride: tl.constexpr, read_stride: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, K_PAD: tl.constexpr,
    SPAN: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Outputs of a span, from the memory before it."""
    span, _, corner, numbers, present = place_of(tl.program_id(0), blocks, E, K, CHANNELS, K_PAD)
    _, _, _, first, end = find_span(span, owners, bounds, tokens, SPAN, PACKED)
    length = (end - first).to(tl.int32)
    rates = tl.load(rate + numbers, mask=present, other=0.0) * LOG2_E
    held = tl.load(memories + span * E * K + numbers, mask=present & (length > 0), other=0.0)
    for start in range(0, length, GROUP):
        left, row = length - start, first + start
        step = load_channels(
            delta + row * delta_stride, delta_stride, left, corner, E, CHANNELS, GROUP, NUMBER
        )
        value = load_channels(
            x + row * x_stride, x_stride, left, corner, E, CHANNELS, GROUP, NUMBER
        )
        k = load_keys(write + row * write_stride, write_stride, left, K, K_PAD, GROUP, NUMBER)
        q = load_keys(read + row * read_stride, read_stride, left, K, K_PAD, GROUP, NUMBER)
        for u in tl.static_range(GROUP):
            decay = tl.exp2(step[u][:, None] * rates)
            held = decay * held + (step[u] * value[u])[:, None] * k[u][None, :]
            result = tl.sum(held * q[u][None, :], 1)
            store_channels(output + (row + u) * E, result, u < left, corner, E)


@triton.jit(do_not_specialize=["tokens", "all_tokens", "spans", "blocks"])
def gradient_kernel(
    x, delta, rate, write, read, d_output, owners, bounds, memories, slopes, before,
    d_x, d_delta, d_rate, d_write, d_read, tokens, all_tokens, spans, blocks,
    x_stride: tl.constexpr, delta_stride: tl.constexpr,
    write_stride: tl.constexpr, read_stride: tl.constexpr, d_output_stride: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, K_PAD: tl.constexpr,
    SPAN: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Gradients of what spans are made of; of rate a share for each span, of write and read for
    each block of channels.

    A program takes span after span: through it once, leaving the memories before each group in its
    own part of `before`, which is small enough for a cache; then back, a group at a time.
    """
    SIZE: tl.constexpr = CHANNELS * K_PAD
    own = tl.arange(0, CHANNELS)[:, None] * K_PAD + tl.arange(0, K_PAD)[None, :]
    own += tl.program_id(0) * (SPAN // GROUP) * SIZE
    for index in range(tl.program_id(0), spans * blocks, tl.num_programs(0)):
        span, block, corner, numbers, present = place_of(index, blocks, E, K, CHANNELS, K_PAD)
        _, _, _, first, end = find_span(span, owners, bounds, tokens, SPAN, PACKED)
        length = (end - first).to(tl.int32)
        rates = tl.load(rate + numbers, mask=present, other=0.0) * LOG2_E
        some = present & (length > 0)
        held = tl.load(memories + span * E * K + numbers, mask=some, other=0.0)
        d_held = tl.load(slopes + span * E * K + numbers, mask=some, other=0.0)
        d_rates = tl.zeros([CHANNELS, K_PAD], NUMBER)
        groups = (tl.maximum(length, 0) + GROUP - 1) // GROUP
        for i in range(groups):
            tl.store(before + i * SIZE + own, held)
            left, row = length - i * GROUP, first + i * GROUP
            step = load_channels(
                delta + row * delta_stride, delta_stride, left, corner, E, CHANNELS, GROUP, NUMBER
            )
            value = load_channels(
                x + row * x_stride, x_stride, left, corner, E, CHANNELS, GROUP, NUMBER
            )
            k = load_keys(write + row * write_stride, write_stride, left, K, K_PAD, GROUP, NUMBER)
            for u in tl.static_range(GROUP):
                decay = tl.exp2(step[u][:, None] * rates)
                held = decay * held + (step[u] * value[u])[:, None] * k[u][None, :]
        tl.debug_barrier()  # what is read below may be another thread's
        for back in range(groups):
            i = groups - 1 - back
            left, row = length - i * GROUP, first + i * GROUP
            held = tl.load(before + i * SIZE + own)
            step = load_channels(
                delta + row * delta_stride, delta_stride, left, corner, E, CHANNELS, GROUP, NUMBER
            )
            value = load_channels(
                x + row * x_stride, x_stride, left, corner, E, CHANNELS, GROUP, NUMBER
            )
            k = load_keys(write + row * write_stride, write_stride, left, K, K_PAD, GROUP, NUMBER)
            q = load_keys(read + row * read_stride, read_stride, left, K, K_PAD, GROUP, NUMBER)
            d_y = load_channels(
                d_output + row * d_output_stride, d_output_stride, left, corner, E, CHANNELS,
                GROUP, NUMBER,
            )  # fmt: skip
            share = (block.to(tl.int64) * all_tokens + row) * K
            decays, olds = (), ()
            for u in tl.static_range(GROUP):
                decay = tl.exp2(step[u][:, None] * rates)
                decays += (decay,)
                olds += (held,)
                held = decay * held + (step[u] * value[u])[:, None] * k[u][None, :]
                d_q = tl.sum(held * d_y[u][:, None], 0)
                store_keys(d_read + share + u * K, d_q, u < left, K, CHANNELS)
            for u in tl.static_range(GROUP - 1, -1, -1):
                slope = d_held + d_y[u][:, None] * q[u][None, :]
                d_k = tl.sum(slope * (step[u] * value[u])[:, None], 0)
                store_keys(d_write + share + u * K, d_k, u < left, K, CHANNELS)
                d_added = tl.sum(slope * k[u][None, :], 1)
                d_held = slope * decays[u]
                d_log = d_held * olds[u]
                d_rates += d_log * step[u][:, None]
                d_step = value[u] * d_added + tl.sum(d_log * rates, 1) * LN_2
                store_channels(d_x + (row + u) * E, step[u] * d_added, u < left, corner, E)
                store_channels(d_delta + (row + u) * E, d_step, u < left, corner, E)
        tl.debug_barrier()  # the next span's memories come to the same places
        tl.store(d_rate + span * E * K + numbers, d_rates, mask=present)


@triton.jit(do_not_specialize=["count", "blocks"])
def sum_kernel(shares, result, count, blocks, BLOCK: tl.constexpr):
    """result [count] = Σ over blocks of shares [blocks, count], first to last."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < count
    total = tl.load(shares + places, mask=mask, other=0.0)
    for _ in range(1, blocks):
        shares += count
        total += tl.load(shares + places, mask=mask, other=0.0)
    tl.store(result + places, total, mask=mask)


@cache
def walkers(device: torch.device) -> int:
    """Programs of `gradient_kernel` that a device runs at once; 2 in the interpreter."""
    if device.type != "cuda":
        return 2
    return WALKERS * torch.cuda.get_device_properties(device).multi_processor_count


class Launch:
    """What kernels are launched with: all rows counted through, or sequences packed in one row."""

    def __init__(
        self,
        tokens: tuple[Tensor, Tensor, Tensor, Tensor],
        rate: Tensor,
        bounds: Tensor | None,
    ):
        self.B, self.T, self.E = tokens[0].shape
        self.K, packed = rate.shape[1], bounds is not None
        self.x, self.delta, self.write, self.read = (_rows(one) for one in tokens)
        self.rate, self.bounds, self.owners = rate.contiguous(), None, None
        K_PAD = triton.next_power_of_2(self.K)
        channels = max(2, min(NUMBERS // K_PAD, triton.next_power_of_2(self.E)))
        self.blocks = triton.cdiv(self.E, channels)
        self.constants = dict(
            E=self.E, K=self.K, CHANNELS=channels, K_PAD=K_PAD, SPAN=SPAN, GROUP=GROUP,
            PACKED=packed, NUMBER=tl.float64 if rate.dtype == torch.float64 else tl.float32,
            num_warps=1,
        )  # fmt: skip
        self.strides = dict(
            x_stride=self.x.stride(0), delta_stride=self.delta.stride(0),
            write_stride=self.write.stride(0), read_stride=self.read.stride(0),
        )  # fmt: skip
        if bounds is None:
            self.sequences = self.B
            self.spans = self.B * max(triton.cdiv(self.T, SPAN), 1)
        else:
            self.bounds = bounds.to(rate.device).contiguous()
            self.sequences = bounds.shape[0] - 1
            self.spans = self.T // SPAN + self.sequences
            self.owners = self.bounds.new_empty(self.spans, dtype=torch.int32)
            plan_kernel[triton.cdiv(self.spans, 128),](
                self.owners, self.bounds, self.sequences, self.spans, LENGTH=SPAN, BLOCK=128
            )  # fmt: skip

    def of_spans(self, d_output: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """For each span alone: Σ delta [E], memory and, if there is d_output, gradient [E, K]."""
        totals = self.rate.new_empty(self.spans, self.E)
        memories = self.rate.new_empty(self.spans, self.E, self.K)
        slopes = None if d_output is None else torch.empty_like(memories)
        if self.spans:
            span_kernel[self.spans * self.blocks,](
                self.x, self.delta, self.rate, self.write, self.read, d_output, self.owners,
                self.bounds, totals, memories, slopes, self.T, self.blocks, **self.strides,
                d_output_stride=0 if d_output is None else d_output.stride(0), **self.constants,
            )  # fmt: skip
        return totals, memories, slopes

    def carry(self, totals: Tensor, borders: Tensor, initial: Tensor | None, back: bool) -> Tensor:
        """Makes of what spans give what comes to them, in place; returns what leaves sequences."""
        final = self.rate.new_empty(self.sequences, self.E, self.K)
        initial = None if initial is None else initial.contiguous()
        if self.sequences:
            carry_kernel[self.sequences * self.blocks,](
                self.rate, self.bounds, totals, borders, initial, final, self.T, self.blocks,
                BACK=back, **self.constants,
            )  # fmt: skip
        return final


def scan(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    initial: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and final memory; arguments as in `gsa.ops.selective_scan.selective_scan`."""
    launch = Launch((x, delta, write, read), rate, bounds)
    output = x.new_empty(x.shape)
    totals, memories, _ = launch.of_spans(None)
    memory = launch.carry(totals, memories, initial, False)
    if launch.spans:
        output_kernel[launch.spans * launch.blocks,](
            launch.x, launch.delta, launch.rate, launch.write, launch.read, launch.owners,
            launch.bounds, memories, output, launch.T, launch.blocks, **launch.strides,
            **launch.constants,
        )  # fmt: skip
    return output, memory


def scan_gradients(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    initial: Tensor | None,
    bounds: Tensor | None,
    d_output: Tensor,
    d_memory: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, rate, write, read and the initial memory (of zeros if None)."""
    launch = Launch((x, delta, write, read), rate, bounds)
    tokens, blocks, spans = launch.B * launch.T, launch.blocks, launch.spans
    d_rows = _rows(d_output)
    totals, memories, slopes = launch.of_spans(d_rows)
    launch.carry(totals, memories, initial, False)
    d_initial = launch.carry(totals, slopes, d_memory, True)
    gradients = [torch.empty(one.shape, dtype=one.dtype, device=x.device)
                 for one in (x, delta, write, read)]  # fmt: skip
    d_x, d_delta, d_write, d_read = gradients
    d_rates = rate.new_empty(spans, *rate.shape)
    shares = [rate.new_empty(blocks, tokens, launch.K) for _ in range(2)]
    if spans:
        programs = min(walkers(x.device), spans * blocks)
        numbers = launch.constants["CHANNELS"] * launch.constants["K_PAD"]
        before = rate.new_empty(programs, SPAN // GROUP, numbers)
        gradient_kernel[programs,](
            launch.x, launch.delta, launch.rate, launch.write, launch.read, d_rows, launch.owners,
            launch.bounds, memories, slopes, before, d_x, d_delta, d_rates, *shares,
            launch.T, tokens, spans, blocks, **launch.strides, d_output_stride=d_rows.stride(0),
            **launch.constants,
        )  # fmt: skip
    for share, result in zip(shares, (d_write, d_read), strict=True):
        if count := result.numel():
            sum_kernel[triton.cdiv(count, BLOCK),](share, result, count, blocks, BLOCK=BLOCK)
    return d_x, d_delta, d_rates.sum(0), d_write, d_read, d_initial


def _rows(x: Tensor) -> Tensor:
    """[B, T, …] as [B·T, …], numbers of a row side by side."""
    x = x.flatten(0, 1)
    return x if x.stride(1) == 1 else x.contiguous()
