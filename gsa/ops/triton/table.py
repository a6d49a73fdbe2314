"""The launch table: tiles of the walking kernels that a device was measured to prefer to the
formula of `plan.py`. `gsa bench tune` makes its rows.

A key has an architecture, a kernel, a dtype and sizes of one head, never a batch or a length: a row
in a batch is computed like the row alone. What one architecture runs may not fit into another's
shared memory, so a row holds for its own only.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_name("launch_table.json")
KERNELS = ("contract", "expand", "write_back", "scan")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MOST_NUMBERS = 4096
"""Numbers of the memory per warp: 128 registers of a thread's 255."""

Key = tuple[str, str, str, int, int, int]


class Row(NamedTuple):
    """A key and its tile. Raises nothing by itself: see `checked`."""

    arch: str
    """Compute capability, such as sm90; cpu in Triton's interpreter."""
    kernel: str
    dtype: str
    """q's: bf16, fp16 or fp32."""
    width: int
    """K or V, whichever the kernel walks over."""
    slots: int
    """M as kernels pad it: to a power of two, at least 16."""
    heads: int
    """H / G."""
    block: int
    """Columns of the memory a program."""
    warps: int
    stages: int
    """Of the pipeline."""

    @property
    def key(self) -> Key:
        return self[:6]

    @property
    def tile(self) -> tuple[int, int, int]:
        """(block, warps, stages)"""
        return self[6:]


def power_of_two(number: int) -> int:
    """The smallest that is at least `number` and at least 16, as kernels pad sizes."""
    return max(16, 1 << (number - 1).bit_length())


def checked(fields: object) -> Row:
    """The row that JSON gave. ValueError: which field, what was expected, what came."""
    if not isinstance(fields, dict) or set(fields) != set(Row._fields):
        raise ValueError(f"expected an object of {', '.join(Row._fields)}")
    for name in ("width", "slots", "heads", "block", "warps", "stages"):
        if type(fields[name]) is not int or fields[name] < 1:
            raise ValueError(f"{name}: expected a whole number above 0, got {fields[name]!r}")
    row = Row(*(fields[name] for name in Row._fields))
    widest = min(power_of_two(row.width), MOST_NUMBERS * row.warps // row.slots)
    for name, fits, expected in (
        ("arch", re.fullmatch(r"sm\d{2,3}|cpu", str(row.arch)), "sm and a compute capability"),
        ("kernel", row.kernel in KERNELS, f"one of {', '.join(KERNELS)}"),
        ("dtype", row.dtype in DTYPES.values(), f"one of {', '.join(DTYPES.values())}"),
        ("slots", row.slots == power_of_two(row.slots), "a power of two from 16 on"),
        ("warps", row.warps in (4, 8), "4 or 8"),
        ("stages", row.stages <= 5, "1 to 5"),
        ("block", row.block == power_of_two(row.block), "a power of two from 16 on"),
        ("block", row.block <= widest, f"at most {widest} (the width, or what registers hold)"),
    ):
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {getattr(row, name)!r}")
    return row


def read(path: Path) -> tuple[Row, ...]:
    """The rows of a table file, {"rows": [...]}.

    Raises:
        ValueError: no such table; the message names the file and the row.
        OSError: the file cannot be read.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise ValueError(f'{path}: expected a launch table, {{"rows": [...]}}')
    rows: dict[Key, Row] = {}
    for number, fields in enumerate(document["rows"], 1):
        try:
            row = checked(fields)
            if row.key in rows:
                raise ValueError("expected one row of a key, got a second")
        except ValueError as error:
            raise ValueError(f"{path}: row {number}, {json.dumps(fields)}: {error}") from None
        rows[row.key] = row
    return tuple(rows.values())


def text(rows: Iterable[Row]) -> str:
    """A table file of these rows: sorted, each on a line."""
    lines = [f"  {json.dumps(row._asdict())}" for row in sorted(rows)]
    return '{"rows": [\n' + ",\n".join(lines) + "\n]}\n" if lines else '{"rows": []}\n'


@cache
def committed() -> dict[Key, Row]:
    """The package's own table."""
    return {row.key: row for row in read(PATH)}


# Not a context variable: autograd runs backward passes in threads of its own.
_instead: dict[Key, Row] | None = None
_edition = 0


def edition() -> int:
    """Another number whenever the table is another."""
    return _edition


@contextmanager
def using(rows: Iterable[Row]) -> Iterator[None]:
    """These rows are the whole table while the block runs, in every thread of the process."""
    before = _instead
    _replace({row.key: row for row in rows})
    try:
        yield
    finally:
        _replace(before)


def _replace(rows: dict[Key, Row] | None) -> None:
    global _instead, _edition
    _instead, _edition = rows, _edition + 1
    find.cache_clear()


def architecture(device: torch.device) -> str:
    """What rows call a device; for what is not NVIDIA's, a name that none should have."""
    if device.type == "cuda" and torch.version.cuda:
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm{major}{minor}"
    return device.type


@cache
def find(
    device: torch.device, kernel: str, dtype: torch.dtype, width: int, slots: int, heads: int
) -> tuple[int, int, int] | None:
    """(block, warps, stages) of a walking kernel's launch; None for what the table does not know.

    slots: M, padded. heads: R = H / G.
    """
    rows = committed() if _instead is None else _instead
    row = rows.get((architecture(device), kernel, DTYPES.get(dtype, ""), width, slots, heads))
    return None if row is None else row.tile
