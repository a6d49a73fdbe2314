"""Results of an evaluation as files: JSON, and a table in Markdown beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gsa.training.files import check_result, write_json, write_text


def check_out(out: str) -> None:
    """OSError if a result, or its table, would replace anything but an earlier result."""
    check_result(out, "evaluation", "gsa eval")
    table = Path(out).with_suffix(".md") if out else Path()
    if out and table.exists() and not Path(out).exists():
        raise FileExistsError(f"out: {table} exists, where the table would go; choose another")


def write_report(out: str, document: dict[str, Any], table: str) -> None:
    """Prints the table; with `out`, writes the document there and the table as .md beside it."""
    print(table)
    if out:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)  # first: a table alone would be taken for another's
        write_text(path.with_suffix(".md"), f"{table}\n")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first row its head; the first column to the left, others to the right.

    Cells are padded, so that it is a table in a terminal, too.
    """
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for cells in [rows[0], rule, *rows[1:]]:
        head, *others = zip(cells, widths, strict=True)
        padded = [head[0].ljust(head[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)
