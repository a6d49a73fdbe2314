"""Mamba's selective scan: a program walks over one sequence with the memories of a few channels.

Nothing of T · E · K numbers is written: a tile of tokens is decayed, scanned, and read in
registers, a thread holding one memory's number at all tokens of the tile. Backward, a walk forward
leaves the memories before each tile, and a walk back from tile to tile scans both ways. What
programs of other channels add to the gradients of write and read is summed afterwards, in order.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16
"""C, tokens of a tile."""
THREADS = 256
"""Numbers of memory of a program: channels times K, K rounded up to a power of two."""


@triton.jit
def join(decay, memory, next_decay, next_memory):
    """Two stretches of tokens, one after the other, as one: memory = decay · before + memory."""
    return decay * next_decay, next_decay * memory + next_memory


@triton.jit
def bounds_of(sequence, bounds, tokens, TILE: tl.constexpr, PACKED: tl.constexpr):
    """(first token, number of tokens, number of its first tile); bounds that lie are cut to T."""
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(bounds + sequence).to(tl.int64), 0), tokens)
        end = tl.load(bounds + sequence + 1).to(tl.int64)
        length = tl.minimum(tl.maximum(end, begin), tokens) - begin
    else:
        begin = sequence * tokens
        length = tokens
    return begin, length, begin // TILE + sequence


@triton.jit
def load_rows(pointer, row_stride, rows, columns, inside, within, NUMBER: tl.constexpr):
    """Some columns of some rows of a matrix, 0 where not `inside` (rows) or `within` (columns)."""
    places = pointer + rows[:, None] * row_stride + columns[None, :]
    return tl.load(places, mask=inside[:, None] & within[None, :], other=0.0).to(NUMBER)


@triton.jit
def scan_kernel(
    x, delta, rate, write, read, initial, bounds, output, memory, before,
    tokens, E, K, x_stride, delta_stride, write_stride, read_stride,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, K_PAD: tl.constexpr,
    PACKED: tl.constexpr, KEEP: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Output and final memory; if KEEP, instead the memories before each tile."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, length, tile = bounds_of(sequence, bounds, tokens, TILE, PACKED)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    keys, token = tl.arange(0, K_PAD), tl.arange(0, TILE)
    some, few = channels < E, keys < K
    numbers = channels.to(tl.int64)[:, None] * K + keys[None, :]
    present = some[:, None] & few[None, :]
    rates = tl.load(rate + numbers, mask=present, other=0.0)
    held = tl.zeros([CHANNELS, K_PAD], NUMBER)
    if initial is not None:
        held = tl.load(initial + sequence * E * K + numbers, mask=present, other=0.0)
    for i in range((length + TILE - 1) // TILE):
        if KEEP:
            tl.store(before + (tile + i) * E * K + numbers, held, mask=present)
        inside = i * TILE + token < length
        rows = begin + i * TILE + token
        step = load_rows(delta, delta_stride, rows, channels, inside, some, NUMBER)
        added = step * load_rows(x, x_stride, rows, channels, inside, some, NUMBER)
        k = load_rows(write, write_stride, rows, keys, inside, few, NUMBER)
        decay = tl.exp(step[:, :, None] * rates[None])
        added = added[:, :, None] * k[:, None, :]
        added += tl.where((token == 0)[:, None, None], decay * held[None], 0.0)
        _, memories = tl.associative_scan((decay, added), 0, join)
        if not KEEP:
            q = load_rows(read, read_stride, rows, keys, inside, few, NUMBER)
            places = output + rows[:, None] * E + channels[None, :]
            result = tl.sum(memories * q[:, None, :], 2)
            tl.store(places, result, mask=inside[:, None] & some[None, :])
        held = tl.sum(tl.where((token == TILE - 1)[:, None, None], memories, 0.0), 0)
    if not KEEP:
        tl.store(memory + sequence * E * K + numbers, held, mask=present)


@triton.jit
def scan_backward_kernel(
    x, delta, rate, write, read, bounds, before, d_output, d_memory,
    d_x, d_delta, d_rate, d_write, d_read, d_initial,
    tokens, all_tokens, E, K, x_stride, delta_stride, write_stride, read_stride, d_output_stride,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, K_PAD: tl.constexpr,
    PACKED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """All gradients; of rate a share for each sequence, of write and read for each program."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, length, tile = bounds_of(sequence, bounds, tokens, TILE, PACKED)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    keys, token = tl.arange(0, K_PAD), tl.arange(0, TILE)
    some, few = channels < E, keys < K
    numbers = channels.to(tl.int64)[:, None] * K + keys[None, :]
    present = some[:, None] & few[None, :]
    rates = tl.load(rate + numbers, mask=present, other=0.0)
    d_rates = tl.zeros([CHANNELS, K_PAD], NUMBER)
    d_held = tl.zeros([CHANNELS, K_PAD], NUMBER)
    if d_memory is not None:
        d_held = tl.load(d_memory + sequence * E * K + numbers, mask=present, other=0.0)
    tiles = (length + TILE - 1) // TILE
    for back in range(tiles):
        i = tiles - 1 - back
        inside = i * TILE + token < length
        rows = begin + i * TILE + token
        here, keyed = inside[:, None] & some[None, :], inside[:, None] & few[None, :]
        step = load_rows(delta, delta_stride, rows, channels, inside, some, NUMBER)
        value = load_rows(x, x_stride, rows, channels, inside, some, NUMBER)
        k = load_rows(write, write_stride, rows, keys, inside, few, NUMBER)
        q = load_rows(read, read_stride, rows, keys, inside, few, NUMBER)
        d_y = load_rows(d_output, d_output_stride, rows, channels, inside, some, NUMBER)
        added, decay = step * value, tl.exp(step[:, :, None] * rates[None])

        # The memories before each token: a scan over the tokens before them, in this tile.
        earlier = inside & (token > 0)
        last_step = load_rows(delta, delta_stride, rows - 1, channels, earlier, some, NUMBER)
        last_x = load_rows(x, x_stride, rows - 1, channels, earlier, some, NUMBER)
        last_k = load_rows(write, write_stride, rows - 1, keys, earlier, few, NUMBER)
        held = tl.load(before + (tile + i) * E * K + numbers, mask=present, other=0.0)
        last_decay = tl.exp(last_step[:, :, None] * rates[None])
        last_added = (last_step * last_x)[:, :, None] * last_k[:, None, :]
        last_added += tl.where((token == 0)[:, None, None], held[None], 0.0)
        _, olds = tl.associative_scan((last_decay, last_added), 0, join)
        memories = decay * olds + added[:, :, None] * k[:, None, :]
        place = tl.program_id(1).to(tl.int64) * all_tokens + rows
        shares = place[:, None] * K + keys[None, :]
        tl.store(d_read + shares, tl.sum(memories * d_y[:, :, None], 1), mask=keyed)

        # Gradients of the memories: a scan over the tokens after them, in this tile.
        later = (i * TILE + token + 1 < length) & (token < TILE - 1)
        next_step = load_rows(delta, delta_stride, rows + 1, channels, later, some, NUMBER)
        next_decay = tl.exp(next_step[:, :, None] * rates[None])
        slopes = d_y[:, :, None] * q[:, None, :]
        slopes += tl.where((token == TILE - 1)[:, None, None], d_held[None], 0.0)
        _, slopes = tl.associative_scan((next_decay, slopes), 0, join, reverse=True)
        tl.store(d_write + shares, tl.sum(slopes * added[:, :, None], 1), mask=keyed)
        d_added = tl.sum(slopes * k[:, None, :], 2)
        slopes *= decay
        d_held = tl.sum(tl.where((token == 0)[:, None, None], slopes, 0.0), 0)
        slopes *= olds
        d_rates += tl.sum(slopes * step[:, :, None], 0)
        d_step = value * d_added + tl.sum(slopes * rates[None], 2)
        places = rows[:, None] * E + channels[None, :]
        tl.store(d_x + places, step * d_added, mask=here)
        tl.store(d_delta + places, d_step, mask=here)
    tl.store(d_rate + sequence * E * K + numbers, d_rates, mask=present)
    tl.store(d_initial + sequence * E * K + numbers, d_held, mask=present)


class Launch:
    """Arguments of both kernels: all rows counted through, or sequences packed in one row."""

    def __init__(
        self,
        tokens: tuple[Tensor, Tensor, Tensor, Tensor],
        rate: Tensor,
        bounds: Tensor | None,
    ):
        self.B, self.T, self.E = tokens[0].shape
        self.K = rate.shape[1]
        self.sequences = self.B if bounds is None else bounds.shape[0] - 1
        self.rows = [_rows(one) for one in tokens]
        self.strides = [one.stride(0) for one in self.rows]
        self.rate, self.packed = rate.contiguous(), bounds is not None
        self.bounds = None if bounds is None else bounds.to(rate.device).contiguous()
        K_PAD = triton.next_power_of_2(self.K)
        channels = min(max(THREADS // K_PAD, 1), triton.next_power_of_2(self.E))
        self.blocks = triton.cdiv(self.E, channels)
        self.constants = dict(
            TILE=TILE, CHANNELS=channels, K_PAD=K_PAD, PACKED=self.packed,
            NUMBER=tl.float64 if rate.dtype == torch.float64 else tl.float32,
            num_warps=max(channels * K_PAD // 32, 1),
        )  # fmt: skip

    def forward(
        self, initial: Tensor | None, output: Tensor | None, memory: Tensor | None,
        before: Tensor | None,
    ) -> None:  # fmt: skip
        x, delta, write, read = self.rows
        scan_kernel[self.sequences, self.blocks](
            x, delta, self.rate, write, read, initial, self.bounds, output, memory, before,
            self.T, self.E, self.K, *self.strides, KEEP=before is not None, **self.constants,
        )  # fmt: skip


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
    memory = rate.new_empty(launch.sequences, *rate.shape)
    if launch.sequences:
        launch.forward(None if initial is None else initial.contiguous(), output, memory, None)
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
    tokens, E, K = launch.B * launch.T, launch.E, launch.K
    d_x, d_delta = x.new_empty(x.shape), delta.new_empty(delta.shape)
    d_rates, d_initial = (rate.new_empty(launch.sequences, E, K) for _ in range(2))
    shares = rate.new_empty(2, launch.blocks, tokens, K)
    if launch.sequences:
        before = rate.new_empty(tokens // TILE + launch.sequences, E, K)
        launch.forward(None if initial is None else initial.contiguous(), None, None, before)
        d_rows = _rows(d_output)
        wide = None if d_memory is None else d_memory.contiguous()
        inputs = launch.rows
        scan_backward_kernel[launch.sequences, launch.blocks](
            inputs[0], inputs[1], launch.rate, inputs[2], inputs[3], launch.bounds, before,
            d_rows, wide, d_x, d_delta, d_rates, shares[0], shares[1], d_initial,
            launch.T, tokens, E, K, *launch.strides, d_rows.stride(0), **launch.constants,
        )  # fmt: skip
    d_write, d_read = (one.sum(0).view(write.shape).to(write.dtype) for one in shares)
    return d_x, d_delta, d_rates.sum(0), d_write, d_read, d_initial


def _rows(x: Tensor) -> Tensor:
    """[B, T, …] as [B·T, …], numbers of a row side by side."""
    x = x.flatten(0, 1)
    return x if x.stride(1) == 1 else x.contiguous()
