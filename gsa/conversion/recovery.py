"""How much of a teacher its student has: both read the same held-out text and answer questions."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gsa.conversion.objectives import FrozenTeacher, hidden_states
from gsa.conversion.recall import CHANCE, Questions, Recall, recall
from gsa.data import TokenShards, validation_batches
from gsa.model.loss import IGNORE, next_tokens
from gsa.training.distributed import Team
from gsa.training.objective import num_targets, to_device

TOKENS_AT_ONCE = 16384
"""That both read in one pass; of their logits a row's are held at a time."""
BRANCHES = {"slots alone": 0.0, "window alone": 1.0}
"""Of a layer with both: what is left, and the window's share then."""


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


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was measured of a student, or of one of its branches; None where nothing was asked."""

    recovery: Recovery | None = None
    recall: Recall | None = None

    def to_dict(self) -> dict[str, Any]:
        found = {} if self.recovery is None else self.recovery.to_dict()
        return found if self.recall is None else found | {"recall": self.recall.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A student beside its teacher.

    branches: of a student with a window beside its slots, each branch without the other.
    """

    student: Finding
    teacher_recall: Recall | None
    branches: dict[str, Finding]

    def to_dict(self) -> dict[str, Any]:
        found = self.student.to_dict()
        if self.teacher_recall is not None:
            found["teacher_recall"] = self.teacher_recall.to_dict()
        if self.branches:
            found["branches"] = {name: one.to_dict() for name, one in self.branches.items()}
        return found

    def table(self) -> str:
        """All of it as a table in Markdown, with what it says about chance below."""
        distances = [] if self.teacher_recall is None else list(self.teacher_recall.shares)
        heads = ["perplexity", "× the teacher's", "divergence", "same token first"]
        heads = heads if self.student.recovery else []
        heads += [f"recall at {distance}" for distance in distances]
        lines = [f"| | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
        read = self.student.recovery
        cells = [] if read is None else [f"{read.perplexities[1]:.3f}", "1", "0", "100.0%"]
        lines.append(_row("teacher", [*cells, *_shares(self.teacher_recall)]))
        for name, one in {"student": self.student, **self.branches}.items():
            lines.append(_row(name, [*_cells(one.recovery), *_shares(one.recall)]))
        if not distances:
            return "\n".join(lines)
        assert self.teacher_recall is not None
        said = (
            f"Recall: of {self.teacher_recall.texts} texts, how often the answer to a question "
            "comes first, so many tokens after the fact was stated; naming any of the answers in "
            f"sight is right in {CHANCE:.0%}."
        )
        return "\n".join(lines) + f"\n\n{said}"


def compare(
    student: Any,
    teacher: FrozenTeacher,
    held_out: TokenShards | None,
    questions: list[Questions],
    *,
    most_tokens: int,
    team: Team,
) -> Comparison:
    """Both on the first rows of the held-out text, about `most_tokens` of them, and on questions.

    held_out: None for no text to read. questions: may be none.
    """

    def finding() -> Finding:
        read = None
        if held_out is not None:
            read = recovery(student, teacher, held_out, most_tokens=most_tokens, team=team)
        return Finding(recovery=read, recall=_recall(student, teacher, questions, team))

    both, branches = finding(), {}
    if _windows(student):
        for name, share in BRANCHES.items():
            with _window_share(student, share):
                branches[name] = finding()
    theirs = _recall(teacher.model, teacher, questions, team)
    return Comparison(student=both, teacher_recall=theirs, branches=branches)


@torch.no_grad()
def recovery(
    student: Any, teacher: FrozenTeacher, held_out: TokenShards, *, most_tokens: int, team: Team
) -> Recovery:
    """Both on the first rows of the held-out text, about `most_tokens` of them.

    Rows and documents begin anew, as in training. Each process reads every world-th batch of rows.
    """
    was_training, device = student.training, torch.device(teacher.device)
    student.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    try:
        rows = max(1, min(TOKENS_AT_ONCE, most_tokens) // teacher.seq_len)
        batches = validation_batches(held_out, seq_len=teacher.seq_len, rows=rows)
        for number, batch in enumerate(batches):
            tokens += num_targets(batch)
            if number % team.world == team.rank:
                sums += _read(student, teacher, to_device(batch, device)).cpu()
            if tokens >= most_tokens:
                break
    finally:
        student.train(was_training)
    if not tokens:
        raise ValueError("validation: expected text with at least one token to predict")
    own, theirs, kl, same = (team.sum(sums) / tokens).tolist()
    return Recovery(tokens=tokens, student=own, teacher=theirs, kl=kl, agreement=same)


def _read(student: Any, teacher: FrozenTeacher, batch: Any) -> Tensor:
    targets = next_tokens(batch.labels)[0]
    sums = torch.zeros(4, dtype=torch.float64, device=targets.device)
    with _precision(teacher):
        own = hidden_states(student, batch)
        theirs = teacher.hidden(batch)
        for first in range(0, len(targets), teacher.seq_len):
            part = slice(first, first + teacher.seq_len)
            counts = targets[part] != IGNORE
            logits = own[part][counts] @ student.lm_head.weight.T
            wanted = theirs[part][counts] @ teacher.head_WD.T
            sums += _measures(logits, wanted, targets[part][counts])
    return sums


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


def _recall(
    model: Any, teacher: FrozenTeacher, questions: list[Questions], team: Team
) -> Recall | None:
    if not questions:
        return None
    with _precision(teacher):
        return recall(model, questions, team)


def _precision(teacher: FrozenTeacher) -> torch.autocast:
    device = torch.device(teacher.device).type
    return torch.autocast(device, torch.bfloat16, enabled=teacher.dtype == torch.bfloat16)


def _windows(student: Any) -> list[Any]:
    """Token mixers with a window beside their slots."""
    mixers = (block.attn for block in student.model.layers)
    return [one for one in mixers if getattr(one.options, "window_branch", None) is not None]


@contextmanager
def _window_share(student: Any, share: float) -> Iterator[None]:
    """Meanwhile windows have that share, 0 or 1, whatever was learned."""
    try:
        for mixer in _windows(student):
            mixer.window_share = share
        yield
    finally:
        for mixer in _windows(student):
            mixer.window_share = None


def _cells(found: Recovery | None) -> list[str]:
    if found is None:
        return []
    student, teacher = found.perplexities
    ratio = f"{student / teacher:.3f}"
    return [f"{student:.3f}", ratio, f"{found.kl:.4f}", f"{found.agreement:.1%}"]


def _shares(found: Recall | None) -> list[str]:
    return [] if found is None else [f"{share:.0%}" for share in found.shares.values()]


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"
