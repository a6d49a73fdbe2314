"""What an experiment will take, by the cost model, said before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass

from gsa.benchmark.tables import aligned
from gsa.model import GSAConfig
from gsa.model.cost import DEVICES, count_parameters, device_hours, flops_per_token, peak_flops


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Fields that every experiment has. ValueError for a GPU not known, or an impossible share."""

    plan: bool = False
    """Only say what would be run and what it would take."""
    gpu: str = "H100"
    """The GPU that hours are estimated for: H100, A100, ..."""
    mfu: float = 0.4
    """Share of its bf16 peak in the estimate; a guess of yours. Small models stay far below it."""

    def __post_init__(self) -> None:
        if peak_flops(self.gpu) is None:
            known = ", ".join(device.name for device in DEVICES)
            raise ValueError(f"gpu: expected one of {known}, got {self.gpu!r}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu: expected a number above 0, at most 1, got {self.mfu}")


FREE = ("plan", "gpu", "mfu")
"""Fields above: they change no result."""


def estimate(
    config: BudgetConfig, models: Mapping[str, GSAConfig], *, seq_len: int, tokens: int
) -> str:
    """A table: parameters and GPU-hours of each model on so many tokens in rows of seq_len."""
    peak = peak_flops(config.gpu)
    assert peak is not None
    lines, total = [["", "parameters", "GPU-hours"]], 0.0
    for name, model in models.items():
        flops = flops_per_token(model, seq_len).forward_backward
        hours = device_hours(tokens, flops, peak, config.mfu)
        total += hours
        parameters = count_parameters(model).total
        lines.append([name, f"{parameters / 1e6:,.2f}M", f"{hours:,.2f}"])
    lines.append([f"all {len(models)}", "", f"{total:,.2f}"])
    title = (
        f"{tokens:,} tokens for each, in rows of {seq_len}; {config.gpu} at "
        f"{config.mfu:.0%} of the bf16 peak, an assumption"
    )
    return f"{title}\n{aligned(lines)}"
