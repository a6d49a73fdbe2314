"""The GPU benchmark's course on a CPU: rows, rivals' failures, budget, partial results."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from gsa.benchmark import ops_gpu
from gsa.benchmark.ceilings import measure_ceilings
from gsa.benchmark.cost import attention_bytes, step_bytes
from gsa.benchmark.ops_gpu import BenchGPUConfig, bench_ops_gpu
from gsa.benchmark.timing import Prepared


@pytest.fixture
def run(machine, monkeypatch, capsys):
    """Runs the benchmark with a library (None: without --peers), returns (result, printed)."""

    def run(library, machine=machine, **options):
        monkeypatch.setattr(ops_gpu, "load_fla", lambda: library)
        config = BenchGPUConfig(peers=library is not None, seconds=0.001, **options)
        result = bench_ops_gpu(config, machine)
        return result, capsys.readouterr().out

    return run


def test_a_whole_run(run, machine, fla, tmp_path):
    out = tmp_path / "deep" / "gpu.json"
    result, printed = run(fla, out=str(out))
    as_json = json.loads(json.dumps(result))
    assert json.loads(out.read_text()) == as_json == json.loads(printed.splitlines()[-1])
    assert result["complete"] and result["not_run"] == []
    assert result["environment"]["device"].startswith("cpu")
    assert result["fla"]["version"] == "9.9" and result["cold_start"]["total_seconds"] == 3.0
    assert [row["case"] for row in result["rows"]] == ["1.3B 8x2048", "1.3B 1x16384", "M=32 K=V=64"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert list(out.parent.glob(".*")) == []
    for words in ("forward + backward", "cold start, ours: 3.0 s", "first call, fla: "):
        assert words in printed


def test_a_row_is_what_was_measured(run, machine, fla):
    row = run(fla, cases=("1.3B",))[0]["rows"][0]
    case = machine.cases[2]
    moved = attention_bytes(case)
    assert row["floor_bytes"] == {
        "forward": moved.forward,
        "forward_backward": moved.forward_backward,
    }
    assert row["floor_ms"]["forward"] == pytest.approx(moved.forward / 2e9 * 1e3, rel=1e-4)
    found = row["contenders"]
    assert set(found) == {"ours", "ours_saved", "sdpa", "fla"} and row["missing"] == {}
    assert "forward" not in found["ours_saved"]
    for mode in ("forward", "forward_backward"):
        ours, theirs = found["ours"][mode], found["fla"][mode]
        assert ours["fastest_ms"] <= ours["ms"] <= ours["slowest_ms"] and ours["replays"] == 3
        assert theirs["over_ours"] == pytest.approx(theirs["ms"] / ours["ms"], rel=1e-2)
        seconds = ours["ms"] / 1e3
        fraction = row["floor_ms"][mode] / ours["ms"]
        assert ours["floor_fraction"] == pytest.approx(fraction, rel=1e-2, abs=1e-4)
        gb_per_s = row["floor_bytes"][mode] / seconds / 1e9
        assert ours["floor_gb_per_s"] == pytest.approx(gb_per_s, abs=0.06)
        assert "floor_fraction" not in found["sdpa"][mode]
    assert found["ours"]["peak_mib"] == 3.0
    # 2 x 16 tokens x (q, output 32 bf16; k, v 16 bf16; gate 8 fp32) is 7168 bytes; 3 sets > 8000
    assert found["ours"]["input_sets"] == 2
    assert found["fla"]["output_differs_from_ours"] < 0.01


def test_a_step_row(run, machine, fla):
    row = run(fla, cases=("step",))[0]["steps"][0]
    assert set(row["ways"]) == {"ours", "ours_in_place", "ours_rows", "fla"}
    floor = step_bytes(machine.cases[1]) / 2e9 * 1e6
    assert row["floor_us"] == pytest.approx(floor, rel=1e-4)
    cell = row["ways"]["ours_rows"]
    assert cell["over_floor"] == pytest.approx(cell["us"] / floor, rel=1e-2)
    # a memory of two sequences is 1024 bytes: 8 exceed a cache of 4000 twice; 7 rounds are >= 50
    assert (cell["memories"], cell["steps_per_replay"]) == (8, 56)


def test_without_peers_there_is_no_fla_and_attention_can_be_left_out(run):
    rows = run(None, cases=("1.3B",), max_attention=16)[0]["rows"]
    assert [set(row["contenders"]) for row in rows] == [
        {"ours", "ours_saved", "sdpa"},
        {"ours", "ours_saved"},
    ]
    assert rows[1]["missing"] == {"sdpa": "not run: T = 24 is above max_attention"}


def test_a_peer_that_is_not_installed_is_an_error_before_anything(machine, tmp_path):
    if importlib.util.find_spec("fla"):
        pytest.skip("flash-linear-attention is installed here")
    out = tmp_path / "gpu.json"
    with pytest.raises(ValueError, match=r"pip install 'gated-slots\[peers\]'"):
        bench_ops_gpu(BenchGPUConfig(peers=True, out=str(out)), machine)
    assert not out.exists()


def test_rivals_that_fail_are_recorded_with_the_reason(run, fla):
    def wrong_values(q, k, v, s, g, scale):
        return fla.chunk(q, k, v, s, g, scale)[0] * float("nan"), None

    def wrong_gradient(q, k, v, s, g, scale):
        return fla.chunk(q, k, v, s, g, scale)[0] + 0 * torch.sqrt(0 * g).sum(), None

    def crash(q, k, v, s, g, scale):
        raise RuntimeError("no kernel image\nmore")

    for library, reason in (
        (replace(fla, chunk=crash), "failed: RuntimeError: no kernel image"),
        (replace(fla, chunk=wrong_values), "failed: ValueError: output is not finite"),
        (
            replace(fla, chunk=wrong_gradient),
            "failed: ValueError: gradient of input 5 is not finite",
        ),
        ("import fails: OSError: libcuda", "import fails: OSError: libcuda"),
    ):
        result, printed = run(library, cases=("1.3B 8x2048",))
        assert result["rows"][0]["missing"] == {"fla": reason}
        assert set(result["rows"][0]["contenders"]) == {"ours", "ours_saved", "sdpa"}
        assert f"fla {reason} (1.3B 8x2048)" in printed
        assert result["complete"]


def test_ours_failing_is_recorded_too(run, machine):
    result, printed = run(None, replace(machine, impl="abacus"))
    for row in result["rows"]:
        assert "ValueError" in row["missing"]["ours"] and "sdpa" in row["contenders"]
    assert "ValueError" in result["steps"][0]["missing"]["ours_in_place"]
    assert "in place failed: ValueError" in printed


def test_a_note_about_timing_without_a_graph_is_shown(run, machine):
    class NoGraphs(type(machine.meter)):
        def prepare(self, run):
            return Prepared(run=run, timer="events", note="no graph: host sync")

    result, printed = run(None, replace(machine, meter=NoGraphs()), cases=("1.3B 8x2048",))
    cell = result["rows"][0]["contenders"]["ours"]["forward"]
    assert (cell["timer"], cell["note"]) == ("events", "no graph: host sync")
    assert "ours, forward: no graph: host sync (1.3B 8x2048)" in printed


def test_a_killed_run_leaves_what_it_has(run, machine, tmp_path):
    out = tmp_path / "gpu.json"
    seen = []

    class Killed(type(machine.meter)):
        def release(self):
            seen.append(json.loads(out.read_text()))
            if len(seen) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(None, replace(machine, meter=Killed()), out=str(out))
    left = json.loads(out.read_text())
    assert [row["case"] for row in left["rows"]] == ["1.3B 8x2048"] and len(left["steps"]) == 1
    assert left["complete"] is False and left["not_run"] == ["1.3B 1x16384", "M=32 K=V=64"]
    assert seen[0]["not_run"] == ["step B=1", "1.3B 8x2048", "1.3B 1x16384", "M=32 K=V=64"]


def test_the_budget_ends_a_run_cleanly(run, machine, tmp_path):
    ticks = iter([0.0] * 4 + [50.0] * 100)
    machine = replace(machine, clock=lambda: next(ticks))
    result, printed = run(None, machine, budget_seconds=40.0, out=str(tmp_path / "x.json"))
    assert result["complete"] is False and result["not_run"] == [
        "1.3B 8x2048",
        "1.3B 1x16384",
        "M=32 K=V=64",
    ]
    assert "not run: 1.3B 8x2048; 1.3B 1x16384; M=32 K=V=64" in printed
    assert "plot: none (no case was measured)" in printed


def test_a_first_call_beyond_the_budget_is_cut_off(run, fla, monkeypatch):
    monkeypatch.setattr("gsa.benchmark.budget.RESERVE", 0.0)

    def tune(q, k, v, s, g, scale):
        while True:
            pass

    options = {"cases": ("1.3B 8x2048",), "budget_seconds": 3.0}
    result, _ = run(replace(fla, chunk=tune), **options)
    assert "of its first call: the budget" in result["rows"][0]["missing"]["fla"]
    assert "forward_backward" in result["rows"][0]["contenders"]["ours"]


def test_ceilings_count_bytes_and_operations(machine):
    class Fixed(type(machine.meter)):
        def in_turns(self, work, seconds):
            for one in work.values():
                one.run()
            timings = super().in_turns(work, 0)
            return {name: replace(timing, median=2.0) for name, timing in timings.items()}

    found = measure_ceilings(torch.device("cpu"), Fixed(), copy_bytes=1000, side=10)
    assert (found.copy_bytes_per_second, found.matmul_flops_per_second) == (1000.0, 1000.0)


@pytest.mark.parametrize(
    ("field", "value"), [("seconds", -1.0), ("budget_seconds", float("nan")), ("cases", ("no",))]
)
def test_impossible_options_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        BenchGPUConfig(**{field: value})
