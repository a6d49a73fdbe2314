"""The loss of next tokens, with logits or without ever holding them all."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""The label that is left out (Hugging Face's convention)."""

CHUNK_LOGITS = 1 << 27
"""Logits that `linear_cross_entropy` holds at a time: 256 MiB of bf16."""


def next_token_loss(
    logits_BTW: Tensor, labels_BT: Tensor, num_items_in_batch: int | Tensor | None = None
) -> Tensor:
    """Cross-entropy of token t+1 under the logits at t, in fp32, without labels of -100.

    The mean over labels; or their sum over num_items_in_batch, if that is given.
    """
    targets = next_tokens(labels_BT).to(logits_BTW.device)
    logits = logits_BTW.float() if logits_BTW.dtype != torch.float64 else logits_BTW
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / _items(targets, num_items_in_batch)


def next_token_loss_of_hidden(
    hidden_BTD: Tensor,
    head_WD: Tensor,
    labels_BT: Tensor,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """`next_token_loss` of logits = hidden · headᵀ, by `linear_cross_entropy`."""
    targets = next_tokens(labels_BT).to(hidden_BTD.device)
    total = linear_cross_entropy(hidden_BTD.flatten(0, 1), head_WD, targets.flatten())
    return total / _items(targets, num_items_in_batch)


def next_tokens(labels_BT: Tensor) -> Tensor:
    """What each token is to predict: the label after it, -100 after the last."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)


def _items(targets: Tensor, given: int | Tensor | None) -> int | Tensor:
    if given is None:
        return (targets != IGNORE).sum().clamp(min=1)
    return given.to(targets.device) if isinstance(given, Tensor) else given


def linear_cross_entropy(hidden_ND: Tensor, head_WD: Tensor, targets_N: Tensor) -> Tensor:
    """Σ over tokens of the cross-entropy of softmax(hidden · headᵀ), in nats: a scalar in fp32.

    Computes with logits of some tokens at a time and their gradients at once, so that memory does
    not grow with tokens × vocabulary: `CHUNK_LOGITS`. Products are in hidden's dtype, or that of
    autocast; the gradient of the head is summed over chunks in fp32. fp64 stays fp64. A gradient of
    a gradient is not to be had.

    Args:
        hidden_ND: N tokens of width D.
        head_WD: the head's weight, of W words.
        targets_N: int64; -100 is left out.
    """
    measure = _compiled(_errors) if hidden_ND.is_cuda else _errors
    return _linear_loss(hidden_ND, head_WD, lambda logits, part: measure(logits, targets_N[part]))


def linear_kl(
    hidden_ND: Tensor,
    head_WD: Tensor,
    teacher_NE: Tensor,
    teacher_head_WE: Tensor,
    counts_N: Tensor,
) -> Tensor:
    """Σ over tokens of KL(p ‖ q), in nats: p the teacher's softmax, q that of hidden · headᵀ.

    Neither's logits are ever all there: as in `linear_cross_entropy`. The teacher gets no gradient.

    Args:
        teacher_NE, teacher_head_WE: the teacher's tokens and head, of width E and W words.
        counts_N: bool; what is false is left out.
    """
    measure = _compiled(_divergences) if hidden_ND.is_cuda else _divergences
    teacher, teacher_head = teacher_NE.detach(), teacher_head_WE.detach()

    def measured(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return measure(logits, teacher[part] @ teacher_head.mT, counts_N[part])

    return _linear_loss(hidden_ND, head_WD, measured)


Measure = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(logits of some tokens, which) → (their summed loss, its gradient by the logits)."""


def _linear_loss(hidden_ND: Tensor, head_WD: Tensor, measure: Measure) -> Tensor:
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # Asked here: inside, gradients are off, and a tensor that could have one says so even if not.
    wanted = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_WD.requires_grad)
    with torch.autocast(device, enabled=False):
        dtype = dtype or hidden_ND.dtype
        return _LinearLoss.apply(hidden_ND.to(dtype), head_WD.to(dtype), measure, wanted)  # pyright: ignore


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, measure: Measure, wanted: bool) -> Tensor:
        sums = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = hidden.new_zeros((), dtype=sums)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_head = torch.zeros_like(head, dtype=sums) if wanted else None
        chunk = max(1, CHUNK_LOGITS // head.shape[0])
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            loss, errors = measure(hidden[part] @ head.mT, part)
            total += loss
            if d_hidden is not None and d_head is not None:
                torch.mm(errors, head, out=d_hidden[part])
                d_head += _product(errors.mT, hidden[part], sums)
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * d_total.to(d_hidden.dtype), d_head * d_total.to(d_head.dtype), None, None


def _errors(logits_NW: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(summed loss, its gradient by the logits in their dtype)."""
    sums = torch.float64 if logits_NW.dtype == torch.float64 else torch.float32
    counts = targets_N != IGNORE
    places = targets_N.clamp(min=0)[:, None]
    log_p = torch.log_softmax(logits_NW.to(sums), 1)
    loss = -(log_p.gather(1, places).squeeze(1) * counts).sum()
    words = torch.arange(logits_NW.shape[1], device=logits_NW.device)
    errors = (log_p.exp() - (words == places).to(sums)) * counts[:, None]
    return loss, errors.to(logits_NW.dtype)


def _divergences(logits_NW: Tensor, teacher_NW: Tensor, counts_N: Tensor) -> tuple[Tensor, Tensor]:
    """(summed KL of the teacher from the student, its gradient by the student's logits)."""
    sums = torch.float64 if logits_NW.dtype == torch.float64 else torch.float32
    log_q = torch.log_softmax(logits_NW.to(sums), 1)
    log_p = torch.log_softmax(teacher_NW.to(sums), 1)
    p = log_p.exp()
    loss = ((p * (log_p - log_q)).sum(1) * counts_N).sum()
    return loss, ((log_q.exp() - p) * counts_N[:, None]).to(logits_NW.dtype)


@cache
def _compiled(measure: Any) -> Any:
    """The same in two passes over the logits, where the plain form takes a dozen."""
    return torch.compile(measure, dynamic=True)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a · b in `dtype`, which the device's matrix unit sums in anyway."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
