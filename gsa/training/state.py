"""Where a run stands: counters that a checkpoint keeps besides tensors."""

import math
import statistics
from dataclasses import dataclass, field

from gsa.training.validation import HeldOut

NORMS = 100
"""Steps that a gradient's norm is compared with, to tell a spike."""


@dataclass
class Progressed:
    """All of it goes into a checkpoint's state.json; the same in every process of a run."""

    step: int = 0
    position: int = 0
    """Rows consumed since the start of training."""
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    norms: list[float] = field(default_factory=list)
    """Of the gradient in the last NORMS steps that were not skipped."""
    seconds: float = 0.0
    """Time in training steps, all launches of the run together."""
    validated_step: int = 0
    val_loss: float | None = None
    val_tokens: int = 0
    best_val_loss: float | None = None
    best_val_step: int = 0

    def is_spike(self, norm: float, spike: float) -> bool:
        return len(self.norms) == NORMS and norm > spike * statistics.median(self.norms)

    def note_step(self, *, rows: int, tokens: int, norm: float | None) -> None:
        """One step more. norm: of its gradient; None if the step was skipped."""
        self.step += 1
        self.position += rows
        self.tokens += tokens
        self.skipped += norm is None
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if norm is None else 0
        if norm is not None:
            self.norms = [*self.norms, norm][-NORMS:]

    def note_validation(self, found: HeldOut) -> None:
        self.validated_step, self.val_loss, self.val_tokens = self.step, found.loss, found.tokens
        best = self.best_val_loss
        if best is None or math.isnan(best) or found.loss < best:
            self.best_val_loss, self.best_val_step = found.loss, self.step
