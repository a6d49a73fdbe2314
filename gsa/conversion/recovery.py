"""How much of a teacher its student has: both read the same held-out text."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gsa.conversion.objectives import FrozenTeacher
from gsa.data import TokenShards, validation_batches
from gsa.model.loss import IGNORE, next_tokens
from gsa.training.objective import to_device


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Means over the next tokens of held-out text."""

    tokens: int
    student: float
    """Cross-entropy in nats."""
    teacher: float
    kl: float
    """KL(teacher ‖ student) in nats."""
    agreement: float
    """Share of tokens that both put first."""

    @property
    def perplexities(self) -> tuple[float, float]:
        """(student's, teacher's)"""
        return math.exp(self.student), math.exp(self.teacher)

    def to_dict(self) -> dict[str, Any]:
        student, teacher = self.perplexities
        return asdict(self) | {"student_perplexity": student, "teacher_perplexity": teacher}

    def __str__(self) -> str:
        student, teacher = self.perplexities
        return (
            f"perplexity {student:.3f}, the teacher's {teacher:.3f} ({student / teacher:.3f} ×); "
            f"divergence {self.kl:.4f} nats; the same token first in {self.agreement:.1%} "
            f"({self.tokens:,} tokens)"
        )


@torch.no_grad()
def recovery(
    student: Any, teacher: FrozenTeacher, held_out: TokenShards, *, most_tokens: int
) -> Recovery:
    """Both on the first rows of the held-out text, about `most_tokens` of them.

    Rows and documents begin anew, as in training. Logits of one row are held at a time.
    """
    was_training, device = student.training, torch.device(teacher.device)
    student.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    try:
        for batch in validation_batches(held_out, seq_len=teacher.seq_len, rows=1):
            batch = to_device(batch, device)
            targets = next_tokens(batch.labels)[0]
            counts = targets != IGNORE
            autocast = torch.autocast(
                device.type, torch.bfloat16, enabled=teacher.dtype == torch.bfloat16
            )
            with autocast:
                own = student(input_ids=batch.input_ids, cu_seqlens=batch.cu_seqlens).logits[0]
                theirs = teacher.hidden(batch) @ teacher.head_WD.T
            sums += _measures(own[counts], theirs[counts], targets[counts]).cpu()
            tokens += int(counts.sum())
            if tokens >= most_tokens:
                break
    finally:
        student.train(was_training)
    if not tokens:
        raise ValueError("validation: expected text with at least one token to predict")
    own, theirs, kl, same = (sums / tokens).tolist()
    return Recovery(tokens=tokens, student=own, teacher=theirs, kl=kl, agreement=same)


def _measures(own_NW: Tensor, theirs_NW: Tensor, targets_N: Tensor) -> Tensor:
    """Sums of both cross-entropies, the divergence, and the tokens that both put first."""
    log_q, log_p = (x.float().log_softmax(1) for x in (own_NW, theirs_NW))
    parts = (
        F.nll_loss(log_q, targets_N, reduction="sum"),
        F.nll_loss(log_p, targets_N, reduction="sum"),
        F.kl_div(log_q, log_p, reduction="sum", log_target=True),
        (log_q.argmax(1) == log_p.argmax(1)).sum(),
    )
    return torch.stack([part.double() for part in parts])
