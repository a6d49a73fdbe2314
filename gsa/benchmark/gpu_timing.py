"""Measuring on a CUDA device: graph replays in turns, eager wall time, peak memory."""

import gc
import time
from collections.abc import Callable, Mapping

import torch

from gsa.benchmark.timing import Prepared, Timing

MIN_ROUNDS, MAX_ROUNDS = 5, 200


def within(value: float, low: int, high: int) -> int:
    return int(max(low, min(high, value)))


class GpuMeter:
    """The `Meter` of the current CUDA device."""

    def first_call(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def prepare(self, run: Callable[[], object]) -> Prepared:
        """A graph of the call; the call itself, to be timed by events, if it cannot be captured."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        current.wait_stream(side)
        torch.cuda.synchronize()
        gc.collect()  # nothing old may be freed while a graph is captured
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a failed capture does not leave its stream
            torch.cuda.synchronize()
            note = f"no graph: {str(error).splitlines()[0]}"
            return Prepared(run=run, timer="events", note=note)
        return Prepared(run=graph.replay, timer="graph")

    def in_turns(self, work: Mapping[str, Prepared], seconds: float) -> dict[str, Timing]:
        """Rounds are queued without waiting, so that the device is never idle between them."""
        if not work:
            return {}
        for _ in range(2):  # the second round tells how long one takes
            round_seconds = self.first_call(lambda: [one.run() for one in work.values()])
        rounds = within(seconds * len(work) / round_seconds, MIN_ROUNDS, MAX_ROUNDS)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {x: [] for x in work}
        for _ in range(rounds):
            for name, one in work.items():
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                one.run()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: Timing.of([start.elapsed_time(end) / 1e3 for start, end in pairs])
            for name, pairs in events.items()
        }

    def eager(self, run: Callable[[], object], seconds: float) -> float:
        calls = within(seconds / self.first_call(run), 3, 100)

        def loop() -> None:
            for _ in range(calls):
                run()

        return self.first_call(loop) / calls

    def peak_bytes(self, run: Callable[[], object]) -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def cache_bytes() -> int:
    """The device's L2 cache."""
    return torch.cuda.get_device_properties().L2_cache_size
