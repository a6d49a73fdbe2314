"""`gsa export`: a model folder out of a run's checkpoint, while the run goes on or after it.

export_run(ExportConfig(source="runs/mine", out="models/mine"))
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from gsa.training.adapters import is_adapted, merged
from gsa.training.checkpoint import (
    MANIFEST,
    RNG,
    SHARDS,
    STATE,
    Checkpoint,
    find_checkpoint,
    newest_step,
    open_checkpoint,
    read_tensors,
)
from gsa.training.distributed import Team
from gsa.training.errors import RunError
from gsa.training.export import write_weights
from gsa.training.files import CHECKPOINTS, WEIGHTS
from gsa.training.lock import made_whole

_NOT_THE_MODEL = (MANIFEST, STATE, SHARDS, f"{RNG}*.safetensors", "optimizer.safetensors")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    source: str
    """Run folder of gsa train (its newest whole checkpoint is taken), or a folder step-NNNNNNNN."""
    out: str
    """Folder to make; from_pretrained opens it."""


def export_run(config: ExportConfig) -> Path:
    """Makes a model folder out of the newest whole checkpoint of a run, also while it goes on.

    Raises:
        ValueError: out is there already.
        RunError: there is no whole checkpoint, or no room; another process writes out.
    """
    source, out = Path(config.source), Path(config.out)
    if out.exists():
        raise ValueError(f"out: {out} exists; choose another, or remove it")
    while True:
        checkpoint = _choose(source)
        try:
            with made_whole(out) as partial:
                write_from_checkpoint(partial, checkpoint.folder)
            return out
        except (OSError, SafetensorError) as error:
            if checkpoint.folder.exists():
                raise RunError(f"{out}: could not be written ({error})") from error
            # The run has newer ones and dropped this one meanwhile.


def write_from_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Write the model of a checkpoint, whole or in shards, into `folder`; the weights last.

    Adapters are added to their weights.
    """
    shutil.copytree(
        checkpoint, folder, ignore=shutil.ignore_patterns(*_NOT_THE_MODEL), dirs_exist_ok=True
    )
    if (checkpoint / SHARDS).is_dir():
        weights = read_tensors(
            checkpoint,
            lambda stored: {
                name: torch.zeros(entry.size, dtype=entry.properties.dtype)
                for name, entry in stored.items()
                if not name.startswith("state.")
            },
            Team(),
        )
        write_weights(folder, merged(weights))
        return
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        if is_adapted(stored.keys()):
            write_weights(folder, merged(load_file(folder / WEIGHTS)))


def _choose(source: Path) -> Checkpoint:
    if not source.is_dir():
        raise RunError(f"source: {source}: no such folder")
    checkpoints = source / CHECKPOINTS
    if not checkpoints.is_dir() and source.name.startswith("step-"):
        return open_checkpoint(source)
    while True:
        newest = newest_step(checkpoints)
        try:
            found = find_checkpoint(checkpoints, lambda text: print(text, file=sys.stderr))
        except RunError:
            if newest_step(checkpoints) == newest:
                raise
            continue  # the run dropped what was being read
        if found is None:
            raise RunError(
                f"source: {source} has no whole checkpoint; expected a run folder with one "
                "(gsa train --checkpoint-interval N), or a folder step-NNNNNNNN"
            )
        return found
