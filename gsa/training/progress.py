"""What a run shows while it goes: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 10.0


class Display:
    """Writes to stderr, so that stdout stays free for results. Used inside a `with`."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        console = Console(stderr=True)
        self._bar = None
        if console.is_terminal:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=steps)
        self._started = 0.0
        self._first_step = 0
        self._last_line = -_SECONDS_BETWEEN_LINES

    def __enter__(self) -> "Display":
        self._started = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def resumed_at(self, step: int) -> None:
        """Steps before `step` were done by an earlier process."""
        self._first_step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def step(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Called after each step; cheap."""
        now = time.perf_counter()
        too_soon = now - self._last_line < _SECONDS_BETWEEN_LINES and step != self._steps
        if self._bar is None and too_soon:
            return
        left = (self._steps - step) * (now - self._started) / max(step - self._first_step, 1)
        text = f"loss {loss:.4f} · {tokens_per_s:,.0f} tokens/s · ETA {_clock(left)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        self._last_line = now
        self.say(f"step {step}/{self._steps} · {text}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
