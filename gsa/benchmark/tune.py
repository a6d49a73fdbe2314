"""`gsa bench tune`: rows of the launch table, measured on this GPU.

Kernel by kernel, launches near the formula's are held to its values and timed in turns with it, as
CUDA graphs of the operator's forward and backward pass. One that is not faster is not written. The
tables printed are for people; the last line is one JSON document, the rows.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gsa.benchmark.budget import Budget
from gsa.benchmark.cases import ATTENTION_CASES, Case, select
from gsa.benchmark.measure import why
from gsa.benchmark.ops_gpu import Machine, cuda_machine
from gsa.benchmark.tables import aligned
from gsa.benchmark.trials import Finding, Trial, Trials, packed_trial, timed_trial
from gsa.ops import describe_impl
from gsa.ops.triton import sizes, table
from gsa.ops.triton.op import MAX_SLOTS
from gsa.ops.triton.table import KERNELS, Row
from gsa.training.environment import device_name
from gsa.training.files import write_text


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    cases: tuple[str, ...] = ()
    """Groups (1.3B, Mistral-7B, table) or single cases such as "1.3B 4x4096"; all if empty."""
    sizes: tuple[int, ...] = ()
    """H G K V M of one shape, in place of cases."""
    batch: int = 4
    """B, sequences to measure `sizes` with."""
    tokens: int = 4096
    """T, their length; the scan runs above 2048 only."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of queries, keys and values."""
    seconds: float = 0.3
    """Time to spend on each launch."""
    budget_seconds: float = 0.0
    """End before about so many seconds: what is not decided by then stays. 0 sets no limit."""
    out: str = ""
    """Launch table to write, or to extend, after each shape; rows are only printed if empty."""

    def __post_init__(self) -> None:
        for name in ("seconds", "budget_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("batch", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.sizes:
            fits = (
                len(self.sizes) == 5 and min(self.sizes) > 0 and not self.sizes[0] % self.sizes[1]
            )
            if not fits or self.sizes[4] > MAX_SLOTS:
                expected = f"H G K V M, above 0, H a multiple of G, M at most {MAX_SLOTS}"
                raise ValueError(f"sizes: expected {expected}, got {list(self.sizes)}")
            if self.cases:
                raise ValueError("sizes: expected either cases or sizes, got both")
        select(self.cases, ATTENTION_CASES)

    def chosen(self, cases: tuple[Case, ...]) -> list[Case]:
        """What to measure, of these or by `sizes`."""
        if not self.sizes:
            return select(self.cases, cases)
        H, G, K, V, M = self.sizes
        name = f"H={H} G={G} K={K} V={V} M={M} {self.batch}x{self.tokens}"
        made = Case(group="sizes", name=name, H=H, G=G, K=K, V=V, M=M, B=self.batch, T=self.tokens)
        return [made]


def tuning_machine() -> Machine:
    """Raises ValueError: no CUDA device, or one that the kernels cannot run on."""
    if not torch.cuda.is_available():
        raise ValueError(
            "gsa bench tune: expected a CUDA device, whose kernels are to be tuned, but torch sees "
            "none; see gsa info"
        )
    describe_impl("triton", torch.device("cuda"))
    return cuda_machine()


def shapes(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases that share all rows of the table, together, in their order."""
    found: dict[tuple[int, ...], list[Case]] = {}
    for case in cases:
        key = (case.K, case.V, table.power_of_two(case.M), case.H // case.G)
        found.setdefault(key, []).append(case)
    return list(found.values())


def runs(kernel: str, case: Case) -> bool:
    """Whether a call launches it: the scan is for sequences of more than one segment."""
    return kernel != "scan" or sizes.segment_tokens(False) < case.T


class Tuner:
    """Findings of one shape, a key after another; what was found holds for the keys that follow."""

    def __init__(self, config: TuneConfig, machine: Machine, budget: Budget):
        from gsa.ops.triton.plan import shared_memory

        self.config, self.machine, self.budget = config, machine, budget
        self.dtype = {name: dtype for dtype, name in table.DTYPES.items()}[config.dtype]
        self.arch = table.architecture(machine.device)
        self.shared = shared_memory(machine.device)

    def defaults(self, case: Case) -> Iterator[Row]:
        """The formula's rows of a shape."""
        from gsa.benchmark.tiles import formula

        heads = case.H // case.G
        for kernel in KERNELS:
            for width in dict.fromkeys((case.K, case.V)):
                yield formula(
                    self.arch, kernel, self.dtype, width, case.M, heads, shared=self.shared
                )

    def launches(self, default: Row, case: Case, settled: Sequence[Row]) -> list[Row]:
        """What to try. Who walks both sides in one launch takes its warps from that of the keys."""
        from gsa.benchmark.tiles import candidates

        found = candidates(default, self.shared)
        if default.kernel not in ("write_back", "scan") or default.width == case.K:
            return found
        keys = default._replace(width=case.K)
        warps = next((row.warps for row in settled if row.key == keys.key), default.warps)
        return [row for row in found if row.warps == warps]

    def shape(self, cases: Sequence[Case]) -> Iterator[Finding]:
        """A key is tried in the first case that launches its kernel."""
        settled: list[Row] = []
        trials: dict[str, Trial] = {}
        packed = packed_trial(cases[0], self.dtype, self.machine)
        for default in self.defaults(cases[0]):
            case = next((case for case in cases if runs(default.kernel, case)), None)
            name = case.name if case else cases[0].name
            print(f"{name}: {default.kernel}, {default.width} wide", flush=True)
            if case is None:
                yield Finding(default=default, unknown="no case is longer than a segment")
                continue
            if case.name not in trials:
                trials = {case.name: timed_trial(case, self.dtype, self.machine)}
            key = Trials(default, settled, self.machine, self.budget, self.config.seconds)
            launches = self.launches(default, case, settled)
            finding = key.explore(launches, trials[case.name], packed)
            settled += [finding.best] if finding.best else []
            yield finding


def tile_table(finding: Finding) -> str:
    """Candidates, the fastest first, then those that failed."""
    default = finding.default
    lines = [["", "columns", "warps", "stages", "ms", "of formula"]]

    def line(name: str, row: Row, ratio: float) -> None:
        cells = [*map(str, row.tile), f"{finding.ms * ratio:.4f}", f"{ratio:.3f}"]
        lines.append([name, *cells])

    line("formula", default, 1.0)
    for row in sorted(finding.ratios, key=lambda row: finding.ratios[row]):
        line("written" if row == finding.best else "", row, finding.ratios[row])
    said = [aligned(lines)] if finding.ms else []
    said += [f"{row.tile}: {reason}" for row, reason in finding.failures.items()]
    said += [finding.unknown] if finding.unknown else []
    return "\n".join(f"  {text}" for part in said for text in part.splitlines())


def extended(rows: Iterable[Row], findings: Iterable[Finding]) -> list[Row]:
    """A table's rows, with those of decided keys replaced, or left out for the formula."""
    kept = {row.key: row for row in rows}
    for finding in findings:
        if finding.decided:
            kept.pop(finding.default.key, None)
        if finding.best:
            kept[finding.best.key] = finding.best
    return sorted(kept.values())


def bench_tune(config: TuneConfig, machine: Machine | None = None) -> list[Row]:
    """Finds launches of the kernels that are faster than the formula's on this GPU.

    Prints what was tried; returns the rows.

    Raises:
        ValueError: no CUDA device, or `out` is a file that is no launch table.
    """
    machine = machine or tuning_machine()
    out = Path(config.out) if config.out else None
    before = table.read(out) if out is not None and out.exists() else ()
    budget = Budget(config.budget_seconds, machine.clock)
    tuner = Tuner(config, machine, budget)
    torch.manual_seed(0)
    print(f"{device_name(machine.device)}, {tuner.arch}, {config.dtype}: forward + backward")
    findings: list[Finding] = []
    operator = tuple(case for case in machine.cases if case.group not in ("cold-start", "step"))
    for cases in shapes(config.chosen(operator)):
        if budget.left() < 2 * budget.longest_case:
            print(f"{cases[0].name}: not run: the budget")
            continue
        try:
            for finding in tuner.shape(cases):
                findings.append(finding)
                print(tile_table(finding), flush=True)
        except RuntimeError as error:  # out of memory, or a broken device
            print(f"{cases[0].name}: not tuned: {why(error)}", flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, table.text(extended(before, findings)))
    rows = extended((), findings)
    if out is not None:
        print(f"{out}: {len(extended(before, findings))} rows, {len(rows)} of them found now")
    print(json.dumps({"rows": [row._asdict() for row in rows]}))
    return rows
