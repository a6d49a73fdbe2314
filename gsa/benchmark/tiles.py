"""Launches of a walking kernel that are worth trying. Imports triton."""

import torch

from gsa.ops.triton.plan import HEAD_TILES, TILES, walk_tile, warps_of
from gsa.ops.triton.sizes import chunk_tokens, number_dtype
from gsa.ops.triton.table import DTYPES, Row, power_of_two

BLOCKS = (16, 32, 64, 128, 256)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
MOST_NUMBERS = 2048
"""Numbers of the memory that a warp is to hold: 64 registers a thread, as the formula has it."""


def formula(
    arch: str, kernel: str, dtype: torch.dtype, width: int, slots: int, heads: int, shared: int
) -> Row:
    """The formula's tile as a row. slots: M; heads: H / G; shared: bytes a program may have."""
    tile = walk_tile(kernel, width, slots, heads, dtype, shared)
    return Row(arch, kernel, DTYPES[dtype], width, power_of_two(slots), heads, *tile)


def stage_bytes(row: Row) -> int:
    """Shared memory of what one pipeline stage loads, at the least."""
    dtype = {name: dtype for dtype, name in DTYPES.items()}[row.dtype]
    factor = 2 if row.dtype == "bf16" else number_dtype(dtype).itemsize
    columns, rows = (n + row.heads * HEAD_TILES[row.kernel] for n in TILES[row.kernel])
    per_token = columns * row.block * dtype.itemsize + rows * row.slots * factor
    return chunk_tokens(dtype, row.slots) * per_token


def candidates(default: Row, shared: int) -> list[Row]:
    """Neighbours of the formula's row, nearest first.

    Blocks up to twice as wide or narrow as the formula's, 4 or 8 warps, 1 to 4 stages; without
    those that cannot fit into registers or into `shared` bytes, of too few warps (`warps_of`), and
    a single stage where the formula overlaps loads and work.
    """
    found = []
    for block in BLOCKS:
        near = default.block // 2 <= block <= 2 * default.block
        least = warps_of(default.kernel, block, default.dtype == "bf16")
        for warps in WARPS if near and block <= power_of_two(default.width) else ():
            for stages in STAGES:
                row = default._replace(block=block, warps=warps, stages=stages)
                fits = stages * stage_bytes(row) <= shared
                overlaps = stages > 1 or default.stages == 1
                held = block * row.slots <= MOST_NUMBERS * warps
                if warps >= least and fits and overlaps and held and row != default:
                    found.append(row)

    def distance(row: Row) -> tuple[int, int]:
        changed = sum(a != b for a, b in zip(row.tile, default.tile, strict=True))
        return changed, abs(row.stages - default.stages)

    return sorted(found, key=distance)
