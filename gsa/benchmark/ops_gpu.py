"""`gsa bench ops` on a CUDA device: the operator, one-token steps and cold start, with rivals.

Device time is the median of CUDA graph replays, all contenders of a case in turns. The table is for
people; the last line printed is one JSON document, kept up to date in `out` while it runs.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from gsa.benchmark.budget import Budget
from gsa.benchmark.cases import ALL_CASES, Case, select
from gsa.benchmark.ceilings import Ceilings, measure_ceilings
from gsa.benchmark.cold_start import cold_start
from gsa.benchmark.gpu_timing import GpuMeter, cache_bytes
from gsa.benchmark.measure import Bench, measure_attention, measure_step
from gsa.benchmark.peers import NOTES, Fla, fla_version, load_fla, triton_cache_entries
from gsa.benchmark.plot import plot_results
from gsa.benchmark.results import Results
from gsa.benchmark.tables import ceilings_line, progress, tables
from gsa.benchmark.timing import Meter
from gsa.ops import Impl
from gsa.training.environment import environment

COLD_START_TIMEOUT = 300.0


@dataclass(frozen=True, kw_only=True)
class BenchGPUConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure; auto takes a CUDA device if there is one. A CPU has other options."""
    cases: tuple[str, ...] = ()
    """Groups (cold-start, step, 1.3B, Mistral-7B, table) or single cases such as "1.3B 8x2048"."""
    seconds: float = 1.0
    """Time to spend on each cell of the table."""
    peers: bool = False
    """Also measure flash-linear-attention, which must be installed."""
    max_attention: int = 131072
    """Longest T for softmax attention, whose time grows with T²; 0 leaves it out."""
    budget_seconds: float = 0.0
    """End before so many seconds: what does not fit is listed as not run. 0 sets no limit."""
    out: str = ""
    """JSON file to write, also after each case, and a plot beside it; none if empty."""

    def __post_init__(self) -> None:
        for name in ("seconds", "max_attention", "budget_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        select(self.cases)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device and its instruments; tests put a CPU's in their place."""

    device: torch.device
    impl: Impl
    meter: Meter
    cache_bytes: int
    ceilings: Callable[[], Ceilings]
    cold_start: Callable[[Case, float], dict[str, object]]
    """From a case and a timeout to seconds."""
    cases: tuple[Case, ...] = ALL_CASES
    clock: Callable[[], float] = time.monotonic


def cuda_machine() -> Machine:
    device, meter = torch.device("cuda"), GpuMeter()

    def start(case: Case, timeout: float) -> dict[str, object]:
        return cold_start(case, device="cuda", impl="triton", timeout=timeout)

    return Machine(
        device=device,
        impl="triton",
        meter=meter,
        cache_bytes=cache_bytes(),
        ceilings=partial(measure_ceilings, device, meter),
        cold_start=start,
    )


def driver() -> str | None:
    """The NVIDIA driver's version, where nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [None])[0]


def head(config: BenchGPUConfig, machine: Machine, library: Fla | str | None) -> dict[str, Any]:
    """The document before anything is measured."""
    facts = environment(machine.device) | {"driver": driver()}
    document: dict[str, Any] = {
        "benchmark": "ops-gpu",
        "command": "gsa " + " ".join(sys.argv[1:]),
        "environment": facts | {"flash-linear-attention": fla_version()},
        "config": asdict(config),
        "impl": machine.impl,
        "cache_bytes": machine.cache_bytes,
        "notes": list(NOTES),
    }
    if isinstance(library, Fla):
        facts = {"version": library.version, "import_seconds": library.import_seconds}
        document["fla"] = facts | {"triton_cache_entries_at_start": triton_cache_entries()}
    elif library is not None:
        document["fla"] = {"failed": library}
    return document


def measure_case(case: Case, machine: Machine, bench: Bench, results: Results) -> None:
    """Measures one case of whatever kind and keeps its result."""
    if case.group == "cold-start":
        timeout = min(COLD_START_TIMEOUT, bench.budget.left())
        found = machine.cold_start(case, timeout)
        results.reached(case.name, "cold_start", found)
        print(progress(case.name, found), flush=True)
    elif case.group == "step":
        row = measure_step(case, bench)
        results.reached(case.name, "steps", row)
        print(progress(case.name, row), flush=True)
    else:
        known = sum(bench.budget.first_calls.values())
        begin = machine.clock()
        row = measure_attention(case, bench)
        waited = sum(bench.budget.first_calls.values()) - known
        bench.budget.ended(begin, waited)
        results.reached(case.name, "rows", row)
        print(progress(case.name, row), flush=True)
    machine.meter.release()


def bench_ops_gpu(config: BenchGPUConfig, machine: Machine | None = None) -> dict[str, Any]:
    """Measures, prints the tables and returns the result document."""
    clock = time.monotonic if machine is None else machine.clock
    budget = Budget(config.budget_seconds, clock)  # imports of the library count
    library = load_fla() if config.peers else None
    machine = machine or cuda_machine()
    torch.manual_seed(0)
    cases = select(config.cases, machine.cases)
    results = Results(config.out, head(config, machine, library), [case.name for case in cases])
    ceilings = machine.ceilings()
    results.put("ceilings", asdict(ceilings))
    print(ceilings_line(results.document), flush=True)
    bench = Bench(
        device=machine.device,
        impl=machine.impl,
        meter=machine.meter,
        cache_bytes=machine.cache_bytes,
        budget=budget,
        seconds=config.seconds,
        max_attention=config.max_attention,
        bandwidth=ceilings.copy_bytes_per_second,
        library=library,
    )
    for case in cases:
        if not budget.allows_case():
            break
        measure_case(case, machine, bench, results)
    document = results.finish()
    print("\n" + tables(document))
    if results.path is not None:
        print(plot_beside(results.path))
    print(json.dumps(document))
    return document


def plot_beside(path: Path) -> str:
    """Draws the plot of a result beside it; says where it is, or why there is none."""
    try:
        return f"plot: {plot_results([path], path.with_suffix('.png'))}"
    except ImportError:
        return f"plot: matplotlib is not installed here; later: gsa bench plot {path}"
    except ValueError as error:
        return f"plot: none ({error})"
