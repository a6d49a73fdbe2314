"""The plot of training results: tokens per second and peak memory over the length of sequences, as
in the paper's Figures 4a and 4b."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LOOKS = {"gsa": ("o", "tab:blue"), "transformer++": ("^", "0.3"), "fla": ("s", "tab:orange")}
LABELS = {"gsa": "GSA", "transformer++": "Transformer++ (SDPA)", "fla": "GSA of fla"}
LABELS |= {"own-transformer++": "Transformer++ (ours)"}
COLORS = ("green", "red", "purple", "brown", "pink", "olive", "cyan")
MARKERS = ("D", "v", "P", "X")
PANELS = (("tokens_per_s", 1e-3, "thousand tokens per second"), ("peak_gib", 1.0, "peak GiB"))


def lines_of(documents: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[tuple[int, Any]]]:
    """(model, recompute) to its (tokens of a sequence, facts), shortest first.

    Raises:
        ValueError: several devices or kinds of weights, or nothing was measured.
    """
    kinds = {(one["environment"]["device"], one["config"]["weights"]) for one in documents}
    if len(kinds) > 1:
        found = "; ".join(f"{device}, {weights} weights" for device, weights in sorted(kinds))
        raise ValueError(f"results: expected one device and one kind of weights, got {found}")
    cells = {
        (name, row["recompute"], row["tokens"]): facts
        for one in documents
        for row in one["rows"]
        for name, facts in row["contenders"].items()
    }
    if not cells:
        raise ValueError("no case was measured")
    lines: dict[tuple[str, int], list[tuple[int, Any]]] = {}
    for (name, every, tokens), facts in sorted(cells.items()):
        lines.setdefault((name, every), []).append((tokens, facts))
    return lines


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(marker, colour) of each model; those of LOOKS are the same in every plot."""
    others = sorted(set(names) - set(LOOKS))
    return LOOKS | {
        name: (MARKERS[i % len(MARKERS)], f"tab:{COLORS[i % len(COLORS)]}")
        for i, name in enumerate(others)
    }


def plot_training(documents: Sequence[dict[str, Any]], out: Path) -> Path:
    """Draws results of `gsa bench training` into a PNG file; dashed where blocks are recomputed."""
    lines = lines_of(documents)
    look = looks(name for name, _ in lines)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for (name, every), points in lines.items():
            marker, color = look[name]
            lengths = [tokens for tokens, _ in points]
            values = [facts[key] * unit for _, facts in points]
            axes.plot(
                lengths,
                values,
                marker=marker,
                color=color,
                linestyle="--" if every else "-",
                markerfacecolor="white" if every else color,
                label=LABELS.get(name, name) + (", recomputed" if every else ""),
            )
            if key == "tokens_per_s":
                lows, highs = ([facts[end] * unit for _, facts in points] for end in ENDS)
                axes.fill_between(lengths, lows, highs, color=color, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
        axes.set_xticks(ticks, [name_of(tokens) for tokens in ticks])
        axes.set_xlabel("tokens of a sequence")
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title(documents[0]), fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.incomplete")
    figure.savefig(beside, format="png", dpi=130)
    beside.replace(out)
    return out


ENDS = ("slowest", "fastest")


def name_of(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def title(document: dict[str, Any]) -> str:
    facts, asked = document["environment"], document["config"]
    each = f"{asked['tokens']} tokens a step, weights and moments in {asked['weights']}"
    how = ", elementwise steps computed again" if asked.get("lean") else ""
    return f"Training {asked['size']} on {facts['device']}: {each}\ntorch {facts['torch']}{how}"
