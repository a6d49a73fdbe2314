"""Objectives: functions of a model and a batch that return a summed loss and a count of tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gsa.data import Batch
from gsa.data.packing import IGNORE

Objective = Callable[[Any, Batch], Tensor]
"""(model, batch) → the loss summed over the batch's `num_targets`, a scalar that has a gradient.

A sum, not a mean: the loop divides by the targets of the whole step, however it was cut up.
"""


def num_targets(batch: Batch) -> int:
    """How many tokens of the batch are predicted: labels that count, but the very first."""
    return int((batch.labels[:, 1:] != IGNORE).sum())


def next_token(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of each next token in nats, summed, within documents and rows."""
    output = model(
        input_ids=batch.input_ids,
        labels=batch.labels,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        num_items_in_batch=1,
        loss_only=True,
    )
    return output.loss


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tokens on `device`; boundaries stay on the CPU, where they are checked."""
    if device.type == "cpu":
        return batch
    return batch._replace(
        input_ids=batch.input_ids.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
    )
