"""Suites: which tasks and shots, and the figures that the paper prints for them (paper.json)."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PATH = Path(__file__).with_name("paper.json")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the paper's table: a task's metric.

    scale: what the metric is multiplied by; 100 for shares in percent.
    note: why the number cannot simply be set beside the paper's, if so.
    """

    name: str
    task: str
    metric: str
    scale: float
    shots: int
    note: str = ""


@dataclass(frozen=True)
class PaperRow:
    """A line of the paper's table; None where it prints none."""

    model: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Suite:
    """A table of the paper. length: tokens that inputs are cut to there; 0 if it does not say."""

    name: str
    source: str
    length: int
    columns: tuple[Column, ...]
    rows: tuple[PaperRow, ...]


@cache
def suites() -> dict[str, Suite]:
    """All suites by name."""
    found = json.loads(PATH.read_text(encoding="utf-8"))
    return {
        name: Suite(
            name,
            said["source"],
            said["length"],
            tuple(Column(**column) for column in said["columns"]),
            tuple(PaperRow(row["model"], tuple(row["values"])) for row in said["rows"]),
        )
        for name, said in found.items()
    }


def find_suite(name: str) -> Suite:
    """A suite; ValueError if there is none of that name."""
    if name not in suites():
        raise ValueError(f"suite: expected one of {', '.join(suites())}, got {name!r}")
    return suites()[name]
