"""Checkpoints: folders of safetensors and JSON, complete or absent; no pickle anywhere.

    checkpoints/step-00000200/
        config.json, model.safetensors, tokenizer files    the model, for from_pretrained
        optimizer.safetensors     AdamW's moments by parameter name
        rng.safetensors           torch's random number generators, uint8
        state.json                step, position in the data, counters; the run's settings
        manifest.json             size and SHA-256 of each of these files; written last

A save goes to `step-00000200.incomplete`, is forced to disk, and then renamed. One process
writes; what it writes is keyed by parameter name, as a sharded writer would.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gsa.training.errors import RunError
from gsa.training.export import WEIGHTS, saved_tensors, write_model
from gsa.training.files import files_under, sha256, sync, write_json
from gsa.training.optimizer import Optimizers, flat_state, load_flat_state

MANIFEST = "manifest.json"
STATE = "state.json"
INCOMPLETE = ".incomplete"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint whose files are as they were written."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def restore(self, model: nn.Module, optimizer: Optimizers) -> None:
        """Put weights, optimizer state and random number generators back, bit for bit."""
        weights = load_file(self.folder / WEIGHTS)
        with torch.no_grad():
            for name, target in saved_tensors(model).items():
                target.copy_(weights[name])
        load_flat_state(model, optimizer, load_file(self.folder / "optimizer.safetensors"))
        rng = load_file(self.folder / "rng.safetensors")
        torch.set_rng_state(rng["torch"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])


def save_checkpoint(
    checkpoints: Path,
    *,
    model: Any,
    optimizer: Optimizers,
    tokenizer: Path,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of state["step"], then drop all but the newest `keep`.

    RunError if it cannot be written (a full disk): what was half-written is removed, the earlier
    checkpoints stay.
    """
    folder = checkpoints / f"step-{state['step']:08d}"
    partial = folder.with_name(folder.name + INCOMPLETE)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model(partial, model, tokenizer)
        save_file(flat_state(model, optimizer), partial / "optimizer.safetensors")
        save_file(_rng_state(model), partial / "rng.safetensors")
        write_json(partial / STATE, state)
        listed = {}
        for path in files_under(partial):
            sync(path)
            name = path.relative_to(partial).as_posix()
            listed[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        write_json(partial / MANIFEST, {"format": "gsa-checkpoint", "version": 1, "files": listed})
        sync(partial)
        if folder.exists():  # a damaged one, that the run went back behind
            shutil.rmtree(folder)
        partial.rename(folder)
        sync(checkpoints)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = [path for _, path in _complete(checkpoints)]
        last = f"the last good one is {kept[0]}" if kept else "there is no earlier one"
        raise RunError(
            f"{folder}: the checkpoint could not be saved ({error}); {last}; make room and run the "
            "same command again"
        ) from error
    for _, old in _complete(checkpoints)[keep:]:
        # Renamed first, so that a crash half-way through leaves nothing that looks complete.
        doomed = old.rename(old.with_name(old.name + INCOMPLETE))
        shutil.rmtree(doomed, ignore_errors=True)
    return folder


def find_checkpoint(checkpoints: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None if there has never been one.

    Half-written and damaged ones are named through `say` and passed over; RunError if every one is
    damaged, so that no run starts over by accident.
    """
    for path in sorted(checkpoints.glob(f"step-*{INCOMPLETE}")):
        say(f"ignoring {path}: half written")
    damaged = []
    for _, path in _complete(checkpoints):
        try:
            return open_checkpoint(path)
        except RunError as error:
            damaged.append(path)
            say(f"ignoring {error}")
    if damaged:
        raise RunError(
            f"{checkpoints}: all {len(damaged)} checkpoints are damaged; restore one, or start "
            "again in another out"
        )
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint by its folder, every file compared with the manifest.

    RunError if it is missing, half written, truncated or changed.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such checkpoint folder")
    if folder.name.endswith(INCOMPLETE) or not (folder / MANIFEST).is_file():
        raise RunError(
            f"{folder}: half written ({MANIFEST} comes last); name a folder step-XXXXXXXX with one"
        )
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = [
            (folder / name, entry["bytes"], entry["sha256"]) for name, entry in files.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / MANIFEST}: damaged ({error!r})") from None
    for path, size, digest in entries:
        if not path.is_file():
            raise RunError(f"{path}: missing, though {MANIFEST} lists it")
        if path.stat().st_size != size:
            raise RunError(f"{path}: truncated: {size} bytes expected, got {path.stat().st_size}")
        if sha256(path) != digest:
            raise RunError(f"{path}: damaged: its SHA-256 is not the one in {MANIFEST}")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(folder=folder, state=state)


def newest_step(checkpoints: Path) -> int:
    """The step of the newest complete-looking checkpoint, or −1."""
    found = _complete(checkpoints)
    return found[0][0] if found else -1


def _complete(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of renamed checkpoints, newest first."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in checkpoints.iterdir():
            if match := _NAME.fullmatch(path.name):
                found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def _rng_state(model: nn.Module) -> dict[str, Tensor]:
    state = {"torch": torch.get_rng_state()}
    if next(model.parameters()).is_cuda:
        state["cuda"] = torch.cuda.get_rng_state()
    return state
