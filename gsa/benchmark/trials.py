"""Launches of one kernel against each other: values first, then times, then a decision."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from gsa.benchmark.budget import Budget
from gsa.benchmark.cases import Case
from gsa.benchmark.contenders import Contender, InputSet, leaf, make_inputs
from gsa.benchmark.measure import NotRunError, why
from gsa.benchmark.ops_gpu import Machine
from gsa.benchmark.timing import Prepared
from gsa.ops import Impl, gated_slot_attention
from gsa.ops.triton import sizes, table
from gsa.ops.triton.table import Row

MARGIN = 0.02
"""How much faster than the formula a launch must be, twice, to be written down."""
GROUP = 4
"""Launches timed in turns with the formula's; each holds the memory of a whole call."""
RESULTS = ("output", "d_q", "d_k", "d_v", "d_log_forget", "d_write", "d_initial_memory")


def _call(
    impl: Impl,
    cu_seqlens: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    write: Tensor | None = None,
    initial_memory: Tensor | None = None,
) -> Tensor:
    return gated_slot_attention(
        q,
        k,
        v,
        log_forget,
        write=write,
        initial_memory=initial_memory,
        cu_seqlens=cu_seqlens,
        recompute=cu_seqlens is None,
        impl=impl,
    ).output


def relative_errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """(‖actual − exact‖ / ‖exact‖, max |actual − exact| / max |exact|); NaN if `actual` has one."""
    gap, tiny = actual.to(exact) - exact, torch.finfo(exact.dtype).tiny
    return (
        float(gap.norm() / exact.norm().clamp_min(tiny)),
        float(gap.abs().max() / exact.abs().max().clamp_min(tiny)),
    )


class Trial:
    """A call that launches are tried in, its exact results, and the errors of the formula's tiles.

    inputs: per set q, k, v, log_forget and, if any, write and initial memory, d_outputs beside
    them. The first set is checked: exact is the chunked form in fp64.
    """

    def __init__(
        self,
        inputs: Sequence[tuple[Tensor, ...]],
        d_outputs: Sequence[Tensor],
        impl: Impl,
        cu_seqlens: Tensor | None = None,
    ):
        self.contender = Contender(
            inputs=[tuple(map(leaf, one)) for one in inputs],
            d_outputs=list(d_outputs),
            call=partial(_call, impl, cu_seqlens),
        )
        exact = Contender(
            inputs=[tuple(leaf(x.double()) for x in inputs[0])],
            d_outputs=[d_outputs[0].double()],
            call=partial(_call, "chunked", cu_seqlens),
        )
        self.eps = torch.finfo(inputs[0][0].dtype).eps
        self.exact = exact.results()
        with table.using(()):
            self.allowed = self.errors()

    def errors(self) -> list[tuple[float, float]]:
        found = self.contender.results()
        return [relative_errors(a, b) for a, b in zip(found, self.exact, strict=True)]

    def check(self) -> None:
        """Raises ValueError unless every result errs at most twice as much as by the formula's
        tiles, plus eps of its dtype, as a whole and at its worst."""
        for name, errors, allowed in zip(RESULTS, self.errors(), self.allowed, strict=False):
            for error, most in zip(errors, allowed, strict=True):
                if not error <= 2 * most + self.eps:
                    raise ValueError(f"{name} is off by {error:.2g}, by the formula {most:.2g}")


def _tensors(one: InputSet, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return one.q.to(dtype), one.k.to(dtype), one.v.to(dtype), one.log_forget


def timed_trial(case: Case, dtype: torch.dtype, machine: Machine) -> Trial:
    """A case of the benchmark, with as many sets of inputs as exceed the cache twice over."""
    sets = make_inputs(case, machine.device, machine.cache_bytes)
    d_outputs = [one.d_output.to(dtype) for one in sets]
    return Trial([_tensors(one, dtype) for one in sets], d_outputs, machine.impl)


def packed_trial(case: Case, dtype: torch.dtype, machine: Machine) -> Trial:
    """Packed sequences, the longest of two segments, with writes and initial memories, and memories
    kept on the way: kernels are compiled anew for all that, and a launch has to fit there, too."""
    unit = sizes.segment_tokens(True)
    bounds = torch.tensor([0, unit + 76, unit + 76, unit + 201], dtype=torch.int32)
    packed = replace(case, B=1, T=unit + 201)
    one = make_inputs(packed, machine.device, 0)[0]
    memory = (3, case.G, case.M, case.K + case.V)
    beside = (torch.rand_like(one.log_forget), torch.randn(memory, device=machine.device))
    inputs = (*_tensors(one, dtype), *beside)
    return Trial([inputs], [one.d_output.to(dtype)], machine.impl, bounds)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one key of the table."""

    default: Row
    """The formula's."""
    ms: float = 0.0
    """By the formula's, forward + backward."""
    ratios: dict[Row, float] = field(default_factory=dict)
    """Time over that by the formula's, measured in turns with it."""
    failures: dict[Row, str] = field(default_factory=dict)
    best: Row | None = None
    """What is to be written down; None for the formula."""
    unknown: str = ""
    """What was not tried, and why; empty if all was."""

    @property
    def decided(self) -> bool:
        return self.best is not None or not self.unknown


class Trials:
    """The trials of one key: `explore` is what it is for.

    settled: rows of other keys that hold meanwhile. seconds: per launch that is timed.
    """

    def __init__(
        self, default: Row, settled: Sequence[Row], machine: Machine, budget: Budget, seconds: float
    ):
        self.default, self.settled, self.machine = default, settled, machine
        self.budget, self.seconds = budget, seconds
        self.ms = 0.0
        self.ratios: dict[Row, float] = {}
        self.failures: dict[Row, str] = {}

    def ready(self, row: Row, trial: Trial) -> Prepared:
        """The call with a launch, its results checked, warm and ready to be timed."""
        own = [] if row == self.default else [row]

        def run() -> None:
            with table.using([*self.settled, *own]):
                trial.contender.forward_backward()

        with table.using([*self.settled, *own]):
            trial.check()
        return self.machine.meter.prepare(run)

    def attempts(
        self, rows: Sequence[Row], trial: Trial, timer: str
    ) -> Iterator[tuple[str, Prepared]]:
        """(name, work) of those that can be timed as the formula's; why not, in `failures`."""
        for row in rows:
            try:
                work = self.ready(row, trial)
                if work.timer != timer:
                    raise NotRunError(work.note)
            except Exception as error:  # a launch that fails is a result
                self.failures[row] = why(error)
                continue
            yield str(row.tile), work

    def race(self, rows: Sequence[Row], trial: Trial) -> dict[Row, float]:
        """Times over that by the formula's tile, of those rows that work."""
        begin = self.budget.clock()
        first = self.ready(self.default, trial)
        work = {"formula": first, **dict(self.attempts(rows, trial, first.timer))}
        timings = self.machine.meter.in_turns(work, self.seconds)
        del first, work
        self.machine.meter.release()
        self.budget.ended(begin, 0.0)
        base = timings["formula"].median
        self.ms = self.ms or base * 1e3 / trial.contender.sets
        return {
            row: timings[str(row.tile)].median / base for row in rows if str(row.tile) in timings
        }

    def confirmed(self, trial: Trial, packed: Trial) -> Row | None:
        """The fastest that is faster once more, and right about packed sequences."""
        for row in sorted(self.ratios, key=lambda row: self.ratios[row]):
            if self.ratios[row] > 1 - MARGIN:
                break
            try:
                with table.using([*self.settled, row]):
                    packed.check()
            except Exception as error:  # a launch that fails is a result
                self.failures[row] = f"packed sequences: {why(error)}"
                del self.ratios[row]
                continue
            again = self.race([row], trial).get(row)
            if again is not None and again <= 1 - MARGIN:
                return row
            if again is not None:
                self.ratios[row] = max(again, self.ratios[row])
        return None

    def survey(self, rows: Sequence[Row], trial: Trial) -> str:
        """Times all rows; says so where the budget does not allow that. Room is kept to confirm."""
        for start in range(0, len(rows), GROUP):
            if self.budget.left() < 2 * self.budget.longest_case:
                return f"{len(rows) - start} of {len(rows)} not tried: the budget"
            self.ratios |= self.race(rows[start : start + GROUP], trial)
            tried = len(self.ratios) + len(self.failures)
            best = min(self.ratios.values(), default=1.0)
            print(f"  {tried} of {len(rows)} tried, the fastest: {best:.3f} of formula", flush=True)
        return ""

    def explore(self, rows: Sequence[Row], trial: Trial, packed: Trial) -> Finding:
        """Tries all rows, as far as the budget goes."""
        best = None
        try:
            unknown = self.survey(rows, trial)
            best = self.confirmed(trial, packed)
        except Exception as error:  # the formula's launch itself, or the device
            unknown = why(error)
        return Finding(
            default=self.default,
            ms=self.ms,
            ratios=self.ratios,
            failures=self.failures,
            best=best,
            unknown=unknown,
        )
