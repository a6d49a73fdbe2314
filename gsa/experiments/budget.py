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
    config: BudgetConfig,
    models: Mapping[str, GSAConfig],
    *,
    seq_len: int,
    tokens: int,
    training: bool = True,
) -> str:
    """A table: parameters and GPU-hours of each model on so many tokens in rows of seq_len.

    training: forward and backward; else forward alone.
    """
    rows: dict[str, tuple[int, float]] = {}
    for name, model in models.items():
        flops = flops_per_token(model, seq_len)
        each = flops.forward_backward if training else flops.forward
        rows[name] = (count_parameters(model).total, hours(config, tokens, each))
    title = f"{tokens:,} tokens for each, in rows of {seq_len}; {assumed(config)}"
    return f"{title}\n{hours_table(rows)}"


def hours(config: BudgetConfig, tokens: int, flops: float) -> float:
    """GPU-hours of so many tokens at that many FLOPs each."""
    peak = peak_flops(config.gpu)
    assert peak is not None
    return device_hours(tokens, flops, peak, config.mfu)


def assumed(config: BudgetConfig) -> str:
    return f"{config.gpu} at {config.mfu:.0%} of the bf16 peak, an assumption"


def hours_table(rows: Mapping[str, tuple[int, float]]) -> str:
    """Parameters and GPU-hours by name, and their sum."""
    lines = [["", "parameters", "GPU-hours"]]
    for name, (parameters, spent) in rows.items():
        lines.append([name, f"{parameters / 1e6:,.2f}M", f"{spent:,.2f}"])
    lines.append([f"all {len(rows)}", "", f"{sum(spent for _, spent in rows.values()):,.2f}"])
    return aligned(lines)
