"""Loss on held-out text."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from gsa.data import Batch, PackedRows, TokenShards, validation_batches
from gsa.training.config import TrainConfig
from gsa.training.objective import Objective, num_targets, to_device


class HeldOut(NamedTuple):
    """A mean loss in nats per token, over how many tokens, and the seconds it took."""

    loss: float
    tokens: int
    seconds: float


def held_out_batches(shards: TokenShards, config: TrainConfig, *, whole: bool) -> Iterable[Batch]:
    """All the text once, in order; or the same `validation_rows` rows of it every time."""
    num_rows = shards.num_tokens // config.seq_len
    if whole or num_rows <= config.validation_rows:
        return validation_batches(shards, seq_len=config.seq_len, rows=config.rows)
    rows = PackedRows(shards, seq_len=config.seq_len, seed=0)
    firsts = range(0, config.validation_rows, config.rows)
    return (rows.batch(first, min(config.rows, config.validation_rows - first)) for first in firsts)


@torch.no_grad()
def held_out_loss(
    model: Any,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    precision: Callable[[], AbstractContextManager[Any]],
    stopping: Callable[[], bool],
) -> HeldOut | None:
    """The loss over the batches; None if `stopping` came true before the end."""
    start = time.perf_counter()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    model.eval()
    try:
        for batch in batches:
            if stopping():
                return None
            with precision():
                total += float(objective(model, to_device(batch, device)))
            tokens += num_targets(batch)
    finally:
        model.train()
    return HeldOut(total / max(tokens, 1), tokens, time.perf_counter() - start)
