"""`gsa report`: the curves, numbers and settings of one or several runs, on one page or picture.

    compare_runs(ReportConfig(runs=("runs/a", "runs/b"), out="report.html"))

A run is read as it stands: it may be going on, broken off, or a folder with metrics.jsonl alone.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsa.training.curves import clock
from gsa.training.files import CHECKPOINTS, SETTINGS, WEIGHTS, check_kinds, read_object
from gsa.training.metrics import METRICS, read_metrics

MADE_BY = "gsa report"
"""Stands near the beginning of every file made here, so that no other is overwritten."""

_OWN = ("name", "out")  # settings that say which run it is, not what it does
UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    runs: tuple[str, ...]
    """Run folders of gsa train, finished or not."""
    out: str = "report.html"
    """File to write: .html (one page, images inside) or .png (the curves alone)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of one run. settings: its train.json, {} if there is none."""

    folder: Path
    label: str
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: a value per run. differs: the runs do not agree; best: which to mark."""

    name: str
    values: list[str]
    differs: bool = False
    best: int | None = None


def compare_runs(config: ReportConfig) -> Path:
    """Draws the curves of runs beside one another, with a table of their numbers and settings.

    Raises:
        ValueError: out is neither .html nor .png, or a file that was not made here; a folder is
            no run, or its metrics are damaged.
        FileNotFoundError: there is no such folder.
    """
    out = Path(config.out)
    kind = out.suffix.lower()
    if kind not in (".html", ".htm", ".png"):
        raise ValueError(f"out: expected a name ending in .html or .png, got {config.out!r}")
    check_ours(out)
    runs = read_runs(config.runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".png":
        from gsa.training.comparison_plot import write_picture

        write_picture(out, runs)
    else:
        from gsa.training.comparison_page import write_page

        write_page(out, runs)
    return out


def check_ours(out: Path) -> None:
    """ValueError if a file is there that `compare_runs` did not make."""
    if out.is_dir():
        raise ValueError(f"out: expected a file, got the folder {out}")
    if out.exists():
        with out.open("rb") as file:
            start = file.read(1000)
        if MADE_BY.encode() not in start:
            raise ValueError(
                f"out: {out} exists and was not made by {MADE_BY}; choose another, or move it away"
            )


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in the order given, each folder once."""
    once: dict[Path, Path] = {}
    for folder in map(Path, folders):
        once.setdefault(folder.resolve(), folder)
    found = [(folder, read_settings(folder)) for folder in once.values()]
    names = [
        str(settings.get("config", {}).get("name") or folder.resolve().name)
        for folder, settings in found
    ]
    runs = []
    for (folder, settings), name in zip(found, names, strict=True):
        label = name if names.count(name) == 1 else f"{name} ({folder})"
        begun = (folder / METRICS).is_file()
        steps, validations = read_metrics(folder) if begun else ([], [])
        runs.append(
            Run(
                folder=folder,
                label=label,
                settings=settings,
                steps=steps,
                validations=[row for row in validations if row["val_loss"] is not None],
            )
        )
    return runs


def read_settings(folder: Path) -> dict[str, Any]:
    """The train.json of a run folder; {} if it has metrics alone."""
    if not folder.is_dir():
        raise FileNotFoundError(f"runs: {folder}: no such folder")
    path = folder / SETTINGS
    if not path.is_file():
        if (folder / METRICS).is_file():
            return {}
        raise ValueError(
            f"runs: {folder} is no run folder (it has neither {SETTINGS} nor {METRICS}); expected "
            "the out folder of gsa train"
        )
    settings = read_object(path)
    check_kinds(path, settings, dict.fromkeys(("config", "fingerprints", "versions"), dict))
    check_kinds(path, settings.get("config", {}), {"model": dict, "steps": int})
    marks = settings.get("fingerprints", {})
    check_kinds(path, marks, dict.fromkeys(marks, str))
    return settings


def count_parameters(run: Run) -> int | None:
    """From train.json, else from the header of the newest weights of the run; None if unknown."""
    if isinstance(run.settings.get("parameters"), int):
        return run.settings["parameters"]
    checkpoints = sorted((run.folder / CHECKPOINTS).glob(f"step-*[0-9]/{WEIGHTS}"), reverse=True)
    for path in (run.folder / WEIGHTS, *checkpoints):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            tensors = [value for key, value in header.items() if key != "__metadata__"]
            return sum(_product(tensor["shape"]) for tensor in tensors)
        except (OSError, ValueError, KeyError, MemoryError, OverflowError):
            continue
    return None


def series(run: Run, key: str) -> tuple[list[int], list[float]]:
    """(tokens, values) of the steps that have a value."""
    rows = [row for row in run.steps if row.get(key) is not None]
    return [row["tokens"] for row in rows], [row[key] for row in rows]


def skipped_tokens(run: Run) -> list[int]:
    """Where in the run a step was skipped; `skipped` in its metrics counts them up."""
    found, before = [], 0
    for row in run.steps:
        now = row.get("skipped", 0)
        found += [row["tokens"]] if now > before else []
        before = now
    return found


def number_rows(runs: Sequence[Run]) -> list[Row]:
    """The table of what came out; the lowest held-out losses marked if they can be compared."""
    one_text = len(_fingerprints(runs, "validation")) == 1
    last = [run.validations[-1] if run.validations else {} for run in runs]
    best = [min(run.validations, key=lambda row: row["val_loss"], default={}) for run in runs]
    rows = [
        Row(name="folder", values=[str(run.folder) for run in runs]),
        Row(name="parameters", values=[_count(count_parameters(run)) for run in runs]),
        Row(name="steps", values=[_steps(run) for run in runs]),
        Row(name="steps skipped", values=[_last(run, "skipped", _count) for run in runs]),
        Row(name="tokens seen", values=[_last(run, "tokens", _count) for run in runs]),
        Row(name="training loss, mean of the last steps", values=[_end(run) for run in runs]),
        Row(
            name="held-out loss, last",
            values=[_validation(row) for row in last],
            best=_lowest(last) if one_text else None,
        ),
        Row(
            name="held-out loss, best",
            values=[_validation(row) for row in best],
            best=_lowest(best) if one_text else None,
        ),
        Row(name="time in steps", values=[_last(run, "seconds", clock) for run in runs]),
    ]
    medians = (
        ("tokens/s, median", "tokens_per_s", lambda x: f"{x:,.0f}"),
        ("MFU, median", "mfu", lambda x: f"{x:.1%}"),
        ("memory, most", "memory_gib", lambda x: f"{x:.1f} GiB"),
    )
    for name, key, show in medians:
        gathered = [series(run, key)[1] for run in runs]
        take = max if key == "memory_gib" else statistics.median
        if any(gathered):
            values = [show(take(one)) if one else UNKNOWN for one in gathered]
            rows.append(Row(name=name, values=values))
    return rows + _compared([run.settings.get("versions", {}) for run in runs])


def setting_rows(runs: Sequence[Run]) -> list[Row]:
    """Every setting of the runs, the data's fingerprints at the end."""
    flat = []
    for run in runs:
        config = dict(run.settings.get("config", {}))
        model = config.pop("model", {})
        one = {key: value for key, value in config.items() if key not in _OWN}
        one |= {f"model.{key}": value for key, value in model.items()}
        marks = run.settings.get("fingerprints", {})
        kinds = [kind for kind in ("data", "validation") if kind in marks]
        flat.append(one | {f"fingerprint of {kind}": str(marks[kind])[:12] for kind in kinds})
    return _compared(flat)


def warnings(runs: Sequence[Run]) -> list[str]:
    """What to know before the curves are compared."""
    found = []
    if len(_fingerprints(runs, "validation")) > 1:
        found.append("Not validated on the same text: held-out losses cannot be compared.")
    if len(_fingerprints(runs, "data")) > 1:
        found.append("Not trained on the same text: training losses may not compare.")
    found += [f"{run.label}: no step yet." for run in runs if not run.steps]
    found += [
        f"{run.label}: {SETTINGS} is missing, so its settings are not known."
        for run in runs
        if not run.settings
    ]
    return found


def _compared(facts: Sequence[dict[str, Any]]) -> list[Row]:
    """A row per key of any; in runs that lack it, or know nothing at all, its value is unknown."""
    rows = []
    for key in dict.fromkeys(key for one in facts for key in one):
        known = [one.get(key) for one in facts if one]
        texts = [_text(one[key]) if key in one else UNKNOWN for one in facts]
        differs = any(value != known[0] for value in known)
        rows.append(Row(name=key, values=texts, differs=differs))
    return rows


def _fingerprints(runs: Sequence[Run], name: str) -> set[str]:
    """The different texts of that kind; runs without one, or not known, do not count."""
    marks = (run.settings.get("fingerprints", {}).get(name) for run in runs)
    return {mark for mark in marks if mark}


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _product(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _last(run: Run, key: str, show: Callable[[Any], str]) -> str:
    return show(run.steps[-1][key]) if run.steps and key in run.steps[-1] else UNKNOWN


def _steps(run: Run) -> str:
    done = run.steps[-1]["step"] if run.steps else 0
    asked = run.settings.get("config", {}).get("steps")
    return f"{done:,}" if asked in (None, done) else f"{done:,} of {asked:,}"


def _end(run: Run) -> str:
    losses = series(run, "loss")[1][-50:]
    return f"{statistics.fmean(losses):.4f} ({len(losses)})" if losses else UNKNOWN


def _validation(row: dict[str, Any]) -> str:
    if not row:
        return UNKNOWN
    part = "" if row.get("whole", True) else ", part of the text"
    return f"{row['val_loss']:.4f} (step {row['step']:,}{part})"


def _lowest(rows: Sequence[dict[str, Any]]) -> int | None:
    """The index of the lowest held-out loss, if there are several, all over as much of the text."""
    known = [row for row in rows if row]
    if len(known) < 2 or len({row.get("whole", True) for row in known}) > 1:
        return None
    return rows.index(min(known, key=lambda row: row["val_loss"]))
