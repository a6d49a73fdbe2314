"""Timing of functions against each other."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call."""

    median: float
    fastest: float
    slowest: float
    calls: int

    @classmethod
    def of(cls, taken: Sequence[float]) -> "Timing":
        return cls(
            median=statistics.median(taken),
            fastest=min(taken),
            slowest=max(taken),
            calls=len(taken),
        )


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, seconds: float, max_calls: int = 50
) -> dict[str, Timing]:
    """Times CPU functions in turns, so that a slow moment of the machine hits all of them.

    Every function warms up for a tenth of `seconds` and is timed at least 3 times; rounds go on
    until each function had `seconds` on average, or `max_calls` calls.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        begin = time.perf_counter()
        function()
        while time.perf_counter() - begin < seconds / 10:
            function()
    begin = time.perf_counter()
    for done in range(max_calls):
        if done >= 3 and time.perf_counter() - begin > seconds * len(functions):
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - start)
    return {name: Timing.of(taken) for name, taken in samples.items()}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Device work that is ready to be timed."""

    run: Callable[[], object]
    timer: str
    """graph: replays of a CUDA graph, without launch gaps; events: calls between two events."""
    note: str = ""
    """Why it is not a graph."""


class Meter(Protocol):
    """How work on a device is measured; `gpu_timing.GpuMeter`, and a stand-in in tests on a CPU."""

    def first_call(self, run: Callable[[], object]) -> float:
        """Seconds of one call and everything it starts."""
        ...

    def prepare(self, run: Callable[[], object]) -> Prepared: ...

    def in_turns(self, work: Mapping[str, Prepared], seconds: float) -> dict[str, Timing]:
        """Times in turns, `seconds` each on average."""
        ...

    def eager(self, run: Callable[[], object], seconds: float) -> float:
        """Wall seconds per call of a loop of calls that waits for the device once, at the end."""
        ...

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Most device memory in use during a call, beyond what was in use before it."""
        ...

    def release(self) -> None:
        """Gives back the memory of what was prepared; call it when nothing of it is in use."""
        ...
