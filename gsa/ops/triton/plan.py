"""What a call of the kernels is made of: sizes, launch parameters, descriptors of tensors."""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gsa.ops.triton import common
from gsa.ops.triton.sizes import CHUNK, SNAPSHOT, Sizes

INTERPRETED = not isinstance(common.plan_kernel, triton.JITFunction)
"""Whether kernels run on the CPU in Triton's interpreter, which cannot multiply bf16."""


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of factors that hold decays: bf16's range is needed, fp16's precision too."""
    return torch.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else torch.float32


class Tile(NamedTuple):
    """Launch parameters of a walking kernel: columns a program, warps, pipeline stages."""

    block: int
    warps: int
    stages: int


STAGES = {"contract": 3, "expand": 4, "write_back": 3, "scan": 3}
"""Pipeline stages that were the fastest on an H100, where shared memory allows them."""

TILES = {"contract": (2, 1), "expand": (1, 2), "write_back": (1, 1), "scan": (0, 0)}
"""Tiles [C, columns] and [C, slots] that a stage loads beside those of every query head."""

HEAD_TILES = {"contract": 0, "expand": 0, "write_back": 1, "scan": 1}
"""Pairs of tiles that a stage loads for every query head of a group."""


def walk_tile(
    kernel: str, width: int, slots: int, heads: int, dtype: torch.dtype, shared: int
) -> Tile:
    """Tiles of a walking kernel; its slice of the memory, 64 slots × 128 columns, is in registers.

    heads: R, the query heads that a program of `write_back` or `scan` walks over. shared: bytes of
    shared memory. Never a function of the batch: a row in it is computed like the row alone.
    """
    padded = max(16, triton.next_power_of_2(slots))
    low = dtype == torch.bfloat16
    most = 128 if low else 32
    if low and (kernel == "expand" or (HEAD_TILES[kernel] and heads > 1)):
        most = 64
    block = max(16, min(most, (8192 if low else 2048) // padded, triton.next_power_of_2(width)))
    if not low or heads * HEAD_TILES[kernel] > 4:
        return Tile(block, 4, 1)
    columns, rows = (n + heads * HEAD_TILES[kernel] for n in TILES[kernel])
    while True:
        stage = 2 * CHUNK * (columns * block + rows * padded)
        beside = 4 * padded * block + 4 * CHUNK * max(padded, block)  # results on their way out
        stages = (shared - beside) // stage
        if stages > 0 or block == 16:
            return Tile(block, 4, max(1, min(stages, STAGES[kernel])))
        block //= 2


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; an H100's where there is no such thing."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@dataclass
class Plan:
    """One call: its inputs, sizes, and for packed sequences who owns which span of tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_forget: Tensor
    write: Tensor | None
    cu_seqlens: Tensor | None

    def __post_init__(self) -> None:
        n = self.sizes = Sizes.of(self.q, self.k, self.v, self.log_forget, self.cu_seqlens)
        self.B, self.T, self.H, self.G, self.K, self.V, self.M = n.B, n.T, n.H, n.G, n.K, n.V, n.M
        self.X, self.tokens, self.sequences, self.packed = n.X, n.tokens, n.S, n.packed
        self.unit, self.units = n.unit, n.spans(n.unit)
        self.chunks, self.spans = n.spans(CHUNK), n.spans(SNAPSHOT)
        self.operand_dtype = operand_dtype(self.q.dtype)
        self.operand = tl.bfloat16 if self.operand_dtype == torch.bfloat16 else tl.float32
        self.factor = tl.float16 if self.q.dtype == torch.float16 else self.operand
        # Rounding factors to TF32 once leaves fp16's 11 bits, three products in TF32 leave fp32's.
        # (Of many slots, Triton 3.6 does not fit the former into shared memory.)
        once = self.q.dtype == torch.float16 and self.M <= 128
        self.precision = "tf32" if once else "tf32x3"
        # Token by token the memory is rounded 64 times a chunk; fp32's error budget grants one.
        self.wide = tl.float64 if self.q.dtype == torch.float32 else tl.float32
        self.slots = max(16, triton.next_power_of_2(self.M))
        self.gate = dict(
            G=self.G, M=self.M, C=CHUNK, EXACT=self.q.dtype == torch.float32, PACKED=self.packed
        )

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, write: Tensor | None,
           cu_seqlens: Tensor | None) -> "Plan":  # fmt: skip
        """Gates in one piece; keys, values and queries may keep their strides (`token_rows`)."""
        write = None if write is None else write.contiguous()
        return Plan(q, k, v, log_forget.contiguous(), write, cu_seqlens)

    @cached_property
    def bounds(self) -> Tensor:
        if self.cu_seqlens is None:
            return self.q
        return self.cu_seqlens.to(self.q.device, non_blocking=True).contiguous()

    def owners(self, length: int) -> Tensor:
        if not self.packed:
            return self.q
        count = self.sizes.spans(length)
        owners = self.q.new_empty(count, dtype=torch.int32)
        common.plan_kernel[(triton.cdiv(count, 128),)](
            owners, self.bounds, self.sequences, count, LENGTH=length, BLOCK=128
        )
        return owners

    @cached_property
    def unit_owners(self) -> Tensor:
        return self.owners(self.unit)

    @cached_property
    def chunk_owners(self) -> Tensor:
        return self.owners(CHUNK)

    @cached_property
    def span_owners(self) -> Tensor:
        return self.owners(SNAPSHOT)

    def tiles(self, x: Tensor, heads: int, width: int, stride: int, block: int,
              parts: int = 1) -> TensorDescriptor | None:  # fmt: skip
        """Chunks of x [parts · tokens, heads, width] as a descriptor."""
        shape = (parts * self.B, heads, self.T, width)
        return descriptor(x, shape, (self.T * stride, width, stride), (CHUNK, block))

    def snapshot_tiles(
        self, snapshots: Tensor | None, options: dict[str, Any]
    ) -> TensorDescriptor | None:
        """Memories [borders, G, M, width] as a descriptor."""
        if snapshots is None:
            return None
        borders, G, M, width = snapshots.shape
        shape, strides = (1, borders * G, M, width), (snapshots.numel(), M * width, width)
        return descriptor(snapshots, shape, strides, (options["M_PAD"], options["BLOCK"]))

    def tile(self, kernel: str, width: int) -> Tile:
        R, shared = self.H // self.G, shared_memory(self.q.device)
        return walk_tile(kernel, width, self.M, R, self.q.dtype, shared)

    def walk(self, kernel: str, width: int, column: int) -> dict[str, Any]:
        """Compile-time parameters of a walking kernel over `width` columns from `column` on."""
        tile = self.tile(kernel, width)
        return dict(
            G=self.G, M=self.M, W=width, X=self.X, COLUMN=column, C=CHUNK, UNIT=self.unit,
            M_PAD=self.slots, BLOCK=tile.block, OPERAND=self.operand, PRECISION=self.precision,
            PACKED=self.packed, WIDE=self.wide, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def token_rows(x: Tensor) -> tuple[Tensor, int]:
    """(x with [heads, width] together and rows evenly apart, elements from row to row)."""
    B, T, heads, width = x.shape
    step = x.stride(1) if T > 1 else (x.stride(0) if B > 1 else heads * width)
    together = (width == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == width)
    even = B == 1 or T <= 1 or x.stride(0) == T * step
    if not (together and even):
        x, step = x.contiguous(), heads * width
    return x, step


def descriptor(x: Tensor, shape: tuple[int, int, int, int], strides: tuple[int, int, int],
               block: tuple[int, int]) -> TensorDescriptor | None:  # fmt: skip
    """x as [rows, heads, tokens, width] in blocks of tokens × width; the last stride is 1.

    None where the copy engine cannot take it: it wants multiples of 16 bytes.
    """
    unit = 16 // x.element_size()
    if x.data_ptr() % 16 or min(shape) < 1 or any(step % unit for step in strides):
        return None
    return TensorDescriptor(x, list(shape), [*strides, 1], [1, 1, *block])


def all_or_none(*tiles: TensorDescriptor | None) -> tuple[TensorDescriptor | None, ...]:
    return tiles if all(tile is not None for tile in tiles) else (None,) * len(tiles)
