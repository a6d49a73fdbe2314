"""A limit on a run's seconds: what no longer fits is not begun, what takes too long is cut off."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from gsa.benchmark.cases import Case

RESERVE = 15.0  # seconds kept for measuring a case after a peer's first call, at the very least


class OutOfTimeError(BaseException):
    """Raised inside a call that is cut off; not an Exception, so that no library swallows it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Cuts off the code inside after `seconds` (main thread only); infinity sets no limit."""
    if math.isinf(seconds):
        yield
        return

    def cut(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, cut)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """Seconds left, and what the next thing is expected to take."""

    def __init__(self, seconds: float, clock: Callable[[], float]):
        self.seconds, self.clock = seconds, clock
        self.begin = clock()
        self.longest_case = 0.0
        self.first_calls: dict[tuple[int, ...], float] = {}
        self.tuned: set[tuple[int, ...]] = set()

    def left(self) -> float:
        if not self.seconds:
            return math.inf
        return self.seconds - (self.clock() - self.begin)

    def allows_case(self) -> bool:
        """Whether another case like the longest so far fits."""
        return self.left() > self.longest_case

    def ended(self, begin: float, first_calls: float) -> None:
        """Notes a case begun at `begin`, of which `first_calls` seconds went into first calls."""
        self.longest_case = max(self.longest_case, self.clock() - begin - first_calls)

    def for_first_call(self, case: Case) -> tuple[float, str]:
        """(seconds a peer's first call may take, why it should not begin, empty if it may).

        A library that tunes itself takes minutes at each new shape; the time for one case is kept.
        """
        seconds = self.left() - max(self.longest_case, RESERVE)
        known = case.tuning_key in self.tuned
        expected = 0.0 if known else max(self.first_calls.values(), default=0.0)
        if seconds > expected:
            return seconds, ""
        reason = f"not run: {max(self.left(), 0):.0f} s of the budget were left"
        if expected:
            reason += f", its first call at another shape took {expected:.0f} s"
        return seconds, reason

    def note_first_call(self, case: Case, seconds: float, *, done: bool) -> None:
        longest = max(seconds, self.first_calls.get(case.tuning_key, 0.0))
        self.first_calls[case.tuning_key] = longest
        if done:
            self.tuned.add(case.tuning_key)
