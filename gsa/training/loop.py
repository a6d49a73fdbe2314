"""Training: one small loop. A run is a folder; killed at any moment, it goes on bit for bit.

    result = train(TrainConfig(name="mine", data="shards/books", out="runs/mine"))

In one process, or in several that torchrun starts: `distributed.Team` says what they share.
"""

import signal
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from gsa.data import MixedRows, PackedRows, TokenShards, open_rows
from gsa.model import GSAConfig
from gsa.training import run_folder
from gsa.training.checkpoint import Checkpoint
from gsa.training.config import TrainConfig
from gsa.training.distributed import Team, join
from gsa.training.errors import RunError
from gsa.training.lock import RunLock
from gsa.training.objective import Objective, next_token
from gsa.training.progress import Display
from gsa.training.records import Records
from gsa.training.report import finish, token_unit
from gsa.training.saver import Saver
from gsa.training.setup import build_model_config, check_team, current, pick_device
from gsa.training.signals import StopSignals
from gsa.training.sinks import check_sinks
from gsa.training.state import Progressed
from gsa.training.stepper import Stepper
from gsa.training.validation import held_out_batches, held_out_loss


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended.

    status: "finished"; "stopped" by the signal `signal`, with a checkpoint of `step`; or "already
    finished", with nothing done. val_loss: final held-out loss in nats per token, where known.
    """

    folder: Path
    status: Literal["finished", "stopped", "already finished"]
    step: int
    val_loss: float | None = None
    signal: int = 0


def train(
    config: TrainConfig,
    *,
    resume: str = "auto",
    command: str = "",
    objective: Objective = next_token,
) -> TrainResult:
    """Train a model from random weights, or go on where an earlier call was stopped.

    Args:
        resume: "auto": from the newest undamaged checkpoint of config.out, if any. "never":
            config.out must not hold a run. Else the folder of the checkpoint to go on from.
        command: what to name in the report as the way to repeat the run.
        objective: the loss, summed over a batch.

    SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and return. In config.out: metrics.jsonl,
    checkpoints/, and at the end the model, its tokenizer, curve.png and report.md.

    Raises:
        ValueError, FileNotFoundError: settings or shards that do not fit; nothing was written.
        RunError: the folder is in use, holds something else, or another run; a checkpoint is
            damaged or cannot be written; the loss was not finite for too long.
    """
    with join(config.device) as team:
        return _train(config, resume, command, objective, team)


def _train(
    config: TrainConfig, resume: str, command: str, objective: Objective, team: Team
) -> TrainResult:
    rows = open_rows(config.data, seq_len=config.seq_len, seed=config.seed)
    shards = rows.shards
    validation = TokenShards(config.validation) if config.validation else None
    model_config = build_model_config(config, shards, validation)
    device = pick_device(config.device, team)
    check_sinks(config.sinks)
    check_team(config, team)
    with (
        current(device),
        ExitStack() as lock,
        Display(config.steps, shown=team.first) as display,
        StopSignals() as stop,
    ):

        def open_folder() -> tuple[Path, bool, Checkpoint | None]:
            folder = run_folder.open_run_folder(config.out)
            lock.enter_context(RunLock(folder))
            data = run_folder.fingerprints(shards, validation)
            return folder, *run_folder.begin(folder, config, data, resume, command, display.say)

        folder, finished, start = team.ask_first(open_folder)
        if finished:
            return TrainResult(folder=folder, status="already finished", step=config.steps)
        trainer = Trainer(config, model_config, rows, validation, device, objective, team)
        return trainer.run(folder, start, display, stop, command)


class Trainer(Stepper):
    """A run on shards: its steps, validations and checkpoints."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: GSAConfig,
        rows: PackedRows | MixedRows,
        validation: TokenShards | None,
        device: torch.device,
        objective: Objective,
        team: Team,
    ) -> None:
        super().__init__(config, model_config, rows, device, objective, team)
        self.shards = rows.shards
        self.validation = validation

    def run(
        self,
        folder: Path,
        start: Checkpoint | None,
        display: Display,
        stop: StopSignals,
        command: str,
    ) -> TrainResult:
        """Steps, validations and checkpoints in order, up to the end or a signal."""
        if start is not None:
            start.restore(self.model, self.optimizer, self.team)
            self.at = Progressed(**start.state["progress"])
            display.say(f"going on from {start.folder}")
        display.resumed_at(self.at.step)
        records = Records(folder, self.config, self.team,
                          step=self.at.step, validated=self.at.validated_step)  # fmt: skip
        saver = Saver(folder / run_folder.CHECKPOINTS, self.team,
                      tokenizer=self.shards.tokenizer_folder,
                      keep=self.config.keep_checkpoints)  # fmt: skip
        saved = -1 if start is None else self.at.step
        try:
            while True:
                if self._validation_due():
                    self._validate(records, display, stop)
                received, failed = self.team.largest(stop.received, saver.failed)
                if failed:
                    saver.wait()
                if (received or self._checkpoint_due()) and saved != self.at.step:
                    records.sync()
                    saver.save(self.model, self.optimizer, self._state())
                    saved = self.at.step
                if received or self.at.step >= self.config.steps:
                    saver.wait()
                    break
                line = self.step()
                records.write(line)
                self._check_skipped(folder)
                display.step(self.at.step, line["loss"], line["tokens_per_s"], line)
        finally:
            records.close()
        if received:
            name = signal.Signals(received).name
            done = f"saved step {self.at.step} of {self.config.steps}"
            display.say(f"{name}: {done}; the same command goes on from there")
            return TrainResult(folder=folder, status="stopped", step=self.at.step, signal=received)
        finish_run = partial(
            finish, folder, config=self.config, model=self.model, train=self.shards,
            validation=self.validation, state=asdict(self.at), command=command,
        )  # fmt: skip
        self.team.ask_first(finish_run)
        display.say(f"finished: {folder / run_folder.REPORT}")
        return TrainResult(
            folder=folder, status="finished", step=self.at.step, val_loss=self.at.val_loss
        )

    def _check_skipped(self, folder: Path) -> None:
        if self.at.skipped_in_a_row > self.config.nan_limit:
            raise RunError(
                f"{self.at.skipped_in_a_row} steps in a row were skipped (not finite, or a spike), "
                f"up to step {self.at.step} (nan_limit = {self.config.nan_limit}); no weight has "
                "changed since. Lower lr or clip; checkpoints up to then are in "
                f"{folder / run_folder.CHECKPOINTS}"
            )

    def _validation_due(self) -> bool:
        at, interval = self.at.step, self.config.validation_interval
        if self.validation is None or self.at.validated_step == at:
            return False
        return at == self.config.steps or (interval > 0 and at % interval == 0)

    def _checkpoint_due(self) -> bool:
        at, interval = self.at.step, self.config.checkpoint_interval
        return at == self.config.steps or (interval > 0 and at > 0 and at % interval == 0)

    def _validate(self, records: Records, display: Display, stop: StopSignals) -> None:
        assert self.validation is not None
        whole = self.at.step == self.config.steps
        found = held_out_loss(
            self.model,
            held_out_batches(self.validation, self.config, whole=whole),
            self.objective,
            precision=self.precision,
            stopping=lambda: bool(stop.received),
            team=self.team,
        )
        if found is None:
            return
        self.at.note_validation(found)
        records.write(
            {
                "step": self.at.step,
                "val_loss": found.loss,
                "val_tokens": found.tokens,
                "val_seconds": found.seconds,
                "whole": whole,
                "tokens": self.at.tokens,
            }
        )
        unit = token_unit(self.validation)
        display.say(f"step {self.at.step}: held-out loss {found.loss:.4f} nats per {unit}")

    def _state(self) -> dict[str, Any]:
        """A checkpoint's state.json."""
        return {
            "step": self.at.step,
            "progress": asdict(self.at),
            "world": self.team.world,
            "config": self.config.to_dict(),
            "fingerprints": run_folder.fingerprints(self.shards, self.validation),
        }
