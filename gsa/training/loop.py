"""Training: one small loop. A run is a folder; killed at any moment, it goes on bit for bit.

    result = train(TrainConfig(name="mine", data="shards/books", out="runs/mine"))

In one process, or in several that torchrun starts: `distributed.Team` says what they share.
"""

import signal
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gsa.data import Batch, MixedRows, PackedRows, TokenShards, open_rows
from gsa.model import GSAConfig
from gsa.training import run_folder
from gsa.training.checkpoint import Checkpoint
from gsa.training.config import TrainConfig
from gsa.training.distributed import Team, join, whole
from gsa.training.errors import RunError
from gsa.training.gauge import Gauge
from gsa.training.lock import RunLock
from gsa.training.objective import Objective, next_token, num_targets, to_device
from gsa.training.optimizer import build_optimizer
from gsa.training.progress import Display
from gsa.training.records import Records
from gsa.training.report import finish, token_unit
from gsa.training.saver import Saver
from gsa.training.schedule import learning_rate
from gsa.training.setup import build_model, build_model_config, check_rows, pick_device
from gsa.training.signals import StopSignals
from gsa.training.sinks import check_sinks
from gsa.training.state import Progressed
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
    check_rows(config, team)
    with (
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


class Trainer:
    """Model, optimizer, rows and counters of one run; of several processes, one's share of them."""

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
        self.config = config
        self.rows = rows
        self.validation = validation
        self.device = device
        self.objective = objective
        self.team = team
        self.model = build_model(config, model_config, device, team)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, config)
        self.gauge = Gauge(config, model_config, device, team.world)
        self.at = Progressed()

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
                      tokenizer=self.rows.shards.tokenizer_folder,
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
            finish, folder, config=self.config, model=self.model, train=self.rows.shards,
            validation=self.validation, state=asdict(self.at), command=command,
        )  # fmt: skip
        self.team.ask_first(finish_run)
        display.say(f"finished: {folder / run_folder.REPORT}")
        return TrainResult(
            folder=folder, status="finished", step=self.at.step, val_loss=self.at.val_loss
        )

    def batches(self) -> list[Batch]:
        """This process's share of the batches of the next step."""
        rows, team = self.config.rows, self.team
        firsts = (self.at.position + i * rows for i in range(self.config.accumulation))
        return [self.rows.share(first, rows, team.rank, team.world) for first in firsts]

    def step(self) -> dict[str, Any]:
        """One optimizer step, or one skipped because loss or gradient is not finite or a spike.

        The loss is the mean over all predicted tokens of the step, so cutting a step into more
        passes, or among processes, changes nothing but rounding. Returns the line for
        metrics.jsonl.
        """
        config, at, team = self.config, self.at, self.team
        started = time.perf_counter()
        self.gauge.begin()
        batches = self.batches()
        data_wait = time.perf_counter() - started
        targets = max(team.total(sum(num_targets(batch) for batch in batches)), 1)
        loss, norm = self._backward(batches, targets)
        lr = learning_rate(config, at.step + 1)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        skip = not finite or at.is_spike(norm.item(), config.spike)
        if not skip:
            self.optimizer.step(lr)
        self.optimizer.zero_grad()
        tokens = team.world * sum(batch.input_ids.numel() for batch in batches)
        rows = config.rows * config.accumulation
        at.note_step(rows=rows, tokens=tokens, norm=None if skip else norm.item())
        seconds = time.perf_counter() - started
        at.seconds += seconds
        return {
            "step": at.step,
            "loss": loss.item(),
            "ppl": loss.exp().item(),
            "lr": lr,
            "grad_norm": norm.item(),
            "tokens": at.tokens,
            "skipped": at.skipped,
            "data_wait": data_wait,
            **self.gauge.readings(step=at.step, tokens=tokens, seconds=seconds, total=at.seconds),
        }

    def _backward(self, batches: list[Batch], targets: int) -> tuple[Tensor, Tensor]:
        """(loss, norm of the gradient) of the whole step, which all processes agree on."""
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches, 1):
            self.team.reduce_over_hosts(self.model, i == len(batches))
            with self._precision():
                part = self.objective(self.model, to_device(batch, self.device)) / targets
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        return self.team.sum(loss), self.team.as_first(whole(norm))

    def _precision(self) -> AbstractContextManager[Any]:
        enabled = self.config.dtype == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

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
            precision=self._precision,
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
            "fingerprints": run_folder.fingerprints(self.rows.shards, self.validation),
        }
