"""One token: the step's time beside reading and writing the memory once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from gsa.benchmark.cases import Case
from gsa.benchmark.contenders import InputSet, make_inputs
from gsa.benchmark.cost import memory_bytes, set_count
from gsa.benchmark.peers import Fla, gates_of_fla
from gsa.ops import Impl, gated_slot_step

STEPS = 50  # at least so many in one timed run: a single one is too short to time


@dataclass(frozen=True, kw_only=True)
class StepRun:
    """Many steps in a row, each on the next of several memories; results live for one rotation."""

    count: int
    sets: int
    step: Callable[[int], tuple[Any, ...]]
    """From the index of a set to (output, memory)."""

    def run(self) -> None:
        kept: list[object] = [None] * self.sets  # new memories go to new places, as in real use
        for index in islice(cycle(range(self.sets)), self.count):
            kept[index] = self.step(index)


def step_inputs(case: Case, device: torch.device, sets: int) -> list[InputSet]:
    """Tokens for `sets` steps."""
    return [make_inputs(case, device, cache_bytes=0)[0] for _ in range(sets)]


def _ours(
    tokens: list[InputSet],
    memories: list[Tensor],
    rows: Tensor | None,
    impl: Impl,
    inplace: bool,
    index: int,
) -> tuple[Any, ...]:
    one = tokens[index]
    return gated_slot_step(
        one.q,
        one.k,
        one.v,
        one.log_forget,
        memories[index],
        inplace=inplace,
        rows=rows,
        impl=impl,
    )


@torch.no_grad()
def _fla(
    library: Fla, inputs: list[tuple[Tensor, ...]], states: list[tuple[Tensor, Tensor]], index: int
) -> tuple[Any, ...]:
    q, k, v, s, g = inputs[index]
    return library.step(
        q=q, k=k, v=v, s=s, g=g, scale=1.0, initial_state=states[index], output_final_state=True
    )


def step_runs(
    case: Case, device: torch.device, cache_bytes: int, impl: Impl, library: Fla | None
) -> dict[str, StepRun]:
    """Ways to advance B memories by a token."""
    sets = set_count(memory_bytes(case), cache_bytes)
    count = sets * -(-STEPS // sets)
    tokens = step_inputs(case, device, sets)
    shape = (case.G, case.M, case.K + case.V)

    def memories(B: int) -> list[Tensor]:
        return [torch.randn(B, *shape, device=device) for _ in range(sets)]

    rows = torch.randperm(2 * case.B, device=device)[: case.B]
    steps: dict[str, Callable[[int], tuple[Any, ...]]] = {
        "ours": partial(_ours, tokens, memories(case.B), None, impl, False),
        "ours_in_place": partial(_ours, tokens, memories(case.B), None, impl, True),
        "ours_rows": partial(_ours, tokens, memories(2 * case.B), rows, impl, True),
    }
    if library is not None:
        inputs = [(one.q, one.k, one.v, *gates_of_fla(one.log_forget)) for one in tokens]
        states = [_states_of_fla(case, device) for _ in range(sets)]
        steps["fla"] = partial(_fla, library, inputs, states)
    return {name: StepRun(count=count, sets=sets, step=step) for name, step in steps.items()}


def _states_of_fla(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    B, G, K, V, M = case.B, case.G, case.K, case.V, case.M
    return (
        torch.randn(B, G, K, M, device=device),
        torch.randn(B, G, M, V, device=device),
    )
