"""Trackers that a run's metrics also go to: tensorboard, wandb, trackio. All are optional packages.

    check_sinks(names)                                   before anything is written
    sinks = open_sinks(names, folder, settings, step)    before MetricsLog opens
    sinks.write(line)                                    each line of metrics.jsonl
    sinks.sync()                                         with MetricsLog.sync
    sinks.close()

metrics.jsonl stays the record of a run. A tracker that fails on the way is given up with a warning,
the training goes on.
"""

import importlib
import json
import math
import secrets
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from gsa.training.errors import RunError
from gsa.training.files import write_json
from gsa.training.metrics import METRICS, read_metrics

TRACKERS = "trackers.json"
TENSORBOARD = "tensorboard"
PROJECT = "gated-slots"


class Sink(Protocol):
    """One tracker."""

    def write(self, step: int, scalars: dict[str, float], validation: bool) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class Sinks:
    """All trackers of a run; none is fine."""

    def __init__(self, sinks: dict[str, Sink]) -> None:
        self._sinks = sinks

    def write(self, line: dict[str, Any]) -> None:
        """Hand on the finite numbers of a line of metrics, by step."""
        validation = "val_loss" in line
        found = scalars(line)
        self._each(lambda sink: sink.write(line["step"], found, validation))

    def sync(self) -> None:
        """Force what was written to where it is kept: a checkpoint must not be ahead of it."""
        self._each(lambda sink: sink.sync())

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                call(sink)
            except Exception as error:  # whatever it is, days of training are worth more
                del self._sinks[name]
                warnings.warn(
                    f"{name} failed and gets no more ({error}); {METRICS} has everything",
                    stacklevel=3,
                )


def check_sinks(names: Sequence[str]) -> None:
    """ValueError if a name is unknown, or its package is not there, saying what to install."""
    for name in names:
        if name not in SINKS:
            raise ValueError(f"sinks: expected some of {', '.join(SINKS)}, got {name!r}")
        try:
            _LOADERS[name]()
        except (ImportError, AttributeError) as error:  # a folder of that name has no init
            raise ValueError(
                f"sinks: {name} is not installed, or cannot be imported ({error}); "
                f"pip install {name}, or leave it out"
            ) from error


def open_sinks(
    names: Sequence[str], folder: Path, config_dict: dict[str, Any], resumed_step: int
) -> Sinks:
    """The trackers of those names, going on after `resumed_step` (0: from the start).

    Call it before MetricsLog opens, which cuts metrics.jsonl back to the step resumed from: what is
    there tells which steps the process before has handed over.

    Args:
        folder: the run folder. It keeps tensorboard's and wandb's files, and in trackers.json the
            identity that a resumed run goes on with.
        config_dict: the settings to show, with "name".

    Raises:
        ValueError: see `check_sinks`.
        RunError: a tracker does not start.
    """
    names = list(dict.fromkeys(names))
    check_sinks(names)
    if not names:
        return Sinks({})
    opened: dict[str, Sink] = {}
    for name in names:
        try:
            opened[name] = SINKS[name](folder, config_dict, resumed_step)
        except Exception as error:
            Sinks(opened).close()
            if isinstance(error, RunError):
                raise
            raise RunError(f"sinks: {name} does not start ({error})") from error
    return Sinks(opened)


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """{"train/loss": 2.0} or {"validation/loss": 2.0}: a line's finite numbers but its step."""
    if "val_loss" in line:
        named = {"validation/loss": line["val_loss"]}
    else:
        named = {f"train/{key}": value for key, value in line.items() if key != "step"}
    return {
        key: value
        for key, value in named.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


class _TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed_step: int) -> None:
        # Steps after the one resumed from are written again; readers drop their first version.
        writer = _tensorboard()
        self._writer = writer(str(folder / TENSORBOARD), purge_step=resumed_step + 1)
        if resumed_step == 0:
            text = json.dumps(config, indent=1, ensure_ascii=False)
            self._writer.add_text("settings", f"```\n{text}\n```", 0)
        self._writer.flush()

    def write(self, step: int, scalars: dict[str, float], validation: bool) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, step)

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Once:
    """wandb and trackio cannot take a step back: none is given to them a second time."""

    def __init__(self, run: Any, known: dict[str, Any]) -> None:
        self._run = run
        self._done = (known["step"], known["validated"])

    def write(self, step: int, scalars: dict[str, float], validation: bool) -> None:
        if step > self._done[validation]:
            self._run.log(scalars, step=step)

    def sync(self) -> None:
        """Both send in their own time."""

    def close(self) -> None:
        self._run.finish()


def _open_wandb(folder: Path, config: dict[str, Any], resumed_step: int) -> Sink:
    # Its own settings (project, offline, ...) stay the user's: WANDB_PROJECT, WANDB_MODE.
    known = _identity(folder, "wandb", resumed_step)
    wandb = _wandb()
    run = wandb.init(
        id=known["id"],
        name=config["name"],
        dir=str(folder),
        config=config,
        resume="allow",
        settings=wandb.Settings(console="off"),
    )
    return _Once(run, known)


def _open_trackio(folder: Path, config: dict[str, Any], resumed_step: int) -> Sink:
    # It knows a run by its name alone, so that has to be one of a kind.
    known = _identity(folder, "trackio", resumed_step)
    run = _trackio()(
        project=PROJECT,
        name=f"{config['name']}-{known['id']}",
        config=config,
        resume="allow",
        embed=False,
    )
    return _Once(run, known)


def _identity(folder: Path, name: str, resumed_step: int) -> dict[str, Any]:
    """The tracker's entry in trackers.json, brought up to date.

    "id" of the run there, and the last "step" and "validated" step that it was given. A run from
    the start is a new one there.
    """
    path = folder / TRACKERS
    entries = _read(path) if path.is_file() else {}
    if resumed_step == 0 or name not in entries:
        entries[name] = {"id": secrets.token_hex(4), "step": 0, "validated": 0}
    elif (folder / METRICS).is_file():
        for key, lines in zip(("step", "validated"), read_metrics(folder), strict=True):
            given = [entries[name][key], *(line["step"] for line in lines)]
            entries[name][key] = max(given)
    write_json(path, entries)
    return entries[name]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: {
                "id": str(one["id"]),
                "step": int(one["step"]),
                "validated": int(one["validated"]),
            }
            for name, one in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: damaged ({error!r}); move it away, and the trackers begin a new run"
        ) from None


def _tensorboard() -> Any:
    return importlib.import_module("torch.utils.tensorboard").SummaryWriter


def _wandb() -> Any:
    wandb = importlib.import_module("wandb")
    _ = wandb.init
    return wandb


def _trackio() -> Any:
    return importlib.import_module("trackio").init


_LOADERS: dict[str, Callable[[], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
SINKS: dict[str, Callable[[Path, dict[str, Any], int], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
