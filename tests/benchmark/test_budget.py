"""What still fits into a run, and cutting off what does not end."""

import math
import signal
import time
from contextlib import suppress

import pytest

from gsa.benchmark.budget import RESERVE, Budget, OutOfTimeError, time_limit
from gsa.benchmark.cases import select

WIDE, LONG, OTHER = select(("1.3B 8x2048", "1.3B 1x16384", "Mistral-7B 8x2048"))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_no_limit_without_a_budget(clock):
    budget = Budget(0, clock)
    budget.ended(clock() - 1e6, 0)
    assert budget.allows_case() and budget.left() == math.inf
    assert budget.for_first_call(WIDE) == (math.inf, "")


def test_a_case_as_long_as_the_longest_must_fit(clock):
    budget = Budget(60, clock)
    clock.now += 30
    budget.ended(100, 20)  # 30 s, of which 20 were a first call
    assert budget.longest_case == 10 and budget.left() == 30
    clock.now += 19
    assert budget.allows_case()
    clock.now += 1
    assert not budget.allows_case()


def test_a_new_shape_must_fit_what_the_last_one_took(clock):
    budget = Budget(600, clock)
    seconds, reason = budget.for_first_call(WIDE)
    assert (seconds, reason) == (600 - RESERVE, "")
    clock.now += 400
    budget.note_first_call(WIDE, 400, done=True)
    assert budget.for_first_call(LONG) == (200 - RESERVE, "")  # the same kernels
    _, reason = budget.for_first_call(OTHER)
    assert reason == (
        "not run: 200 s of the budget were left, its first call at another shape took 400 s"
    )
    clock.now += 195
    assert budget.for_first_call(LONG)[1] == "not run: 5 s of the budget were left"


def test_a_shape_that_was_cut_off_is_not_known(clock):
    budget = Budget(600, clock)
    clock.now += 100
    budget.note_first_call(WIDE, 450, done=False)
    clock.now += 100
    assert "took 450 s" in budget.for_first_call(LONG)[1]


def test_a_limit_cuts_through_code_that_catches_exceptions():
    begin = time.perf_counter()
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(OutOfTimeError), time_limit(0.05):
        while True:
            with suppress(Exception):
                time.sleep(5)
    assert time.perf_counter() - begin < 4
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_limit_that_is_not_reached_leaves_nothing_behind():
    with time_limit(30), time_limit(math.inf):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
