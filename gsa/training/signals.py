"""SIGTERM, SIGUSR1 and Ctrl-C as a wish to stop, read by the loop between two steps."""

import signal
import threading
from types import FrameType, TracebackType


class StopSignals:
    """Inside a `with`, the first SIGTERM, SIGUSR1 or SIGINT sets `received` to its number.

    Schedulers announce the end of a job by one of the first two.

    A second Ctrl-C interrupts at once. Outside the main thread nothing is caught, since Python
    delivers signals only there.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
