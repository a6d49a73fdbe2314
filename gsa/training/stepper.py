"""One optimizer step after another on rows that come by position: what a training run repeats."""

import math
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gsa.data import Batch, Rows
from gsa.model import GSAConfig
from gsa.training.config import TrainConfig
from gsa.training.distributed import Team, whole
from gsa.training.gauge import Gauge
from gsa.training.objective import Objective, num_targets
from gsa.training.optimizer import build_optimizer
from gsa.training.passes import Passes, RecordedPasses
from gsa.training.schedule import learning_rate
from gsa.training.setup import build_model
from gsa.training.state import Progressed


class Stepper:
    """Model, optimizer, rows and counters of one run; of several processes, one's share of them."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: GSAConfig,
        rows: Rows,
        device: torch.device,
        objective: Objective,
        team: Team,
    ) -> None:
        self.config = config
        self.rows = rows
        self.device = device
        self.objective = objective
        self.team = team
        self.model = build_model(config, model_config, device, team)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, config)
        passes = RecordedPasses if config.cuda_graph else Passes
        self.passes = passes(self._pass, self.optimizer, device)
        self.gauge = Gauge(config, model_config, device, team.world)
        self.at = Progressed()

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
        loss, norm = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        lr = learning_rate(config, at.step + 1)
        finite = math.isfinite(loss) and math.isfinite(norm)
        skip = not finite or at.is_spike(norm, config.spike)
        if not skip:
            self.optimizer.step(lr)
        self.passes.clear()
        tokens = team.world * sum(batch.input_ids.numel() for batch in batches)
        rows = config.rows * config.accumulation
        at.note_step(rows=rows, tokens=tokens, norm=None if skip else norm)
        seconds = time.perf_counter() - started
        at.seconds += seconds
        return {
            "step": at.step,
            "loss": loss,
            "ppl": torch.tensor(loss).exp().item(),
            "lr": lr,
            "grad_norm": norm,
            "tokens": at.tokens,
            "skipped": at.skipped,
            "data_wait": data_wait,
            **self.gauge.readings(step=at.step, tokens=tokens, seconds=seconds, total=at.seconds),
        }

    def _backward(self, batches: list[Batch], targets: int) -> tuple[Tensor, Tensor]:
        """(loss, norm of the gradient) of the whole step, which all processes agree on."""
        loss = self.passes(batches, targets)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        return self.team.sum(loss), self.team.as_first(whole(norm))

    def _pass(self, batch: Batch, targets: Tensor, last: bool) -> Tensor:
        self.team.reduce_over_hosts(self.model, last)
        with self.precision():
            part = self.objective(self.model, batch) / targets
        part.backward()
        return part.detach()

    def precision(self) -> AbstractContextManager[Any]:
        enabled = self.config.dtype == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)
