"""The plot of decoding: seconds for a long text, as in the paper's Figure 4c, and tokens per second
by rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gsa.benchmark.training_plot import LABELS, looks

PANELS = (
    ("length", "seconds", "tokens written in one row", "seconds"),
    ("batch", "tokens_per_s", "rows", "tokens per second"),
    ("prefill", "tokens_per_s", "tokens read", "tokens read per second"),
)


def lines_of(documents: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[int, Any]]:
    """(kind of case, model) to its facts by the case's number.

    Raises:
        ValueError: several devices or dtypes, or nothing was measured.
    """
    kinds = {(one["environment"]["device"], one["config"]["dtype"]) for one in documents}
    if len(kinds) > 1:
        found = "; ".join(f"{device}, {dtype}" for device, dtype in sorted(kinds))
        raise ValueError(f"results: expected one device and one dtype, got {found}")
    lines: dict[tuple[str, str], dict[int, Any]] = {}
    for one in documents:
        for row in one["rows"]:
            for name, facts in row["contenders"].items():
                lines.setdefault((row["kind"], name), {})[row["number"]] = facts
    if not lines:
        raise ValueError("no case was measured")
    return lines


def plot_decode(documents: Sequence[dict[str, Any]], out: Path) -> Path:
    """Draws results of `gsa bench decode` into a PNG file."""
    lines = lines_of(documents)
    look = looks(name for _, name in lines)
    panels = [panel for panel in PANELS if any(kind == panel[0] for kind, _ in lines)]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 4 * len(panels)), 4.2), layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (kind, key, x_label, y_label) in zip(drawn, panels, strict=True):
        for (found, name), cells in sorted(lines.items()):
            if found == kind:
                marker, color = look[name]
                # A slow model writes fewer tokens: drawn as long as it would take for all.
                scale = [n / cells[n]["tokens"] if key == "seconds" else 1.0 for n in sorted(cells)]
                values = [cells[n][key] * s for n, s in zip(sorted(cells), scale, strict=True)]
                label = LABELS.get(name, name)
                axes.plot(sorted(cells), values, marker=marker, color=color, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if kind == "batch":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    facts, config = documents[0]["environment"], documents[0]["config"]
    figure.suptitle(
        f"Decoding, {config['size']}, {config['dtype']}, on {facts['device']}; torch "
        f"{facts['torch']}, commit {facts['commit']}",
        fontsize=10,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.incomplete")
    figure.savefig(beside, format="png", dpi=130)
    beside.replace(out)
    return out
