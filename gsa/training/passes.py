"""Forward and backward passes of a step: as they come, or recorded as a CUDA graph and replayed."""

from collections.abc import Callable

import torch
from torch import Tensor

from gsa.data import Batch
from gsa.ops import check_cu_seqlens
from gsa.training.errors import RunError
from gsa.training.objective import to_device
from gsa.training.optimizer import Optimizers

Pass = Callable[[Batch, Tensor, bool], Tensor]
"""(batch and the step's number of targets, both on the device, whether it is the step's last) → the
batch's share of the step's loss, a scalar without gradient, once gradients have been added to."""

WARM_UP = 3
"""Passes before one is recorded: they compile kernels, and choose among them."""


class Passes:
    """Passes of steps, and the gradients that they leave."""

    def __init__(self, run: Pass, optimizer: Optimizers, device: torch.device) -> None:
        self.run, self.optimizer, self.device = run, optimizer, device

    def __call__(self, batches: list[Batch], targets: int) -> Tensor:
        """The step's loss, its gradients added up from nothing."""
        loss = torch.zeros((), device=self.device)
        count = torch.full((), float(targets), device=self.device)
        for number, batch in enumerate(batches, 1):
            loss += self.run(to_device(batch, self.device), count, number == len(batches))
        return loss

    def clear(self) -> None:
        """Lets the gradients go."""
        self.optimizer.zero_grad()


class RecordedPasses(Passes):
    """The same, bit for bit, with a launch for a pass where there were thousands.

    The first `WARM_UP` passes run as they come. The next is recorded, on a batch at fixed
    addresses, and from then on replayed on batches that are copied there. So the tokens of a pass
    are always as many, and its sequences are made so by empty ones at the end; where they still are
    too many, it begins anew. Gradients keep their addresses, too: the first pass of a step writes
    them, others add to them.
    """

    def __init__(self, run: Pass, optimizer: Optimizers, device: torch.device) -> None:
        super().__init__(run, optimizer, device)
        self.stream = torch.cuda.Stream(device)
        self.targets = torch.ones((), device=device)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.fixed: Batch | None = None
        self.warm = 0
        self.graphs: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []

    def __call__(self, batches: list[Batch], targets: int) -> Tensor:
        if self.fixed is not None and not all(fits(batch, self.fixed) for batch in batches):
            self.optimizer.zero_grad()
            self._begin_anew()
        if self.fixed is None:
            most = max(batches, key=lambda batch: len(batch.cu_seqlens))
            self.fixed = fixed_batch(most, self.device)
        self.targets.fill_(targets)
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            refill(self.fixed, batch)
            loss += self._pass(self.fixed, second=number > 0)
        return loss

    def _pass(self, fixed: Batch, *, second: bool) -> Tensor:
        if self.warm < WARM_UP:
            self.warm += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                part = self.run(fixed, self.targets, True)
            torch.cuda.current_stream().wait_stream(self.stream)
            return part
        if not self.graphs and second:  # this step's gradients are not where a graph has them
            return self.run(fixed, self.targets, True)
        if len(self.graphs) <= second:
            self._record(fixed)
        graph, part = self.graphs[second]
        graph.replay()
        return part

    def _record(self, fixed: Batch) -> None:
        """The first graph finds no gradients and makes them; the second adds to them."""
        if not self.graphs:
            self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        pool = self.graphs[0][0].pool() if self.graphs else None
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                part = self.run(fixed, self.targets, True)
        except RuntimeError as error:
            raise RunError(
                f"cuda_graph: this pass cannot be recorded as a CUDA graph ({error}); the same "
                "command without it goes on from the newest checkpoint"
            ) from error
        self.graphs.append((graph, part))

    def clear(self) -> None:
        if not self.graphs:
            super().clear()


def fixed_batch(batch: Batch, device: torch.device) -> Batch:
    """Room on `device` for batches like this one, and for half as many sequences more."""
    sequences = len(batch.cu_seqlens) - 1
    room = -(-(sequences + sequences // 2) // 32) * 32
    return batch._replace(
        input_ids=torch.zeros_like(batch.input_ids, device=device),
        labels=torch.zeros_like(batch.labels, device=device),
        cu_seqlens=torch.zeros(room + 1, dtype=batch.cu_seqlens.dtype, device=device),
    )


def fits(batch: Batch, fixed: Batch) -> bool:
    """Whether the batch can be copied to where the fixed one is."""
    same = batch.input_ids.shape == fixed.input_ids.shape and batch.max_seqlen == fixed.max_seqlen
    return same and len(batch.cu_seqlens) <= len(fixed.cu_seqlens)


def refill(fixed: Batch, batch: Batch) -> None:
    """Copies a batch to where the fixed one is; sequences that it has less are empty, at the end.

    ValueError for boundaries that make no sense: on the device nobody looks at them any more.
    """
    tokens = batch.input_ids.shape[1]
    check_cu_seqlens(batch.cu_seqlens, tokens)
    bounds = torch.full((len(fixed.cu_seqlens),), tokens, dtype=fixed.cu_seqlens.dtype)
    bounds[: len(batch.cu_seqlens)] = batch.cu_seqlens
    fixed.input_ids.copy_(batch.input_ids, non_blocking=True)
    fixed.labels.copy_(batch.labels, non_blocking=True)
    fixed.cu_seqlens.copy_(bounds, non_blocking=True)
