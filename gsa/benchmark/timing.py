"""Timing of functions against each other."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call."""

    median: float
    fastest: float
    slowest: float
    calls: int


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
    return {
        name: Timing(
            median=statistics.median(taken),
            fastest=min(taken),
            slowest=max(taken),
            calls=len(taken),
        )
        for name, taken in samples.items()
    }
