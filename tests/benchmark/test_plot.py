"""The tables and the plot of a result document with real cases and made-up times."""

import copy
import json

import pytest

from gsa.benchmark.cases import ATTENTION_CASES, STEP_CASES
from gsa.benchmark.cost import attention_bytes, step_bytes
from gsa.benchmark.plot import PlotConfig, bench_plot, merged_rows, title_of
from gsa.benchmark.tables import aligned, tables

imread = pytest.importorskip("matplotlib.image").imread

TIMES = {"ours": (0.25, 1.0), "ours_saved": (None, 0.9), "fla": (0.5, 2.25), "sdpa": (0.3, 1.2)}


def cell(ms, floor_ms, ours_ms):
    return {
        "ms": ms,
        "fastest_ms": ms - 0.01,
        "slowest_ms": ms + 0.02,
        "eager_ms": ms * 2,
        "floor_fraction": floor_ms / ms,
        "over_ours": ms / ours_ms,
    }


def row(case):
    moved = attention_bytes(case)
    floors = {"forward": moved.forward / 3e9, "forward_backward": moved.forward_backward / 3e9}
    contenders = {}
    for name, times in TIMES.items():
        facts = {"first_call_seconds": 4.0, "inputs_mib": 336.0, "peak_mib": 100.0 * times[1]}
        for mode, ms, ours in zip(floors, times, TIMES["ours"], strict=True):
            if ms is not None:
                facts[mode] = cell(ms, floors[mode], ours)
        contenders[name] = facts
    missing = {}
    if case.group == "table":
        del contenders["fla"]
        missing["fla"] = "not run: 9 s of the budget were left"
    return {"case": case.name, "floor_ms": floors, "contenders": contenders, "missing": missing}


def step_row(case):
    way = {"us": 4.0, "fastest_us": 3.5, "slowest_us": 4.5, "eager_us": 20.0}
    floor = step_bytes(case) / 3e6
    ways = {name: way | {"over_floor": 4 / floor, "over_ours": 1.0} for name in ("ours", "fla")}
    return {"case": case.name, "floor_us": floor, "ways": ways, "missing": {}}


@pytest.fixture
def document():
    return {
        "benchmark": "ops-gpu",
        "environment": {
            "device": "NVIDIA H100 80GB HBM3",
            "torch": "2.11.0",
            "triton": "3.6.0",
            "commit": "abc1234",
            "flash-linear-attention": "0.6.0",
        },
        "ceilings": {"copy_bytes_per_second": 3.0e12, "matmul_flops_per_second": 7.24e14},
        "fla": {"version": "0.6.0", "import_seconds": 9.5, "triton_cache_entries_at_start": 0},
        "cold_start": {
            "total_seconds": 14.2,
            "without_import_seconds": 9.9,
            "kernels_compiled": 12,
        },
        "not_run": [],
        "rows": [row(case) for case in ATTENTION_CASES],
        "steps": [step_row(case) for case in STEP_CASES],
    }


def line_of(text, begin):
    return next(line.split() for line in text.splitlines() if line.startswith(begin))


def test_tables_hold_the_figures(document):
    text = tables(document)
    assert text.startswith("NVIDIA H100 80GB HBM3: copy 3.00 TB/s, matmul 724 TFLOP/s")
    forward, rest = text.split("\n\nforward + backward\n")
    line = line_of(forward, "1.3B 1x16384")[2:]
    assert line == [
        "0.095",
        "0.250",
        "0.240-0.270",
        "38%",
        "0.500",
        *["2.00", "1.20", "0.500", "0.300"],
        "1.000",
    ]
    line = line_of(rest, "1.3B 1x16384")[2:]
    assert line[:6] == ["0.263", "1.000", "0.990-1.020", "26%", "2.000", "0.900"]
    assert line_of(forward, "M=128 K=V=256")[-3:] == ["–", "0.300", "–"]
    assert line_of(rest, "step B=1 new memory")[-5:-3] == ["4.00", "3.50-4.50"]
    assert "cold start, ours: 14.2 s to the first gradients, 9.9 s without imports" in text
    assert "first call, fla: 4.0 s at 1.3B 8x2048, after 9.5 s of import" in text
    reason = text.splitlines()[-1]
    assert reason.startswith("fla not run: 9 s of the budget were left (M=32 K=V=64; ")
    assert reason.count("M=") == 9


def test_columns_line_up():
    assert aligned([["a", "10", "x"], ["bbb", "2", "yy"]]) == "a    10   x\nbbb   2  yy"


def test_an_empty_result_has_tables(document):
    document |= {"rows": [], "steps": [], "not_run": ["1.3B 8x2048"]}
    del document["cold_start"]
    assert tables(document).splitlines()[-1] == "not run: 1.3B 8x2048"


def written(path, document):
    path.write_text(json.dumps(document))
    return str(path)


def test_the_plot_grows_with_its_rows(document, tmp_path):
    path = bench_plot(PlotConfig(results=(written(tmp_path / "all.json", document),)))
    assert path == tmp_path / "all.png"
    document["rows"] = document["rows"][:3]
    few = PlotConfig(
        results=(written(tmp_path / "few.json", document),), out=str(tmp_path / "x.png")
    )
    large, small = imread(path), imread(bench_plot(few))
    assert large.shape[0] > 2 * small.shape[0] and large.shape[1] == small.shape[1]
    assert large.min() < 0.2 and (large[..., :3] == 1).mean() > 0.8  # ink on white
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "all.json",
        "all.png",
        "few.json",
        "x.png",
    ]


def test_results_of_one_device_merge_and_the_last_counts(document):
    other = copy.deepcopy(document)
    other["rows"] = [{**document["rows"][0], "floor_ms": {"forward": 7.0}}]
    document["rows"] = document["rows"][:2]
    rows = merged_rows([document, other])
    assert [row["case"] for row in rows] == ["1.3B 8x2048", "1.3B 4x4096"]
    assert rows[0]["floor_ms"] == {"forward": 7.0}
    other["environment"]["device"] = "NVIDIA H200"
    with pytest.raises(ValueError, match="one device, got NVIDIA H100 80GB HBM3, NVIDIA H200"):
        merged_rows([document, other])


def test_the_title_says_where_and_with_what(document):
    assert title_of([document]).splitlines() == [
        "Gated Slot Attention, bf16, on NVIDIA H100 80GB HBM3",
        "torch 2.11.0, triton 3.6.0, fla 0.6.0, commit abc1234",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "ops"}'])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: expected"):
        bench_plot(PlotConfig(results=(str(tmp_path / "x.json"),)))
