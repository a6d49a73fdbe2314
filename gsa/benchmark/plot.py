"""The plot of GPU results: milliseconds per case, ours among floor, fla and softmax attention."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsa.benchmark.decode_plot import plot_decode
from gsa.benchmark.training_plot import plot_training

KINDS = ("ops-gpu", "training", "decode")
PANELS = {"forward": "forward", "forward_backward": "forward + backward"}
STYLES: dict[str, tuple[str, str, str]] = {
    "ours": ("ours", "o", "tab:blue"),
    "ours_saved": ("ours, memories saved", "D", "tab:cyan"),
    "fla": ("fla chunk_gsa", "s", "tab:orange"),
    "sdpa": ("softmax attention (SDPA)", "^", "0.3"),
}
ROW_INCHES = 0.42


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    results: tuple[str, ...]
    """JSON files of `gsa bench ops`, `training` or `decode`, all of one kind on one kind of GPU; of
    a case in several, the last counts."""
    out: str = ""
    """PNG file to write, .png; beside the first result if empty. An older one is replaced."""

    def __post_init__(self) -> None:
        if self.out and Path(self.out).suffix.lower() != ".png":
            raise ValueError(f"out: expected the name of a .png file, got {self.out!r}")


def read_result(path: Path) -> dict[str, Any]:
    """ValueError if it is no result that can be drawn."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(document, dict) or document.get("benchmark") not in KINDS:
        raise ValueError(
            f"{path}: expected a result of gsa bench ops on a GPU, of training or of decode"
        )
    return document


def merged_rows(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of all documents, one per case; ValueError if devices differ or nothing was measured."""
    devices = list(dict.fromkeys(one["environment"]["device"] for one in documents))
    if len(devices) > 1:
        raise ValueError(f"results: expected one device, got {', '.join(devices)}")
    rows = {row["case"]: row for one in documents for row in one["rows"] if row["contenders"]}
    if not rows:
        raise ValueError("no case was measured")
    return list(rows.values())


def title_of(documents: Sequence[dict[str, Any]]) -> str:
    facts = documents[0]["environment"]
    fla = next(
        (one["fla"]["version"] for one in documents if "version" in one.get("fla", {})), None
    )
    parts = [f"torch {facts['torch']}", f"triton {facts['triton']}"]
    parts += [f"fla {fla}"] if fla else []
    parts += [f"commit {facts['commit']}"] if facts["commit"] else []
    return f"Gated Slot Attention, bf16, on {facts['device']}\n{', '.join(parts)}"


def draw_panel(axes: Any, rows: list[dict[str, Any]], mode: str) -> None:
    """One line per case: the floor as a tick, each contender as a mark, ours and fla in numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for y, row in enumerate(rows):
        floor = row["floor_ms"][mode]
        times = {
            name: facts[mode]["ms"] for name, facts in row["contenders"].items() if mode in facts
        }
        axes.plot([floor, max([floor, *times.values()])], [y, y], color="0.85", zorder=1)
        axes.plot([floor], [y], "|", color="black", markersize=11, markeredgewidth=1.6, zorder=2)
        for name, ms in times.items():
            _, marker, color = STYLES[name]
            size, order = (9.0, 3) if name == "ours" else (6.0, 4)  # nobody hides behind us
            edge = {"markeredgecolor": "white", "markeredgewidth": 0.6}
            axes.plot([ms], [y], marker, color=color, markersize=size, zorder=order, **edge)
        for name, height in (("ours", 7), ("fla", -13)):
            if name in times:
                axes.annotate(
                    f"{times[name]:.3g}",
                    (times[name], y),
                    xytext=(0, height),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=STYLES[name][2],
                )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("milliseconds (log scale)")
    axes.set_title(PANELS[mode], fontsize=10)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def plot_results(paths: Sequence[Path], out: Path) -> Path:
    """Draws results into a PNG file and returns its path.

    Raises:
        ValueError: a file is no result, kinds or devices differ, or nothing was measured.
        ImportError: matplotlib is not installed.
    """
    documents = [read_result(path) for path in paths]
    kinds = {one["benchmark"] for one in documents}
    if len(kinds) > 1:
        raise ValueError(f"results: expected one kind, got {' and '.join(sorted(kinds))}")
    if kinds == {"training"}:
        return plot_training(documents, out)
    if kinds == {"decode"}:
        return plot_decode(documents, out)
    rows = merged_rows(documents)
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 1.9 + ROW_INCHES * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, mode in zip(panels, PANELS, strict=True):
        draw_panel(axes, rows, mode)
    panels[0].set_yticks(range(len(rows)), [row["case"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.7)
    shown = [name for name in STYLES if any(name in row["contenders"] for row in rows)]
    handles = [
        Line2D([], [], linestyle="", marker="|", color="black", markersize=11, markeredgewidth=1.6)
    ]
    handles += [
        Line2D([], [], linestyle="", marker=STYLES[x][1], color=STYLES[x][2]) for x in shown
    ]
    labels = ["floor by bytes", *(STYLES[name][0] for name in shown)]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title_of(documents), fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.incomplete")
    figure.savefig(beside, format="png", dpi=130)
    beside.replace(out)
    return out


def bench_plot(config: PlotConfig) -> Path:
    """Draws the plot of results of `gsa bench ops` on a GPU, of `training` or of `decode`."""
    paths = [Path(name) for name in config.results]
    return plot_results(paths, Path(config.out) if config.out else paths[0].with_suffix(".png"))
