"""metrics.jsonl: one JSON line per step and per validation, no step twice however often resumed."""

import json
import math
import os
from pathlib import Path
from typing import Any

from gsa.training.files import naming

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends lines to a run's metrics.jsonl, after dropping those past the step it resumes from.

    after_step, validated: the last step, and the last validated step, that the run has behind it.
    Numbers that are not finite are written as null: NaN is no JSON.
    """

    def __init__(self, folder: Path, *, after_step: int, validated: int) -> None:
        self._path = path = folder / METRICS
        if path.exists():
            os.truncate(path, _length_up_to(path, after_step, validated))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        with naming(self._path):
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force the lines to disk: a checkpoint must not be ahead of them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of a run: (training steps, validations). It may be going on, or broken off.

    A last line that is not whole is left out; ValueError for any other that lacks numbers.
    """
    path = folder / METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            losses = [row[key] for key in ("loss", "val_loss") if row.get(key) is not None]
            if not all(
                isinstance(one, int | float) for one in (row["step"], row["tokens"], *losses)
            ):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):
                break
            raise ValueError(
                f"{path}: line {number} is no line of metrics: {line[:60]!r}"
            ) from None
        rows.append(row)
    return [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]


def _length_up_to(path: Path, step: int, validated: int) -> int:
    """The length in bytes of the whole lines up to that step."""
    length = 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                keep = row["step"] <= (validated if "val_loss" in row else step)
            except (ValueError, KeyError, TypeError):
                keep = False
            if not keep or not line.endswith(b"\n"):
                break
            length += len(line)
    return length
