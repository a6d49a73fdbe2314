"""The run folder: what may be trained into it, and from which checkpoint a run goes on."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from gsa.data import MixedShards, TokenShards
from gsa.training.checkpoint import Checkpoint, find_checkpoint, newest_step, open_checkpoint
from gsa.training.config import TrainConfig
from gsa.training.errors import RunError
from gsa.training.files import CHECKPOINTS, SETTINGS, WEIGHTS, incomplete, read_object, write_json
from gsa.training.lock import LOCK
from gsa.training.report import REPORT, versions

_DEFAULTS = {f.name: f.default for f in fields(TrainConfig) if f.default is not MISSING} | {
    f.name: f.default_factory() for f in fields(TrainConfig) if f.default_factory is not MISSING
}


def open_run_folder(out: str) -> Path:
    """The folder, made if need be; RunError if it holds something that is no run."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"out: expected a folder, got the file {folder}")
    if folder.is_dir() and not (folder / SETTINGS).is_file():
        ours = (LOCK, incomplete(folder / SETTINGS).name)
        others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
        if others:
            raise RunError(
                f"out: {folder} is not a run folder ({SETTINGS} is missing) and holds "
                f"{', '.join(others[:5])}; choose another out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fingerprints(
    train: TokenShards | MixedShards, validation: TokenShards | None
) -> dict[str, str]:
    """What identifies the data of a run; "" for no validation text, no weights of a mixture."""
    return {
        "data": train.fingerprint,
        "validation": "" if validation is None else validation.fingerprint,
        "weights": ", ".join(map(str, train.weights)) if isinstance(train, MixedShards) else "",
    }


def check_same_run(
    where: Path, recorded: dict[str, Any], config: TrainConfig, data: dict[str, str]
) -> None:
    """RunError unless `recorded` (its "config" and "fingerprints") is a run of the same settings.

    Names each field that differs; one that the record does not know yet had its default. Fields in
    `FREE_TO_CHANGE` may; shards may have moved but must hold the same tokens; a validation set may
    be added to a run that had none.
    """
    before, now = {**_DEFAULTS, **recorded["config"]}, config.fixed()
    differing = [
        f"{key}: {before.get(key)!r} there, {now[key]!r} asked"
        for key in now
        if before.get(key) != now[key]
    ]
    if differing:
        raise RunError(
            f"{where} is of a run with other settings ({'; '.join(differing)}); ask for the "
            "same, or choose another out"
        )
    weights = recorded["fingerprints"].get("weights", "")  # runs before mixtures kept none
    if weights != data["weights"]:
        raise RunError(
            f"data: {where} mixed its sources by other weights ({weights or 'one source'} there, "
            f"{data['weights'] or 'one source'} asked); give the same, or choose another out"
        )
    for name, found in recorded["fingerprints"].items():
        if found and found != data[name]:
            raise RunError(
                f"{name}: {where} was made with other shards (fingerprint {found[:12]} there, "
                f"{data[name][:12] or 'none'} asked); give the same shards, or choose another out"
            )


def begin(
    folder: Path,
    config: TrainConfig,
    data: dict[str, str],
    resume: str,
    command: str,
    say: Callable[[str], None],
) -> tuple[bool, Checkpoint | None]:
    """Whether the run is finished, and the checkpoint to go on from; writes a new run's train.json.

    data: the `fingerprints` of its shards. RunError as from `check_same_run`, `starting_point`.
    """
    finished = is_finished(folder) and resume == "auto"
    try:
        settings = read_settings(folder)
    except RunError as error:
        if finished:
            raise
        settings = {}  # a checkpoint holds the same
        say(f"ignoring {error}")
    if finished:
        check_same_run(folder, settings, config, data)
        say(f"{folder} is complete: nothing to do")
        return True, None
    start = starting_point(folder, resume, say)
    if start is not None:
        check_same_run(start.folder, start.state, config, data)
    if start is None or not settings:
        settings = {"command": command, "config": config.to_dict(), "fingerprints": data}
        write_json(folder / SETTINGS, {**settings, "versions": versions()})
    return False, start


def read_settings(folder: Path) -> dict[str, Any]:
    """The folder's train.json; {} if there is none yet."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    return read_object(path, {"config": dict, "fingerprints": dict})


def is_finished(folder: Path) -> bool:
    """Whether the run went to its end: the report is written last."""
    return (folder / REPORT).is_file() and (folder / WEIGHTS).is_file()


def starting_point(folder: Path, resume: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; None for a fresh start.

    Args:
        resume: "auto" for the newest undamaged checkpoint of the folder; "never" for a fresh start,
            which needs a folder without a run; else the folder of one checkpoint.

    Raises:
        RunError: the checkpoint named is damaged or older than others of the folder, every one
            is damaged, or a fresh start would overwrite something.
    """
    checkpoints = folder / CHECKPOINTS
    if resume == "never":
        if newest_step(checkpoints) >= 0 or (folder / WEIGHTS).exists():
            raise RunError(f"out: {folder} already holds a run; choose another out, or resume it")
        return None
    if resume != "auto":
        chosen = open_checkpoint(Path(resume))
        if newest_step(checkpoints) > chosen.step:
            raise RunError(
                f"resume: {folder} has newer checkpoints than step {chosen.step}, which would be "
                "overwritten; choose another out, or move them away"
            )
        return chosen
    found = find_checkpoint(checkpoints, say)
    if found is None and (folder / WEIGHTS).exists():
        raise RunError(
            f"out: {folder} holds a model but no checkpoint to go on from; choose another out"
        )
    return found
