"""A result document as text for people."""

from collections.abc import Sequence
from typing import Any

MODES = {"forward": "forward", "forward_backward": "forward + backward"}
NAMES = {"ours": "ours", "ours_saved": "saved", "fla": "fla", "sdpa": "SDPA"}
WAYS = {"ours": "new memory", "ours_in_place": "in place", "ours_rows": "pool rows", "fla": "fla"}
LABELS = WAYS | NAMES


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def number(cell: dict[str, Any] | None, key: str, form: str) -> str:
    return form.format(cell[key]) if cell and key in cell else "–"


def time_table(rows: list[dict[str, Any]], mode: str) -> str:
    """One mode: our milliseconds, how near the floor, and how many times longer the others take."""
    saved = mode == "forward_backward"
    top = ["", "floor ms", "ours ms", "spread", "of floor", "wall ms"]
    top += ["saved ms"] if saved else []
    lines = [[*top, "fla ×", "SDPA ×", "fla ms", "SDPA ms", "fla wall"]]
    for row in rows:
        cells = {name: facts.get(mode) for name, facts in row["contenders"].items()}
        ours = cells.get("ours")
        line = [row["case"], f"{row['floor_ms'][mode]:.3f}", number(ours, "ms", "{:.3f}")]
        low, high = (number(ours, f"{end}_ms", "{:.3f}") for end in ("fastest", "slowest"))
        line += [f"{low}-{high}", number(ours, "floor_fraction", "{:.0%}")]
        line += [number(ours, "eager_ms", "{:.3f}")]
        line += [number(cells.get("ours_saved"), "ms", "{:.3f}")] if saved else []
        line += [number(cells.get(name), "over_ours", "{:.2f}") for name in ("fla", "sdpa")]
        line += [number(cells.get(name), "ms", "{:.3f}") for name in ("fla", "sdpa")]
        lines.append([*line, number(cells.get("fla"), "eager_ms", "{:.3f}")])
    return f"{MODES[mode]}\n{aligned(lines)}"


def memory_table(rows: list[dict[str, Any]]) -> str:
    lines = [["", *(f"{NAMES[x]} MiB" for x in NAMES), "inputs MiB", "first call s", "fla first s"]]
    for row in rows:
        found = row["contenders"]
        line = [row["case"], *(number(found.get(x), "peak_mib", "{:.0f}") for x in NAMES)]
        line.append(number(found.get("ours"), "inputs_mib", "{:.0f}"))
        line += [number(found.get(x), "first_call_seconds", "{:.1f}") for x in ("ours", "fla")]
        lines.append(line)
    return f"peak memory of forward + backward, beyond the inputs\n{aligned(lines)}"


def step_table(rows: list[dict[str, Any]]) -> str:
    lines = [["", "µs", "spread", "over floor", "over ours", "wall µs"]]
    for row in rows:
        lines.append([f"{row['case']} floor", f"{row['floor_us']:.2f}", "", "", "", ""])
        for name, cell in row["ways"].items():
            spread = f"{cell['fastest_us']:.2f}-{cell['slowest_us']:.2f}"
            line = [f"{row['case']} {WAYS[name]}", f"{cell['us']:.2f}", spread]
            line += [number(cell, key, "{:.2f}") for key in ("over_floor", "over_ours", "eager_us")]
            lines.append(line)
    return f"one token\n{aligned(lines)}"


def cold_start_lines(document: dict[str, Any]) -> list[str]:
    """Ours from a process with an empty cache; fla's first call in this process."""
    lines = []
    ours = document.get("cold_start")
    if ours:
        lines.append(progress("cold start, ours", ours))
    first = [
        (row["case"], row["contenders"]["fla"]["first_call_seconds"])
        for row in document["rows"]
        if "fla" in row["contenders"]
    ]
    if first:
        kept = document["fla"]["triton_cache_entries_at_start"]
        state = "an empty Triton cache" if kept == 0 else f"{kept} entries in Triton's cache"
        lines.append(
            f"first call, fla: {first[0][1]:.1f} s at {first[0][0]}, "
            f"after {document['fla']['import_seconds']} s of import, begun with {state}"
        )
    return lines


def missing_lines(document: dict[str, Any]) -> list[str]:
    """What was not measured, or not as it should be, and why; one line per reason."""
    cases: dict[str, list[str]] = {}
    for row in (*document["steps"], *document["rows"]):
        for name, reason in row["missing"].items():
            cases.setdefault(f"{LABELS[name]} {reason}", []).append(row["case"])
    for row in document["rows"]:
        for name, facts in row["contenders"].items():
            for mode in MODES:
                if "note" in facts.get(mode, {}):
                    reason = f"{NAMES[name]}, {MODES[mode]}: {facts[mode]['note']}"
                    cases.setdefault(reason, []).append(row["case"])
    lines = [f"{reason} ({'; '.join(names)})" for reason, names in cases.items()]
    left = document["not_run"]
    return lines + ([f"not run: {'; '.join(left)}"] if left else [])


def ceilings_line(document: dict[str, Any]) -> str:
    found, facts = document["ceilings"], document["environment"]
    return (
        f"{facts['device']}: copy {found['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
        f"matmul {found['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s; torch {facts['torch']}, "
        f"triton {facts['triton']}, fla {facts['flash-linear-attention'] or 'not installed'}"
    )


def tables(document: dict[str, Any]) -> str:
    """Everything, in paragraphs."""
    rows = document["rows"]
    parts = [ceilings_line(document)]
    if rows:
        parts += [time_table(rows, mode) for mode in MODES] + [memory_table(rows)]
    if document["steps"]:
        parts.append(step_table(document["steps"]))
    parts.append("\n".join([*cold_start_lines(document), *missing_lines(document)]))
    return "\n\n".join(part for part in parts if part)


def progress(name: str, found: dict[str, Any]) -> str:
    """One line for one case, when it is done."""
    if "failed" in found:
        return f"{name}: failed: {found['failed']}"
    if "total_seconds" in found:
        return (
            f"{name}: {found['total_seconds']:.1f} s to the first gradients, "
            f"{found['without_import_seconds']:.1f} s without imports, "
            f"{found['kernels_compiled']} kernels compiled"
        )
    if "ways" in found:
        cells = {WAYS[way]: f"{cell['us']:.2f} µs" for way, cell in found["ways"].items()}
    else:
        cells = {
            NAMES[who]: " / ".join(number(facts.get(mode), "ms", "{:.3f}") for mode in MODES)
            for who, facts in found["contenders"].items()
        }
    shown = [f"{label} {cell}" for label, cell in cells.items()]
    shown += [f"{LABELS[who]} {reason}" for who, reason in found["missing"].items()]
    return f"{name}: " + ", ".join(shown)
