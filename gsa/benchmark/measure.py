"""One case on one device: who takes part, their values checked, their times side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gsa.benchmark.budget import Budget, OutOfTimeError, time_limit
from gsa.benchmark.cases import Case
from gsa.benchmark.contenders import Contender, make_inputs, ours, sdpa
from gsa.benchmark.cost import attention_bytes, step_bytes
from gsa.benchmark.peers import Fla, fla_contender
from gsa.benchmark.steps import StepRun, step_runs
from gsa.benchmark.timing import Meter, Prepared, Timing
from gsa.ops import Impl

Mode = Literal["forward", "forward_backward"]
MODES: tuple[Mode, ...] = ("forward", "forward_backward")
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a run measures with."""

    device: torch.device
    impl: Impl
    meter: Meter
    cache_bytes: int
    budget: Budget
    seconds: float
    max_attention: int
    bandwidth: float
    """Bytes per second of a copy, read and written."""
    library: Fla | str | None
    """fla; why it cannot be had; None if it is not wanted."""


class NotRunError(Exception):
    """A contender is left out of a case, and the message says why."""


def why(error: Exception) -> str:
    """One line for the result document."""
    if isinstance(error, NotRunError):
        return str(error)
    lines = str(error).strip().splitlines() or ["no message"]
    return f"failed: {type(error).__name__}: {lines[0]}"


def entrants(case: Case, bench: Bench) -> dict[str, Callable[[], Contender]]:
    """How each contender of a case is made; those that cannot take part raise NotRunError."""
    sets = make_inputs(case, bench.device, bench.cache_bytes)
    library = bench.library

    def attention() -> Contender:
        if bench.max_attention < case.T:
            raise NotRunError(f"not run: T = {case.T} is above max_attention")
        return sdpa(case, sets)

    def fla() -> Contender:
        if not isinstance(library, Fla):
            raise NotRunError(str(library))
        return fla_contender(case, sets, library)

    made = {
        "ours": lambda: ours(sets, bench.impl, recompute=True),
        "ours_saved": lambda: ours(sets, bench.impl, recompute=False),
        "sdpa": attention,
    }
    return made if library is None else made | {"fla": fla}


def first_call(case: Case, name: str, contender: Contender, bench: Bench) -> float:
    """Seconds of the first forward and backward. The library's is held to the budget."""
    if name != "fla":
        return bench.meter.first_call(contender.forward_backward)
    budget = bench.budget
    seconds, reason = budget.for_first_call(case)
    if reason:
        raise NotRunError(reason)
    print(f"  {name}: first call (it tunes its kernels: minutes at a new shape) …", flush=True)
    begin = budget.clock()
    try:
        with time_limit(seconds):
            taken = bench.meter.first_call(contender.forward_backward)
    except OutOfTimeError:
        taken = budget.clock() - begin
        budget.note_first_call(case, taken, done=False)
        raise NotRunError(f"cut off after {taken:.0f} s of its first call: the budget") from None
    budget.note_first_call(case, taken, done=True)
    return taken


def enter(
    case: Case, name: str, contender: Contender, bench: Bench, reference: torch.Tensor | None
) -> tuple[dict[str, Any], torch.Tensor]:
    """(facts, output) of a contender that works: first call, finite values, memory."""
    seconds = first_call(case, name, contender, bench)
    results = contender.results()
    for place, tensor in enumerate(results):
        if not bool(torch.isfinite(tensor).all()):
            label = f"gradient of input {place}" if place else "output"
            raise ValueError(f"{label} is not finite")
    output = results[0]
    del results
    facts: dict[str, Any] = {
        "first_call_seconds": round(seconds, 3),
        "input_sets": contender.sets,
        "inputs_mib": round(contender.set_bytes() / MIB, 1),
        "peak_mib": round(bench.meter.peak_bytes(contender.forward_backward) / MIB, 1),
    }
    facts["peak_with_inputs_mib"] = round(facts["peak_mib"] + facts["inputs_mib"], 1)
    if name == "fla" and reference is not None:
        difference = (output.float() - reference.float()).norm() / reference.float().norm()
        facts["output_differs_from_ours"] = round(float(difference), 6)
    return facts, output


def prepared(
    runs: dict[str, Callable[[], object]], bench: Bench, missing: dict[str, str]
) -> dict[str, Prepared]:
    """What can be timed; a contender that fails now moves to `missing`."""
    work = {}
    for name, run in runs.items():
        try:
            work[name] = bench.meter.prepare(run)
        except Exception as error:  # a rival's failure is a result
            missing[name] = why(error)
    return work


def time_cell(timing: Timing, work: Prepared, *, unit: str, factor: float) -> dict[str, Any]:
    """A timing in `unit`s: seconds times `factor`."""
    cell: dict[str, Any] = {
        unit: float(f"{timing.median * factor:.5g}"),
        f"fastest_{unit}": float(f"{timing.fastest * factor:.5g}"),
        f"slowest_{unit}": float(f"{timing.slowest * factor:.5g}"),
        "replays": timing.calls,
        "timer": work.timer,
    }
    return cell | {"note": work.note} if work.note else cell


def over_ours(cells: dict[str, dict[str, Any]], unit: str) -> None:
    """Adds how many times longer each takes than ours."""
    if "ours" in cells:
        for cell in cells.values():
            cell["over_ours"] = round(cell[unit] / cells["ours"][unit], 3)


def time_mode(
    mode: Mode,
    contenders: dict[str, Contender],
    bench: Bench,
    floor_bytes: int,
    missing: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Device time in turns, then wall time one by one."""
    runs: dict[str, Callable[[], object]] = {
        name: contender.forward if mode == "forward" else contender.forward_backward
        for name, contender in contenders.items()
        if mode == "forward_backward" or contender.forward_too
    }
    work = prepared(runs, bench, missing)
    cells = {}
    for name, timing in bench.meter.in_turns(work, bench.seconds).items():
        sets = contenders[name].sets
        cell = time_cell(timing, work[name], unit="ms", factor=1e3 / sets)
        wall = bench.meter.eager(runs[name], bench.seconds / 4)
        cell["eager_ms"] = float(f"{wall * 1e3 / sets:.5g}")
        if name != "sdpa":  # its bytes are others
            seconds = timing.median / sets
            cell["floor_fraction"] = round(floor_bytes / bench.bandwidth / seconds, 4)
            cell["floor_gb_per_s"] = round(floor_bytes / seconds / 1e9, 1)
        cells[name] = cell
    over_ours(cells, "ms")
    return cells


def measure_attention(case: Case, bench: Bench) -> dict[str, Any]:
    """A row of the result: forward, and forward + backward, of all who take part."""
    missing: dict[str, str] = {}
    contenders: dict[str, Contender] = {}
    facts: dict[str, dict[str, Any]] = {}
    reference = None
    for name, make in entrants(case, bench).items():
        try:
            contender = make()
            facts[name], output = enter(case, name, contender, bench, reference)
        except Exception as error:  # a rival's failure is a result
            missing[name] = why(error)
            continue
        contenders[name] = contender
        reference = output if name == "ours" else reference
        del output
    del reference
    bytes_moved = attention_bytes(case)
    floors = {"forward": bytes_moved.forward, "forward_backward": bytes_moved.forward_backward}
    for mode in MODES:
        for name, cell in time_mode(mode, contenders, bench, floors[mode], missing).items():
            facts[name][mode] = cell
    return {
        "case": case.name,
        "group": case.group,
        "sizes": case.sizes(),
        "floor_bytes": floors,
        "floor_ms": {mode: to_floor(floors[mode], bench, 1e3) for mode in MODES},
        "contenders": facts,
        "missing": missing,
    }


def to_floor(moved: int, bench: Bench, factor: float) -> float:
    return float(f"{moved / bench.bandwidth * factor:.5g}")


def measure_step(case: Case, bench: Bench) -> dict[str, Any]:
    """A row of the result: one token, in microseconds, the ways to take it side by side."""
    library = bench.library if isinstance(bench.library, Fla) else None
    missing = {"fla": bench.library} if isinstance(bench.library, str) else {}
    steps: dict[str, StepRun] = {}
    made = step_runs(case, bench.device, bench.cache_bytes, bench.impl, library)
    for name, step in made.items():
        try:
            output = step.step(0)[0]
            if not bool(torch.isfinite(output).all()):
                raise ValueError("output is not finite")
            steps[name] = step
        except Exception as error:  # a rival's failure is a result
            missing[name] = why(error)
    runs: dict[str, Callable[[], object]] = {name: step.run for name, step in steps.items()}
    work = prepared(runs, bench, missing)
    floor = to_floor(step_bytes(case), bench, 1e6)
    cells = {}
    for name, timing in bench.meter.in_turns(work, bench.seconds).items():
        count = steps[name].count
        cell = time_cell(timing, work[name], unit="us", factor=1e6 / count)
        wall = bench.meter.eager(runs[name], bench.seconds / 4)
        cell["eager_us"] = float(f"{wall * 1e6 / count:.5g}")
        cell["over_floor"] = round(cell["us"] / floor, 3)
        cells[name] = cell | {"steps_per_replay": count, "memories": steps[name].sets}
    over_ours(cells, "us")
    return {
        "case": case.name,
        "sizes": case.sizes(),
        "floor_us": floor,
        "ways": cells,
        "missing": missing,
    }
