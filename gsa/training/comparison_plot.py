"""The panels of `gsa report`: loss, learning rate, gradient norm, speed and more, over tokens."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsa.training.comparison import MADE_BY, Run, series, skipped_tokens
from gsa.training.curves import short_number, smoothed, smoothing

_COLORS = 10
_EMPTY = "."
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One drawing. smooth: a bold average over faint raw values. marks: skipped steps are shown."""

    key: str
    title: str
    smooth: bool = True
    log: bool = False
    marks: bool = False
    show: Callable[[float], str] = short_number


PANELS = (
    Panel(key="loss", title="loss, nats per token", marks=True, show=lambda x: f"{x:.4g}"),
    Panel(key="lr", title="learning rate", smooth=False, show=lambda x: f"{x:g}"),
    Panel(
        key="grad_norm",
        title="norm of the gradient, before clipping",
        log=True,
        marks=True,
        show=lambda x: f"{x:g}",
    ),
    Panel(key="tokens_per_s", title="tokens per second"),
    Panel(key="mfu", title="MFU, share of the peak FLOP/s", show=lambda x: f"{x:.0%}"),
    Panel(key="memory_gib", title="memory, GiB", smooth=False),
)


def shown_panels(runs: Sequence[Run]) -> list[Panel]:
    """The loss always, the others where a run has values."""
    return [p for p in PANELS if p.key == "loss" or any(series(run, p.key)[1] for run in runs)]


def color(index: int) -> str:
    """matplotlib's name for the colour of the run of that index."""
    return f"C{index % _COLORS}"


def panel_png(panel: Panel, runs: Sequence[Run]) -> bytes:
    """One panel as a PNG of its own."""
    from matplotlib.figure import Figure

    size = (10, 5) if panel.key == "loss" else (6.4, 3.4)
    figure = Figure(figsize=size, layout="constrained")
    draw_panel(figure.subplots(), panel, runs, legend=panel.key == "loss")
    return _png(figure)


def write_picture(out: Path, runs: Sequence[Run]) -> None:
    """All panels in one PNG file: the loss above, the others two in a row."""
    from matplotlib.figure import Figure

    panels = shown_panels(runs)
    keys = [panel.key for panel in panels[1:]]
    rows: list[Any] = [["loss", "loss"], ["loss", "loss"]]
    keys += [_EMPTY] * (len(keys) % 2)
    rows += [keys[i : i + 2] for i in range(0, len(keys), 2)]
    figure = Figure(figsize=(12, 2.7 * len(rows)), layout="constrained")
    axes = figure.subplot_mosaic(rows, empty_sentinel=_EMPTY)
    for panel in panels:
        draw_panel(axes[panel.key], panel, runs, legend=panel.key == "loss")
    beside = out.with_name(f".{out.name}.incomplete")
    try:
        beside.write_bytes(_png(figure))
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def draw_panel(axes: Any, panel: Panel, runs: Sequence[Run], *, legend: bool) -> None:
    """One curve per run in its colour; on the loss panel also its validations."""
    from matplotlib.ticker import NullFormatter

    for index, run in enumerate(runs):
        style: dict[str, Any] = {"color": color(index), "linestyle": _line(index)}
        tokens, values = series(run, panel.key)
        few = {"marker": "."} if len(values) == 1 else {}
        if panel.smooth and len(values) > 1:
            axes.plot(tokens, values, color=color(index), alpha=0.2, linewidth=0.7)
            values = _smoothed(values, log=panel.log)
        axes.plot(tokens, values, linewidth=1.6, **style, **few)
        if panel.key == "loss" and run.validations:
            _draw_validations(axes, run, index)
        if panel.marks and (at := skipped_tokens(run)):
            where = axes.get_xaxis_transform()
            axes.plot(at, [0.025] * len(at), "x", color=color(index), transform=where)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.key == "loss" and (limits := loss_limits(runs)):
        axes.set_ylim(*limits)
    if panel.key in ("tokens_per_s", "mfu", "memory_gib"):
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("tokens seen")
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.yaxis.set_major_formatter(lambda value, _: panel.show(value))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        _add_legend(axes, runs)


def loss_limits(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Heights that show where the losses go: the first steps' height, or a run that has flown
    apart, would flatten all curves. None without a loss."""
    lows, highs, firsts = [], [], []
    for run in runs:
        _, losses = series(run, "loss")
        held_out = [row["val_loss"] for row in run.validations]
        if losses:
            shown = sorted(losses)[: max(1, int(len(losses) * 0.98))]
            lows.append(min([shown[0], *held_out]))
            highs.append(max([shown[-1], *held_out]))
            firsts.append(losses[0])
    if not lows:
        return None
    low, high = min(lows), min(max(highs), max(firsts))
    margin = 0.05 * (high - low) + 0.01
    return low - margin, high + margin


def _draw_validations(axes: Any, run: Run, index: int) -> None:
    axes.plot(
        [row["tokens"] for row in run.validations],
        [row["val_loss"] for row in run.validations],
        "o--",
        color=color(index),
        markersize=6,
        markeredgecolor="white",
        linewidth=0.8,
        zorder=5,
    )


def _add_legend(axes: Any, runs: Sequence[Run]) -> None:
    """A line per run with its last held-out loss, and what the marks mean."""
    from matplotlib.lines import Line2D

    handles = []
    for index, run in enumerate(runs):
        found = f" (held out: {run.validations[-1]['val_loss']:.4f})" if run.validations else ""
        label = run.label.replace("$", r"\$") + found  # a name is no formula
        label = f" {label}" if label.startswith("_") else label  # nor a label to hide
        handles.append(Line2D([], [], color=color(index), linestyle=_line(index), label=label))
    if any(run.validations for run in runs):
        style: dict[str, Any] = {"marker": "o", "linestyle": "--", "linewidth": 0.8, "color": "0.4"}
        handles.append(Line2D([], [], label="held-out loss", markeredgecolor="white", **style))
    if any(skipped_tokens(run) for run in runs):
        handles.append(Line2D([], [], linestyle="", marker="x", color="0.4", label="skipped step"))
    axes.legend(handles=handles, fontsize=8, loc="upper right", ncols=1 + len(handles) // 12)


def _line(index: int) -> Any:
    return _STYLES[index // _COLORS % len(_STYLES)]


def _smoothed(values: list[float], *, log: bool) -> list[float]:
    """Where the axis is logarithmic so is the average, else single peaks would carry it away."""
    weight = smoothing(len(values))
    if not log:
        return smoothed(values, weight)
    return [math.exp(x) for x in smoothed([math.log(max(v, 1e-12)) for v in values], weight)]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": MADE_BY})
    return buffer.getvalue()
