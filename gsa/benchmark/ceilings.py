"""What the device can do at best, measured in the same run: a large copy, a large product."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from gsa.benchmark.timing import Meter


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    copy_bytes_per_second: float
    """Bytes read plus bytes written, device memory to device memory."""
    matmul_flops_per_second: float
    """bf16 operands, random."""


def measure_ceilings(
    device: torch.device, meter: Meter, *, copy_bytes: int = 2**30, side: int = 8192
) -> Ceilings:
    """A copy of `copy_bytes` and a product of two side × side matrices, by their medians."""

    def median(run: Callable[[], object]) -> float:
        return meter.in_turns({"run": meter.prepare(run)}, seconds=0.3)["run"].median

    source = torch.randint(256, (copy_bytes,), dtype=torch.uint8, device=device)
    copied = median(partial(torch.empty_like(source).copy_, source))
    del source
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    multiplied = median(partial(torch.mm, a, b, out=torch.empty_like(a)))
    meter.release()
    return Ceilings(
        copy_bytes_per_second=2 * copy_bytes / copied,
        matmul_flops_per_second=2 * side**3 / multiplied,
    )
