"""Writes checkpoints during a run: one process by itself, several together in the background.

Several take a copy of what they hold and go on; a thread of each writes its copy and agrees with
the other threads, over a process group of their own, on what is written and whether it is whole.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save

from gsa.training.checkpoint import (
    RNG,
    SHARDS,
    STATE,
    begin,
    beside,
    digest,
    give_up,
    prune,
    publish,
    rng_state,
    save_checkpoint,
)
from gsa.training.distributed import Team
from gsa.training.export import saved_tensors, write_config
from gsa.training.files import files_under, write_json
from gsa.training.optimizer import Optimizers, flat_state

SHARD = "shard-"
"""How torch begins the names of a process's files; the first process's number is 1."""


class Saver:
    """Checkpoints in a folder, the newest `keep` of them; one save at a time."""

    def __init__(self, checkpoints: Path, team: Team, *, tokenizer: Path | None, keep: int) -> None:
        self._checkpoints = checkpoints
        self._team = team
        self._tokenizer = tokenizer
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._going_on: Future[None] | None = None

    def save(self, model: Any, optimizer: Optimizers, state: dict[str, Any]) -> None:
        """Write the checkpoint of state["step"]; in the background if there are several processes.

        RunError if it, or the one before, cannot be written.
        """
        if self._team.mesh is None:
            save_checkpoint(
                self._checkpoints,
                model=model,
                optimizer=optimizer,
                tokenizer=self._tokenizer,
                state=state,
                keep=self._keep,
            )
            return
        self.wait()
        stager = DefaultStager(StagingOptions(False, False, False, False))
        tensors = {**saved_tensors(model), **flat_state(model, optimizer)}
        copied = stager.stage({name: tensor.detach() for name, tensor in tensors.items()})
        stager.close()
        as_it_is = copy.deepcopy(state)
        self._going_on = self._thread.submit(self._write, model, copied, rng_state(model), as_it_is)

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed; `wait` then says how."""
        going_on = self._going_on
        return going_on is not None and going_on.done() and going_on.exception() is not None

    def wait(self) -> None:
        """Until nothing is being saved. RunError if what was could not be written."""
        going_on, self._going_on = self._going_on, None
        if going_on is not None:
            going_on.result()

    def _write(
        self, model: Any, tensors: Any, rng: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        team, folder = self._team, self._checkpoints / f"step-{state['step']:08d}"
        partial = beside(folder)
        try:
            team.together(lambda: begin(folder) if team.first else None)
            writer = HuggingFaceStorageWriter(str(partial / SHARDS), save_distributed=True)
            save(tensors, storage_writer=writer, process_group=team.savers)
            team.together(lambda: self._write_rest(partial, model, rng, state))
            # Not before all have written: temporary files of others are no part of it.
            files = team.together(lambda: digest(partial, self._own_files(partial)))
            team.together(lambda: self._publish(folder, files) if team.first else None)
        except CheckpointException as error:
            causes = [f"process {rank}: {cause}" for rank, (cause, _) in error.failures.items()]
            raise give_up(folder, "; ".join(causes)) from error
        except OSError as error:
            raise give_up(folder, error) from error

    def _write_rest(
        self, partial: Path, model: Any, rng: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """What is not in the shards."""
        save_file(rng, partial / f"{RNG}-{self._team.rank:05d}.safetensors")
        if self._team.first:
            write_config(partial, model, self._tokenizer)
            write_json(partial / STATE, state)

    def _own_files(self, partial: Path) -> list[Path]:
        """What this process wrote."""
        rank, paths = self._team.rank, files_under(partial)
        own = (f"{SHARD}{rank + 1:05d}-", f"{RNG}-{rank:05d}.")
        each = (SHARD, f"{RNG}-")
        return [
            path
            for path in paths
            if path.name.startswith(own) or (self._team.first and not path.name.startswith(each))
        ]

    def _publish(self, folder: Path, files: list[dict[str, dict[str, Any]]]) -> None:
        publish(folder, {name: entry for own in files for name, entry in own.items()})
        prune(folder, self._keep)
