"""One model on MQAR: the training engine's own steps until it is solved, or the epochs are over."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gsa.experiments.arms import Result, StoppedError
from gsa.experiments.mqar import HELD_OUT, MQARRows, Task, is_right, recall_loss
from gsa.model import GSAConfig
from gsa.model.cost import count_parameters
from gsa.training import TrainConfig
from gsa.training.checkpoint import find_checkpoint
from gsa.training.distributed import Team
from gsa.training.files import CHECKPOINTS
from gsa.training.lock import RunLock
from gsa.training.objective import to_device
from gsa.training.saver import Saver
from gsa.training.setup import current, pick_device
from gsa.training.signals import StopSignals
from gsa.training.state import Progressed
from gsa.training.stepper import Stepper


@dataclass(frozen=True, kw_only=True)
class Examples:
    """How many examples: of training, seen once an epoch, and held out."""

    train: int
    held_out: int
    epochs: int


@cache
def _rows(task: Task, seed: int, examples: Examples, training: bool) -> MQARRows:
    """Made once for all models of a sweep."""
    first, count = (0, examples.train) if training else (HELD_OUT, examples.held_out)
    return MQARRows(task, seed=seed, first=first, count=count, shuffled=training)


def train_recall(
    run: TrainConfig,
    task: Task,
    examples: Examples,
    *,
    enough: float = 0.99,
    say: Callable[[str], None] = print,
) -> Result:
    """Trains run.model on the task, or goes on; the accuracy on held-out examples, epoch by epoch.

    Ends early once `enough` of the answers are right, or when the loss stays not finite. A
    checkpoint is kept of every epoch, and of where a signal stopped it.

    Args:
        run: its `steps` count for the schedule and as the limit; `data` is not read.

    Raises:
        StoppedError: a signal came; the same call goes on.
        ValueError: there is no such device.
        RunError: another process trains in that folder; a checkpoint is damaged.
    """
    folder, team = Path(run.out), Team()
    device, model = pick_device(run.device, team), GSAConfig(**run.model)
    folder.mkdir(parents=True, exist_ok=True)
    with current(device), RunLock(folder), StopSignals() as stop:
        start = find_checkpoint(folder / CHECKPOINTS, say)
        train = _rows(task, run.seed, examples, True)
        held_out = _rows(task, run.seed, examples, False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")  # of MLPs of width 0
            stepper = Stepper(run, model, train, device, recall_loss(task), team)
        saver = Saver(folder / CHECKPOINTS, team, tokenizer=None, keep=1)
        history: list[dict[str, Any]] = []
        if start is not None:
            start.restore(stepper.model, stepper.optimizer, team)
            stepper.at = Progressed(**start.state["progress"])
            history = start.state["history"]
            say(f"going on from {start.folder}")
        per_epoch = run.steps // examples.epochs
        diverged = False
        while stepper.at.step < run.steps and not diverged and not _solved(history, enough):
            line = stepper.step()
            at = stepper.at
            diverged = at.skipped_in_a_row > run.nan_limit
            if at.step % per_epoch == 0 or diverged:
                accuracy = held_out_accuracy(stepper, held_out, task)
                history.append(
                    {"step": at.step, "accuracy": accuracy, "loss": line["loss"],
                     "seconds": at.seconds}
                )  # fmt: skip
                say(
                    f"  step {at.step} of {run.steps}: loss {line['loss']:.4f}, "
                    f"{accuracy:.1%} right, {at.seconds:.0f} s"
                )
            if at.step % per_epoch == 0 or stop.received:
                saver.save(
                    stepper.model,
                    stepper.optimizer,
                    {"step": at.step, "progress": asdict(at), "history": history},
                )
            if stop.received:
                raise StoppedError(stop.received)
    return {
        "accuracy": history[-1]["accuracy"],
        "diverged": diverged,
        "steps": stepper.at.step,
        "seconds": stepper.at.seconds,
        "parameters": count_parameters(model).total,
        "history": history,
    }


@torch.no_grad()
def held_out_accuracy(stepper: Stepper, rows: MQARRows, task: Task) -> float:
    """The share of answers that are the model's likeliest token."""
    right = 0
    stepper.model.eval()
    for first in range(0, rows.count, stepper.config.rows):
        batch = rows.batch(first, min(stepper.config.rows, rows.count - first))
        with stepper.precision():
            right += int(is_right(task, stepper.model, to_device(batch, stepper.device)).sum())
    stepper.model.train()
    return right / (rows.count * task.pairs)


def _solved(history: list[dict[str, Any]], enough: float) -> bool:
    return bool(history) and history[-1]["accuracy"] >= enough
