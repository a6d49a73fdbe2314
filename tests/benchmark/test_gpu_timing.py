"""Measuring on a real CUDA device."""

import json

import pytest
import torch

from gsa.benchmark.cold_start import cold_start
from gsa.benchmark.gpu_timing import GpuMeter, cache_bytes, within
from gsa.benchmark.ops_gpu import BenchGPUConfig, Machine, bench_ops_gpu, measure_ceilings


@pytest.mark.parametrize(
    ("value", "expected"), [(0.2, 5), (5.9, 5), (17.5, 17), (1e9, 200), (float("inf"), 200)]
)
def test_rounds_stay_within_bounds(value, expected):
    assert within(value, 5, 200) == expected


@pytest.mark.gpu
def test_a_graph_replays_the_work():
    x = torch.zeros(1000, device="cuda")
    prepared = GpuMeter().prepare(lambda: x.add_(1))
    assert prepared.timer == "graph"
    assert x.unique().tolist() == [3]  # two calls to warm up, one replay
    prepared.run()
    torch.cuda.synchronize()
    assert x.unique().tolist() == [4]


@pytest.mark.gpu
def test_work_that_waits_for_the_host_is_timed_by_events():
    meter = GpuMeter()
    x = torch.ones(1000, device="cuda")
    stream = torch.cuda.current_stream()
    waiting = meter.prepare(lambda: x.sum().item())
    assert waiting.timer == "events" and waiting.note.startswith("no graph: ")
    assert torch.cuda.current_stream() == stream
    leaf = torch.ones(2**20, device="cuda", requires_grad=True)
    graph = meter.prepare(lambda: torch.autograd.grad((leaf * leaf).sum(), leaf))
    assert graph.timer == "graph"
    timings = meter.in_turns({"waiting": waiting, "graph": graph}, seconds=0.01)
    for timing in timings.values():
        assert 0 < timing.fastest <= timing.median <= timing.slowest < 1
    assert timings["waiting"].calls == timings["graph"].calls >= 5


@pytest.mark.gpu
def test_peak_memory_is_what_a_call_adds():
    meter = GpuMeter()
    kept = torch.ones(2**20, device="cuda")
    assert meter.peak_bytes(lambda: (kept + 1, kept + 2)) == 8 * 2**20
    assert meter.peak_bytes(lambda: kept.add_(1)) == 0


@pytest.mark.gpu
def test_tiny_cases_with_our_kernels(machine, capsys, tmp_path):
    device, meter = torch.device("cuda"), GpuMeter()
    on_gpu = Machine(
        device=device,
        impl="triton",
        meter=meter,
        cache_bytes=cache_bytes(),
        ceilings=lambda: measure_ceilings(device, meter, copy_bytes=2**28, side=2048),
        cold_start=lambda case, timeout: cold_start(
            case, device="cuda", impl="triton", timeout=timeout
        ),
        cases=machine.cases,
    )
    out = tmp_path / "gpu.json"
    result = bench_ops_gpu(BenchGPUConfig(seconds=0.01, out=str(out)), on_gpu)
    assert result["complete"] and json.loads(out.read_text())["complete"]
    assert result["cold_start"]["kernels_compiled"] > 0
    for row in result["rows"]:
        assert not {"ours", "ours_saved"} & set(row["missing"])
        for mode in ("forward", "forward_backward"):
            assert row["contenders"]["ours"][mode]["timer"] == "graph"
    assert result["steps"][0]["missing"] == {}
    assert "plot: " in capsys.readouterr().out
