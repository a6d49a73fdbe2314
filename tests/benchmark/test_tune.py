"""`gsa bench tune` with a meter whose times are made up: what is written, what is left alone."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.benchmark import trials
from gsa.benchmark.budget import Budget
from gsa.benchmark.cases import Case
from gsa.benchmark.tiles import candidates, stage_bytes
from gsa.benchmark.timing import Prepared, Timing
from gsa.benchmark.tune import TuneConfig, Tuner, bench_tune, extended, runs, shapes, tile_table
from gsa.ops.triton import sizes, table
from gsa.ops.triton.table import Row

SMALL = Case(group="1.3B", name="1.3B 8x2048", H=2, G=1, K=40, V=40, M=5, B=1, T=20)
FORMULA = Row("cpu", "contract", "fp32", 40, 16, 2, 64, 4, 1)
FAST = {"contract": (64, 8, 1), "expand": (32, 8, 2)}
"""What the made-up meter finds fast, by kernel."""


def holds(kernel, tile):
    return table.find(torch.device("cpu"), kernel, torch.float32, 40, 16, 2) == tile


@pytest.fixture
def scripted(machine):
    """A machine on which the launches of FAST take 10 % less, each time they are asked."""

    class Scripted(type(machine.meter)):
        races = ()

        def in_turns(self, work, seconds):
            Scripted.races += (tuple(work),)
            timings = {}
            for name, one in work.items():
                seen.clear()
                one.run()
                taken = 1.0
                for fast in seen.values():
                    taken *= 0.9 if fast else 1.0
                timings[name] = Timing(median=taken, fastest=taken, slowest=taken, calls=1)
            return timings

    seen = {}
    real = trials.gated_slot_attention

    def watched(*inputs, **options):
        seen.update({kernel: holds(kernel, tile) for kernel, tile in FAST.items()})
        return real(*inputs, **options)

    machine = replace(machine, meter=Scripted(), cases=(SMALL,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "gated_slot_attention", watched)
        yield machine


def tune(machine, **options):
    return bench_tune(TuneConfig(dtype="fp32", seconds=0.0, **options), machine)


def test_what_is_faster_is_written_and_the_rest_kept(scripted, tmp_path, capsys):
    out = tmp_path / "deep" / "table.json"
    found = tune(scripted)
    assert [row[1:] for row in found] == [
        (kernel, "fp32", 40, 16, 2, *tile) for kernel, tile in FAST.items()
    ]
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == {"rows": [row._asdict() for row in found]}
    assert printed.count("  written ") == 2 and "0.900" in printed
    assert "no case is longer than a segment" in printed, "the scan"
    other = Row("sm90", "expand", "bf16", 512, 64, 1, 64, 4, 4)
    scan = FORMULA._replace(kernel="scan", block=16)
    stale = FORMULA._replace(kernel="write_back", block=16)
    out.parent.mkdir()
    out.write_text(table.text([other, scan, stale]))
    assert tune(scripted, out=str(out)) == found
    assert table.read(out) == tuple(sorted([*found, other, scan]))
    assert list(out.parent.iterdir()) == [out]


def test_a_launch_is_timed_beside_the_formula_in_few_at_a_time(scripted):
    tune(scripted)
    races = scripted.meter.races
    assert all(race[0] == "formula" and len(race) <= 1 + trials.GROUP for race in races)
    assert ("formula", "(64, 8, 1)") in races, "once more, by itself"


def test_a_win_has_to_come_twice(scripted):
    class Lucky(type(scripted.meter)):
        def in_turns(self, work, seconds):
            timings = super().in_turns(work, seconds)
            if len(work) == 2:  # the fastest once more
                return {name: timings["formula"] for name in timings}
            return timings

    assert tune(replace(scripted, meter=Lucky())) == []


def test_a_small_win_is_noise(scripted, monkeypatch):
    monkeypatch.setattr(trials, "MARGIN", 0.11)
    assert tune(scripted) == []


def test_wrong_and_failing_launches_are_recorded(scripted, monkeypatch, capsys):
    real = trials.gated_slot_attention

    def sometimes(*inputs, **options):
        result = real(*inputs, **options)
        if holds("contract", (64, 8, 1)):
            raise RuntimeError("out of resource: shared memory\nmore")
        if holds("expand", (32, 8, 2)):
            return result._replace(output=result.output * 1.01)
        if holds("expand", (32, 8, 1)):
            return result._replace(output=result.output * float("nan"))
        if holds("expand", (64, 8, 1)) and options["cu_seqlens"] is not None:
            return result._replace(output=result.output * 0)
        return result

    monkeypatch.setattr(trials, "gated_slot_attention", sometimes)
    monkeypatch.setitem(FAST, "expand", (64, 8, 1))
    assert tune(scripted) == []
    printed = capsys.readouterr().out
    for words in (
        "(64, 8, 1): failed: RuntimeError: out of resource: shared memory\n",
        "(32, 8, 2): failed: ValueError: output is off by 0.01, by the formula ",
        "(32, 8, 1): failed: ValueError: output is off by nan",
        "(64, 8, 1): packed sequences: failed: ValueError: output is off by 1, by the formula ",
    ):
        assert words in printed, words


def test_what_no_graph_can_hold_is_left_out(scripted, capsys):
    class Graphs(type(scripted.meter)):
        def prepare(self, run):
            run()
            if watching["fast"]:
                return Prepared(run=run, timer="events", note="no graph: host sync")
            return Prepared(run=run, timer="graph")

    watching = {"fast": False}
    real = trials.Contender.forward_backward

    def watched(self):
        watching["fast"] = holds("contract", FAST["contract"])
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials.Contender, "forward_backward", watched)
        found = tune(replace(scripted, meter=Graphs()))
    assert [row.kernel for row in found] == ["expand"]
    assert "(64, 8, 1): no graph: host sync" in capsys.readouterr().out


def test_interruption_leaves_the_old_table(scripted, tmp_path):
    out = tmp_path / "table.json"
    old = table.text([Row("sm90", "expand", "bf16", 512, 64, 1, 64, 4, 4)])
    out.write_text(old)

    class Killed(type(scripted.meter)):
        def release(self):
            if len(self.races) > 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(replace(scripted, meter=Killed()), out=str(out))
    assert out.read_text() == old and list(tmp_path.iterdir()) == [out]


def test_the_budget_leaves_keys_undecided(scripted, tmp_path, capsys):
    out = tmp_path / "table.json"
    stale = FORMULA._replace(kernel="write_back", block=16)
    out.write_text(table.text([stale]))
    ticks = iter([0.0, 0.0, *[float(n) for n in range(1000)]])
    machine = replace(scripted, clock=lambda: next(ticks))
    found = tune(machine, out=str(out), budget_seconds=14.0)
    assert stale in table.read(out) and "not tried: the budget" in capsys.readouterr().out
    assert set(found) < set(table.read(out))


def test_a_broken_table_is_an_error_before_anything(scripted, tmp_path):
    out = tmp_path / "table.json"
    out.write_text('{"rows": [{"arch": "sm90"}]}')
    with pytest.raises(ValueError, match=r"table\.json: row 1, .*expected an object of"):
        tune(scripted, out=str(out))
    assert scripted.meter.races == ()


def test_real_launches_in_the_interpreter(machine, monkeypatch):
    """The kernels themselves, with tiles that differ, held to the formula's values."""
    if torch.cuda.is_available():
        pytest.skip("it is for the interpreter")
    monkeypatch.setattr(sizes, "segment_tokens", lambda packed: 64)
    monkeypatch.setattr(sizes, "span_tokens", lambda: 64)
    case = replace(SMALL, H=1, T=70, K=20, V=20)
    trial = trials.timed_trial(case, torch.float32, replace(machine, impl="triton", cache_bytes=0))
    packed = trials.packed_trial(case, torch.float32, replace(machine, impl="triton"))
    rows = [
        FORMULA._replace(kernel=kernel, width=20, heads=1, block=16, warps=8, stages=2)
        for kernel in table.KERNELS
    ]
    with table.using(rows):
        trial.check()
        packed.check()
    monkeypatch.setattr(trial, "allowed", [(0.0, 0.0)] * 5)
    monkeypatch.setattr(trial, "eps", 0.0)
    with pytest.raises(ValueError, match="output is off by"):
        trial.check()


def test_candidates_are_near_and_fit():
    shared = 227 << 10
    default = Row("sm90", "expand", "bf16", 512, 64, 1, 64, 4, 4)
    found = candidates(default, shared)
    assert default not in found and len(set(found)) == len(found) <= 17
    changed = [sum(a != b for a, b in zip(row.tile, default.tile, strict=True)) for row in found]
    assert changed == sorted(changed) and changed[0] == 1, "nearest first"
    for row in found:
        assert table.checked(row._asdict()) == row and row.key == default.key
        assert row.block in (32, 64, 128) and row.stages in (2, 3, 4)
        assert row.stages * stage_bytes(row) <= shared
    narrow = candidates(default._replace(width=40), shared)
    assert max(row.block for row in narrow) == 64
    less = candidates(default, 99 << 10)
    assert set(less) < set(found) and (128, 4, 4) not in {row.tile for row in less}
    single = default._replace(dtype="fp32", block=32, stages=1)
    assert {row.stages for row in candidates(single, shared)} == {1, 2, 3, 4}
    many = default._replace(slots=256, block=32)
    assert {(row.block, row.warps) for row in candidates(many, shared)} >= {(64, 8)}
    assert (64, 4) not in {(row.block, row.warps) for row in candidates(many, shared)}


def test_write_back_takes_its_warps_from_the_keys(machine):
    tuner = Tuner(TuneConfig(dtype="fp32"), machine, Budget(0.0, machine.clock))
    case = replace(SMALL, V=24)
    defaults = [row for row in tuner.defaults(case) if row.kernel == "write_back"]
    assert [row.width for row in defaults] == [40, 24] and len(list(tuner.defaults(SMALL))) == 4
    keys, values = defaults
    assert {row.warps for row in tuner.launches(keys, case, [])} == {4, 8}
    assert {row.warps for row in tuner.launches(values, case, [])} == {4}
    assert {row.warps for row in tuner.launches(values, case, [keys._replace(warps=8)])} == {8}


def test_a_single_wrong_number_is_seen(machine):
    exact = torch.randn(100_000, dtype=torch.float64)
    wrong = exact.clone()
    wrong[5] += exact.abs().max() / 2
    norm, worst = trials.relative_errors(wrong.float(), exact)
    assert norm < 0.01 and worst == pytest.approx(0.5, rel=1e-3)


def test_shapes_share_rows_whatever_batch_and_length():
    long = replace(SMALL, name="long", B=3, T=5000, H=4, G=2, M=16)
    other = replace(SMALL, name="other", H=1)
    assert shapes([SMALL, other, long]) == [[SMALL, long], [other]]
    assert not runs("scan", SMALL) and runs("scan", long) and runs("expand", SMALL)


def test_a_decided_key_without_a_winner_goes_back_to_the_formula():
    row = FORMULA._replace(block=64)
    gone = trials.Finding(default=FORMULA)
    kept = trials.Finding(default=FORMULA, unknown="not tried")
    won = trials.Finding(default=FORMULA, best=row, unknown="3 not tried")
    assert extended([row], [gone]) == [] and extended([row], [kept]) == [row]
    assert extended([], [won]) == [row]
    shown = tile_table(trials.Finding(default=FORMULA, ms=2.0, ratios={row: 0.9}, best=row))
    assert "written" in shown and "1.8000" in shown and "0.900" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": (4, 3, 64, 64, 64)}, "sizes: expected H G K V M"),
        ({"sizes": (4, 4, 64, 64)}, "sizes: expected H G K V M"),
        ({"sizes": (4, 4, 64, 64, 300)}, "M at most 256"),
        ({"sizes": (4, 4, 64, 64, 64), "cases": ("1.3B",)}, "either cases or sizes"),
        ({"cases": ("step",)}, "cases: expected groups"),
        ({"tokens": 0}, "tokens: expected at least 1"),
        ({"seconds": float("nan")}, "seconds: expected at least 0"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TuneConfig(**options)
