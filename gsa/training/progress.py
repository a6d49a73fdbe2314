"""What a run shows while it goes: two lines on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from gsa.training.curves import clock

_SECONDS_BETWEEN_LINES = (10.0, 60.0)
_FREQUENT_FOR = 600.0  # seconds; a log of days is read too


class Display:
    """Writes to stderr, so that stdout stays free for results. Used inside a `with`.

    shown: False writes nothing; of several processes one shows how far they are.
    """

    def __init__(self, steps: int, *, shown: bool = True) -> None:
        self._steps = steps
        self._shown = shown
        console = Console(stderr=True)
        self._bar = _Bar(steps, console) if shown and console.is_interactive else None
        self._started = 0.0
        self._counted_from: tuple[int, float] | None = None  # (step, when it was done)
        self._seconds_before: float | None = 0.0  # of the line before, if known
        self._last_line = -_SECONDS_BETWEEN_LINES[0]

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
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def resumed_at(self, step: int) -> None:
        """Steps before `step` were done by an earlier process."""
        if step > 0:
            self._seconds_before = None
        if self._bar is not None:
            self._bar.show(step, "")

    def step(
        self, step: int, loss: float, tokens_per_s: float, line: dict[str, Any] | None = None
    ) -> None:
        """Called after each step; cheap.

        line: the step's line of metrics.jsonl, to show more of it: ppl, lr, grad_norm, skipped,
            data_wait, and mfu and memory_gib where they are known.
        """
        now = time.perf_counter()
        line = line or {}
        before, self._seconds_before = self._seconds_before, line.get("seconds")
        parts = [f"loss {loss:.4f}", *_more(line), f"{tokens_per_s:,.0f} tokens/s"]
        parts += _resources(line, before)
        eta = self._eta(step, now)
        if eta is not None:
            parts.append(f"ETA {clock(eta)}")
        text = " · ".join(parts)
        if self._bar is not None:
            self._bar.show(step, text)
            return
        often, seldom = _SECONDS_BETWEEN_LINES
        between = often if now - self._started < _FREQUENT_FOR else seldom
        if now - self._last_line >= between or step == self._steps:
            self._last_line = now
            self.say(f"step {step}/{self._steps} · {text}")

    def _eta(self, step: int, now: float) -> float | None:
        """Seconds to the last step; from the second step on, as the first one also warms up."""
        if self._counted_from is None:
            self._counted_from = (step, now)
            return None
        first, when = self._counted_from
        return (self._steps - step) * (now - when) / max(step - first, 1)


class _Bar(Progress):
    """How far it has come, and below that the numbers: both would not fit on one line."""

    def __init__(self, steps: int, console: Console) -> None:
        super().__init__(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            expand=True,
        )
        self._task = self.add_task("", total=steps)

    def show(self, step: int, text: str) -> None:
        self.update(self._task, completed=step, description=text)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.description:
                yield Text(task.description)


def _more(line: dict[str, Any]) -> list[str]:
    shown = (("ppl", "ppl", ".4g"), ("lr", "lr", ".2e"), ("grad_norm", "gradient", ".3g"))
    parts = [f"{name} {line[key]:{form}}" for key, name, form in shown if line.get(key) is not None]
    if line.get("skipped"):
        parts.append(f"{line['skipped']} skipped")
    return parts


def _resources(line: dict[str, Any], seconds_before: float | None) -> list[str]:
    parts = []
    if line.get("mfu") is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    if line.get("memory_gib") is not None:
        parts.append(f"{line['memory_gib']:.1f} GiB")
    if "data_wait" in line and "seconds" in line and seconds_before is not None:
        share = line["data_wait"] / max(line["seconds"] - seconds_before, 1e-9)
        parts.append(f"data wait {min(share, 1.0):.1%}")
    return parts
