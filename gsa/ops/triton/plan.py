"""What a call of the kernels is made of: sizes, launch parameters, descriptors of tensors."""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

from collections.abc import Hashable
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gsa.ops.triton import common, table
from gsa.ops.triton.program import INTERPRETED, Constants, Direct, Machine
from gsa.ops.triton.sizes import Sizes, number_dtype
from gsa.ops.triton.steps import CheckedDescriptor


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of factors that hold decays: bf16's range is needed, fp16's precision too."""
    if dtype == torch.bfloat16 and not INTERPRETED:  # the interpreter cannot multiply bf16
        return torch.bfloat16
    return number_dtype(dtype)


class Tile(NamedTuple):
    """Launch parameters of a walking kernel: columns a program, warps, pipeline stages."""

    block: int
    warps: int
    stages: int


STAGES = {"contract": 3, "expand": 3, "write_back": 3, "scan": 3}
"""Pipeline stages that were the fastest on an H100, where shared memory allows them."""

TILES = {"contract": (2, 1), "expand": (1, 2), "write_back": (1, 1), "scan": (0, 0)}
"""Tiles [C, columns] and [C, slots] that a stage loads beside those of every query head."""

HEAD_TILES = {"contract": 0, "expand": 0, "write_back": 1, "scan": 1}
"""Pairs of tiles that a stage loads for every query head of a group."""

MEMORY_NUMBERS = {torch.bfloat16: 8192, torch.float16: 2048, torch.float32: 2048}
"""What a program holds of the memory, in registers."""


def walk_tile(
    kernel: str, width: int, slots: int, heads: int, dtype: torch.dtype, shared: int
) -> Tile:
    """Tiles of a walking kernel; its slice of the memory, 64 slots × 128 columns, is in registers.

    heads: R, the query heads that a program of `write_back` or `scan` walks over. shared: bytes of
    shared memory. Never a function of the batch: a row in it is computed like the row alone.
    """
    padded = max(16, triton.next_power_of_2(slots))
    low = dtype == torch.bfloat16
    most = {torch.bfloat16: 128, torch.float16: 32, torch.float32: 64}[dtype]
    if low and (kernel == "expand" or (HEAD_TILES[kernel] and heads > 1)):
        most = 64
    columns = min(most, MEMORY_NUMBERS[dtype] // padded, triton.next_power_of_2(width))
    block = max(16, columns)
    if not low:
        return Tile(block, warps_of(kernel, block, low), 1)
    if heads > common.FEW_HEADS.value:
        heads = 1  # a stage of the loop over them
    columns, rows = (n + heads * HEAD_TILES[kernel] for n in TILES[kernel])
    while True:
        stage = 2 * 64 * (columns * block + rows * padded)
        beside = 4 * padded * block + 4 * 64 * max(padded, block)  # results on their way out
        stages = (shared - beside) // stage
        if stages > 0 or block == 16:
            warps = warps_of(kernel, block, low)
            return Tile(block, warps, max(1, min(stages, STAGES[kernel])))
        block //= 2


def warps_of(kernel: str, block: int, low: bool) -> int:
    """4, a warpgroup of Hopper's; 8 where ptxas 12.8 makes wrong code of `expand_kernel` with 4: in
    narrow tiles of bf16 it reads a register that nothing has written, part of an address."""
    return 8 if low and kernel == "expand" and block < 64 else 4


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; an H100's where there is no such thing."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class Recipe:
    """What is the same for all calls of a kind, whatever their B and T; made once: `recipe_of`."""

    def __init__(self, kind: "Kind"):
        assert kind.unit % kind.span == 0 and kind.span % kind.chunk == 0, kind
        self.kind = kind
        self.chunk, self.slots = kind.chunk, max(16, triton.next_power_of_2(kind.M))
        dtype = kind.dtype
        self.number_dtype, self.operand_dtype = number_dtype(dtype), operand_dtype(dtype)
        self.number = tl.float64 if dtype == torch.float32 else tl.float32
        self.operand = tl.bfloat16 if self.operand_dtype == torch.bfloat16 else self.number
        self.factor = tl.float16 if dtype == torch.float16 else self.operand
        self.prepare_warps = 8 if dtype == torch.float32 else 4
        # Sums in fp64 spill. Left to itself, ptxas then gives them 64 registers and wrong results.
        self.limits = dict(maxnreg=255) if dtype == torch.float32 else {}
        self.compiled: set[Hashable] = set()  # kinds of calls whose both passes are compiled
        self.tile = cache(self._tile)
        self.walk = cache(self._walk)

    @property
    def common(self) -> dict[str, object]:
        n = self.kind
        return dict(
            G=n.G, M=n.M, C=self.chunk, M_PAD=self.slots, NUMBER=self.number,
            PACKED=n.bounds_dtype is not None,
        )  # fmt: skip

    def _tile(self, kernel: str, width: int) -> Tile:
        """What was measured for such a device and sizes, else the formula's."""
        n = self.kind
        R = n.H // n.G
        if known := table.find(n.device, kernel, n.dtype, width, self.slots, R):
            return Tile(*known)
        return walk_tile(kernel, width, n.M, R, n.dtype, shared_memory(n.device))

    def _walk(self, kernel: str, width: int, column: int) -> dict[str, object]:
        """Compile-time parameters of a walking kernel over `width` columns from `column` on."""
        block, warps, stages = self.tile(kernel, width)
        return self.common | dict(
            H=self.kind.H, W=width, X=self.kind.K + self.kind.V, COLUMN=column,
            UNIT=self.kind.unit, SNAPSHOT=self.kind.span, BLOCK=block, OPERAND=self.operand,
            num_warps=warps, num_stages=stages, **self.limits,
        )  # fmt: skip

    def walk_both(self, kernel: str) -> dict[str, object]:
        """Those of a kernel that walks keys and values in one launch."""
        n = self.kind
        keys, values = self.tile(kernel, n.K), self.tile(kernel, n.V)
        return self.common | dict(
            K=n.K, V=n.V, UNIT=n.unit, KEY_BLOCK=keys.block, VALUE_BLOCK=values.block,
            OPERAND=self.operand, num_warps=keys.warps, num_stages=min(keys.stages, values.stages),
            **self.limits,
        )  # fmt: skip


class Kind(NamedTuple):
    """What kernels are compiled for."""

    edition: int  # of the launch table
    device: torch.device
    dtype: torch.dtype
    gate_dtype: torch.dtype
    write_dtype: torch.dtype | None
    bounds_dtype: torch.dtype | None  # None if not packed
    H: int
    G: int
    K: int
    V: int
    M: int
    chunk: int
    span: int
    unit: int


recipe_of = cache(Recipe)


class Plan:
    """One call: its inputs, sizes, and for packed sequences who owns which span of tokens."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_forget: Tensor,
        write: Tensor | None,
        cu_seqlens: Tensor | None,
        machine: Machine | None = None,
    ):
        """Gates in one piece, and boundaries, on the device; keys, values and queries may keep
        their strides (`token_rows`). machine: None runs every launch at once."""
        self.q, self.k, self.v, self.log_forget, self.write = q, k, v, log_forget, write
        self.machine = Direct(q.device) if machine is None else machine
        n = self.sizes = Sizes.of(q, k, v, log_forget, cu_seqlens)
        self.B, self.T, self.H, self.G, self.K, self.V, self.M = n.B, n.T, n.H, n.G, n.K, n.V, n.M
        self.X, self.tokens, self.sequences, self.packed = n.X, n.tokens, n.S, n.packed
        self.units, self.chunks, self.spans = n.spans(n.unit), n.spans(n.chunk), n.spans(n.span)
        dtypes = (x if x is None else x.dtype for x in (log_forget, write, cu_seqlens))
        kind = Kind(
            table.edition(),
            self.machine.device,
            q.dtype,
            *dtypes,
            n.H,
            n.G,
            n.K,
            n.V,
            n.M,
            n.chunk,
            n.span,
            n.unit,
        )
        self.recipe: Recipe = recipe_of(kind)
        self.bounds = q if cu_seqlens is None else cu_seqlens
        if not self.packed:  # not looked at
            self.unit_owners = self.chunk_owners = self.span_owners = q

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised, in the dtype of sums if none is given."""
        return self.machine.new(shape, dtype or self.recipe.number_dtype)

    def new_like(self, x: Tensor) -> Tensor:
        return self.machine.new(tuple(x.shape), x.dtype)

    def launch(
        self, kernel: Any, programs: int, arguments: tuple[object, ...], constants: Constants
    ) -> None:
        self.machine.launch(kernel, programs, arguments, constants)

    def owners(self, length: int) -> Tensor:
        count, block = self.sizes.spans(length), 128
        owners = self.new(count, dtype=torch.int32)
        self.launch(
            common.plan_kernel, -(-count // block),
            (owners, self.bounds, self.sequences, count), dict(LENGTH=length, BLOCK=block),
        )  # fmt: skip
        return owners

    @cached_property
    def unit_owners(self) -> Tensor:
        return self.owners(self.sizes.unit)

    @cached_property
    def chunk_owners(self) -> Tensor:
        return self.owners(self.sizes.chunk)

    @cached_property
    def span_owners(self) -> Tensor:
        return self.owners(self.sizes.span)

    def tiles(self, x: Tensor, heads: int, width: int, stride: int, block: int,
              parts: int = 1) -> TensorDescriptor | None:  # fmt: skip
        """Chunks of x [parts · tokens, heads, width] as a descriptor."""
        shape = (parts * self.B, heads, self.T, width)
        rows = (self.T * stride, width, stride)
        return descriptor(x, shape, rows, (self.recipe.chunk, block))

    def snapshot_tiles(self, snapshots: Tensor | None, block: int) -> TensorDescriptor | None:
        """Memories [borders, G, M, width] as a descriptor."""
        if snapshots is None:
            return None
        borders, G, M, width = snapshots.shape
        shape, strides = (1, borders * G, M, width), (snapshots.numel(), M * width, width)
        return descriptor(snapshots, shape, strides, (self.recipe.slots, block))


def token_rows(x: Tensor) -> tuple[Tensor, int]:
    """(x with [heads, width] together and rows evenly apart, elements from row to row)."""
    B, T, heads, width = x.shape
    if x.is_contiguous():
        return x, heads * width
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
    a, b, c = strides
    if address(x) & 15 or (a | b | c) * x.itemsize & 15 or 0 in shape:
        return None
    return CheckedDescriptor(x, list(shape), [a, b, c, 1], [1, 1, *block])


def address(x: Tensor) -> int:
    """Of its first number; on the meta device after that of its storage, a multiple of 16."""
    return x.storage_offset() * x.itemsize if x.device.type == "meta" else x.data_ptr()


def all_or_none(*tiles: TensorDescriptor | None) -> tuple[TensorDescriptor | None, ...]:
    return (None,) * len(tiles) if None in tiles else tiles
