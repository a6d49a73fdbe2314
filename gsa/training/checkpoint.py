"""Checkpoints: folders of safetensors and JSON, complete or absent; no pickle anywhere.

    checkpoints/step-00000200/
        config.json, tokenizer files         the model's, for from_pretrained
        model.safetensors                    its weights
        optimizer.safetensors                the optimizer's moments by parameter name
        rng.safetensors                      torch's random number generators, uint8
        state.json                           step, position in the data, counters; settings
        manifest.json                        size and SHA-256 of each of these files; written last

Adapters (`TrainConfig.lora`) are in model.safetensors beside the weights they belong to;
`gsa export` adds them up. Of several processes, weights and moments are in `shards/`, a file of
each process with the parts that it holds, and `rng-00000.safetensors`, ... are as many. Both kinds
are read by any number of processes.

A save goes to `step-00000200.incomplete`, is forced to disk, and then renamed.
"""

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from gsa.training.distributed import Team
from gsa.training.errors import RunError
from gsa.training.export import saved_tensors, write_config, write_weights
from gsa.training.files import files_under, sha256, sync, write_json
from gsa.training.optimizer import Optimizers, empty_state, flat_state

MANIFEST = "manifest.json"
STATE = "state.json"
INCOMPLETE = ".incomplete"
SHARDS = "shards"
RNG = "rng"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint whose files are as they were written."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def restore(self, model: nn.Module, optimizer: Optimizers, team: Team) -> None:
        """Put weights, optimizer state and random number generators back, bit for bit.

        Whatever number of processes wrote it, each process of `team` reads the shares that it has.
        """
        read_tensors(
            self.folder,
            lambda stored: {**saved_tensors(model), **empty_state(model, optimizer, stored)},
            team,
        )
        generators = sorted(self.folder.glob(f"{RNG}*.safetensors"))
        rng = load_file(generators[team.rank % len(generators)])
        torch.set_rng_state(rng["torch"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])


def read_tensors(
    folder: Path,
    wanted: Callable[[dict[str, TensorStorageMetadata]], dict[str, Tensor]],
    team: Team,
) -> dict[str, Tensor]:
    """Fills tensors, whole or a process's shares of them, from a checkpoint's files.

    wanted: from sizes and dtypes of all that is stored, by name, to the tensors to fill.
    """
    shards = folder / SHARDS
    reader = HuggingFaceStorageReader(str(shards if shards.is_dir() else folder))
    tensors = wanted(reader.read_metadata().state_dict_metadata)  # pyright: ignore
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        alone = team.mesh is None
        load(tensors, storage_reader=reader, process_group=team.savers, no_dist=alone)
    return tensors


def save_checkpoint(
    checkpoints: Path,
    *,
    model: Any,
    optimizer: Optimizers,
    tokenizer: Path | None,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of state["step"] whole, then drop all but the newest `keep`.

    RunError if it cannot be written (a full disk): what was half-written is removed, the earlier
    checkpoints stay.
    """
    folder = checkpoints / f"step-{state['step']:08d}"
    try:
        partial = begin(folder)
        write_config(partial, model, tokenizer)
        write_weights(partial, saved_tensors(model))
        save_file(flat_state(model, optimizer), partial / "optimizer.safetensors")
        save_file(rng_state(model), partial / f"{RNG}.safetensors")
        write_json(partial / STATE, state)
        publish(folder, digest(partial, files_under(partial)))
    except (OSError, SafetensorError) as error:
        raise give_up(folder, error) from error
    prune(folder, keep)
    return folder


def begin(folder: Path) -> Path:
    """An empty folder beside `folder`, to write into; what was left half-written makes room."""
    for left in folder.parent.glob(f"step-*{INCOMPLETE}"):
        shutil.rmtree(left, ignore_errors=True)
    partial = beside(folder)
    partial.mkdir(parents=True)
    return partial


def digest(partial: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Forces files to disk; their entries of the manifest."""
    entries = {}
    for path in paths:
        sync(path)
        name = path.relative_to(partial).as_posix()
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return entries


def publish(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """The manifest, and then the name that makes what was written beside it a checkpoint."""
    partial = beside(folder)
    write_json(partial / MANIFEST, {"format": "gsa-checkpoint", "version": 1, "files": files})
    for inner in [path for path in partial.rglob("*") if path.is_dir()]:
        sync(inner)
    sync(partial)
    if folder.exists():  # a damaged one, that the run went back behind
        shutil.rmtree(folder)
    partial.rename(folder)
    sync(folder.parent)


def give_up(folder: Path, error: object) -> RunError:
    """Removes what was half-written; the error that says so."""
    shutil.rmtree(beside(folder), ignore_errors=True)
    kept = [path for _, path in _complete(folder.parent)]
    last = f"the last good one is {kept[0]}" if kept else "there is no earlier one"
    return RunError(
        f"{folder}: the checkpoint could not be saved ({error}); {last}; make room and run the "
        "same command again"
    )


def prune(newest: Path, keep: int) -> None:
    """Drop all but the newest `keep`.

    newest: the one just written. Later ones are damaged, the run went back behind them: they count
    for nothing, or the last good one might have to go for them.
    """
    found = [path for _, path in _complete(newest.parent)]
    for old in found[found.index(newest) + keep :]:
        # Renamed first, so that a crash half-way through leaves nothing that looks complete.
        doomed = old.rename(beside(old))
        shutil.rmtree(doomed, ignore_errors=True)


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
            f"{folder}: half written ({MANIFEST} comes last); name a folder step-NNNNNNNN with one"
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


def beside(folder: Path) -> Path:
    """Where a checkpoint is until it is whole."""
    return folder.with_name(folder.name + INCOMPLETE)


def _complete(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of renamed checkpoints, newest first."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in checkpoints.iterdir():
            if match := _NAME.fullmatch(path.name):
                found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def rng_state(model: nn.Module) -> dict[str, Tensor]:
    """The states of torch's generators in this process."""
    state = {"torch": torch.get_rng_state()}
    if next(model.parameters()).is_cuda:
        state["cuda"] = torch.cuda.get_rng_state()
    return state
