"""Training: one small loop. A run is a folder; killed at any moment, it goes on bit for bit.

    result = train(TrainConfig(name="mine", data="shards/books", out="runs/mine"))

One process. What several would share goes through few places: `optimizer.flat_state` and
`checkpoint.py` (what is saved), `Trainer.batches` (which rows), `Trainer.step` (sums to reduce).
"""

import signal
import statistics
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from gsa.data import Batch, MixedRows, PackedRows, TokenShards, open_rows
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.training import run_folder
from gsa.training.blocks import prepare_blocks
from gsa.training.checkpoint import Checkpoint, save_checkpoint
from gsa.training.config import TrainConfig
from gsa.training.errors import RunError
from gsa.training.files import write_json
from gsa.training.lock import RunLock
from gsa.training.metrics import MetricsLog
from gsa.training.objective import Objective, next_token, num_targets, to_device
from gsa.training.optimizer import build_optimizer
from gsa.training.progress import Display
from gsa.training.report import finish, token_unit, versions
from gsa.training.schedule import learning_rate
from gsa.training.setup import build_model_config, pick_device
from gsa.training.signals import StopSignals
from gsa.training.sinks import Sinks, check_sinks, open_sinks
from gsa.training.validation import HeldOut, held_out_batches, held_out_loss

NORMS = 100
"""Steps that a gradient's norm is compared with, to tell a spike."""


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


@dataclass
class Progressed:
    """Where a run stands: all of it goes into a checkpoint's state.json."""

    step: int = 0
    position: int = 0
    """Rows consumed since the start of training."""
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    norms: list[float] = field(default_factory=list)
    """Of the gradient in the last NORMS steps that were not skipped."""
    seconds: float = 0.0
    """Time in training steps, all processes of the run together."""
    validated_step: int = 0
    val_loss: float | None = None
    val_tokens: int = 0
    best_val_loss: float | None = None
    best_val_step: int = 0


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
    rows = open_rows(config.data, seq_len=config.seq_len, seed=config.seed)
    shards = rows.shards
    validation = TokenShards(config.validation) if config.validation else None
    model_config = build_model_config(config, shards, validation)
    device = pick_device(config.device)
    check_sinks(config.sinks)
    folder = run_folder.open_run_folder(config.out)
    with RunLock(folder), Display(config.steps) as display, StopSignals() as stop:
        data = run_folder.fingerprints(shards, validation)
        settings = run_folder.read_settings(folder)
        if run_folder.is_finished(folder) and resume == "auto":
            run_folder.check_same_run(folder, settings, config, data)
            display.say(f"{folder} is complete: nothing to do")
            return TrainResult(folder=folder, status="already finished", step=config.steps)
        start = run_folder.starting_point(folder, resume, display.say)
        if start is not None:
            run_folder.check_same_run(start.folder, start.state, config, data)
        if start is None or not settings:
            settings = {"command": command, "config": config.to_dict(), "fingerprints": data}
            write_json(folder / run_folder.SETTINGS, {**settings, "versions": versions()})
        trainer = Trainer(config, model_config, rows, validation, device, objective)
        return trainer.run(folder, start, display, stop, command)


class Trainer:
    """Model, optimizer, rows and counters of one run in one process."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: GSAConfig,
        rows: PackedRows | MixedRows,
        validation: TokenShards | None,
        device: torch.device,
        objective: Objective,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.rows = rows
        self.validation = validation
        self.device = device
        self.objective = objective
        self.model: Any = GSAForCausalLM(model_config)
        self.model.to(device).train()
        prepare_blocks(self.model, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, config)
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
            start.restore(self.model, self.optimizer)
            self.at = Progressed(**start.state["progress"])
            display.say(f"going on from {start.folder}")
        display.resumed_at(self.at.step)
        sinks = open_sinks(self.config.sinks, folder, self.config.to_dict(), self.at.step)
        metrics = MetricsLog(folder, after_step=self.at.step, validated=self.at.validated_step)
        saved = -1 if start is None else self.at.step
        try:
            while True:
                if self._validation_due():
                    self._validate(metrics, sinks, display, stop)
                if (stop.received or self._checkpoint_due()) and saved != self.at.step:
                    sinks.sync()
                    self._save(folder, metrics)
                    saved = self.at.step
                if stop.received:
                    name = signal.Signals(stop.received).name
                    done = f"saved step {self.at.step} of {self.config.steps}"
                    display.say(f"{name}: {done}; the same command goes on from there")
                    return TrainResult(
                        folder=folder, status="stopped", step=self.at.step, signal=stop.received
                    )
                if self.at.step >= self.config.steps:
                    break
                line = self.step()
                metrics.write(**line)
                sinks.write(line)
                self._check_skipped(folder)
                display.step(self.at.step, line["loss"], line["tokens_per_s"], line)
        finally:
            sinks.close()
            metrics.close()
        finish(folder, config=self.config, model=self.model, train=self.rows.shards,
               validation=self.validation, state=asdict(self.at), command=command)  # fmt: skip
        display.say(f"finished: {folder / run_folder.REPORT}")
        return TrainResult(
            folder=folder, status="finished", step=self.at.step, val_loss=self.at.val_loss
        )

    def batches(self) -> list[Batch]:
        """The batches of the next step."""
        at, rows = self.at.position, self.config.rows
        return [self.rows.batch(at + i * rows, rows) for i in range(self.config.accumulation)]

    def step(self) -> dict[str, Any]:
        """One optimizer step, or one skipped because loss or gradient is not finite or a spike.

        The loss is the mean over all predicted tokens of the step, so cutting a step into more
        passes changes nothing but rounding. Returns the line for metrics.jsonl.
        """
        config, at = self.config, self.at
        started = time.perf_counter()
        batches = self.batches()
        data_wait = time.perf_counter() - started
        targets = max(sum(num_targets(batch) for batch in batches), 1)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            with self._precision():
                part = self.objective(self.model, to_device(batch, self.device)) / targets
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        lr = learning_rate(config, at.step + 1)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        spike = finite and self._is_spike(norm.item())
        if finite and not spike:
            self.optimizer.step(lr)
            at.norms = [*at.norms, norm.item()][-NORMS:]
        self.optimizer.zero_grad()
        tokens = sum(batch.input_ids.numel() for batch in batches)
        at.step += 1
        at.position += config.rows * config.accumulation
        at.tokens += tokens
        at.skipped += spike or not finite
        at.skipped_in_a_row = 0 if finite and not spike else at.skipped_in_a_row + 1
        seconds = time.perf_counter() - started
        at.seconds += seconds
        return {
            "step": at.step,
            "loss": loss.item(),
            "ppl": loss.exp().item(),
            "lr": lr,
            "grad_norm": norm.item(),
            "tokens": at.tokens,
            "tokens_per_s": tokens / seconds,
            "seconds": at.seconds,
            "skipped": at.skipped,
            "data_wait": data_wait,
        }

    def _is_spike(self, norm: float) -> bool:
        norms = self.at.norms
        return len(norms) == NORMS and norm > self.config.spike * statistics.median(norms)

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

    def _validate(
        self, metrics: MetricsLog, sinks: Sinks, display: Display, stop: StopSignals
    ) -> None:
        assert self.validation is not None
        whole = self.at.step == self.config.steps
        found = held_out_loss(
            self.model,
            held_out_batches(self.validation, self.config, whole=whole),
            self.objective,
            precision=self._precision,
            stopping=lambda: bool(stop.received),
        )
        if found is not None:
            self._note_validation(found)
            line = self._validation_line(found, whole)
            metrics.write(**line)
            sinks.write(line)
            unit = token_unit(self.validation)
            display.say(f"step {self.at.step}: held-out loss {found.loss:.4f} nats per {unit}")

    def _note_validation(self, found: HeldOut) -> None:
        at = self.at
        at.validated_step, at.val_loss, at.val_tokens = at.step, found.loss, found.tokens
        if at.best_val_loss is None or found.loss < at.best_val_loss:
            at.best_val_loss, at.best_val_step = found.loss, at.step

    def _validation_line(self, found: HeldOut, whole: bool) -> dict[str, Any]:
        return {
            "step": self.at.step,
            "val_loss": found.loss,
            "val_tokens": found.tokens,
            "val_seconds": found.seconds,
            "whole": whole,
            "tokens": self.at.tokens,
        }

    def _save(self, folder: Path, metrics: MetricsLog) -> None:
        metrics.sync()
        state = {
            "step": self.at.step,
            "progress": asdict(self.at),
            "config": self.config.to_dict(),
            "fingerprints": run_folder.fingerprints(self.rows.shards, self.validation),
        }
        save_checkpoint(
            folder / run_folder.CHECKPOINTS,
            model=self.model,
            optimizer=self.optimizer,
            tokenizer=self.rows.shards.tokenizer_folder,
            state=state,
            keep=self.config.keep_checkpoints,
        )
