"""Loss on held-out text."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from gsa.data import Batch, PackedRows, TokenShards, validation_batches
from gsa.training.config import TrainConfig
from gsa.training.distributed import Team
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
    team: Team,
) -> HeldOut | None:
    """The loss over the batches; None if `stopping` came true before the end in any process.

    Each process takes every world-th batch, and all add up the batches' losses in the same order:
    as long as a batch's loss has the same bits, the sum has for any number of processes.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    losses: list[float] = []
    tokens = 0
    model.eval()
    try:
        for turn in _turns(batches, team.world):
            if team.largest(stopping())[0]:
                return None
            # All compute, so that all gather the weights; past the end it is for nothing.
            batch = turn[team.rank % len(turn)]
            with precision():
                loss = float(objective(model, to_device(batch, device)))
            mine = [loss if i == team.rank else 0.0 for i in range(len(turn))]
            losses += team.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
            tokens += sum(map(num_targets, turn))
    finally:
        model.train()
        team.reshard(model)
    return HeldOut(sum(losses) / max(tokens, 1), tokens, time.perf_counter() - start)


def _turns(batches: Iterable[Batch], world: int) -> Iterator[list[Batch]]:
    """The batches, `world` at a time; the last turn may have fewer."""
    remaining = iter(batches)
    while turn := list(itertools.islice(remaining, world)):
        yield turn
