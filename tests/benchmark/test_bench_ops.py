"""The operator benchmark at tiny sizes: what it writes is what it measured."""

import json

import pytest
import torch

from gsa.benchmark.ops import BenchOpsConfig, bench_ops
from gsa.benchmark.timing import interleaved

TINY = dict(heads=2, width=8, slots=4, seconds=0.01, threads=1)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_hold_what_was_asked_and_the_last_line_is_the_result(tmp_path, capsys):
    out = tmp_path / "deep" / "ops.json"
    config = BenchOpsConfig(tokens=(8, 16, 32), max_loop=8, max_attention=16, out=str(out), **TINY)
    result = bench_ops(config)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))
    timed = [
        {key.split("_")[0] for key in row if key.endswith("_seconds")} for row in result["rows"]
    ]
    assert timed == [{"chunked", "loop", "attention"}, {"chunked", "attention"}, {"chunked"}]
    row = result["rows"][0]
    ratio = row["loop_seconds"]["median"] / row["chunked_seconds"]["median"]
    assert row["loop_over_chunked"] == pytest.approx(ratio, abs=0.006)
    assert row["chunked_us_per_token"] == pytest.approx(
        row["chunked_seconds"]["median"] / 8 * 1e6, abs=0.006
    )
    assert result["environment"]["threads"] == 1
    assert result["environment"]["torch"] == torch.__version__


def test_functions_are_timed_in_turns():
    order = []
    timings = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, max_calls=3
    )
    assert order == ["a", "b"] * 4  # one round to warm up, three to measure
    assert timings["a"].calls == 3
    assert timings["a"].fastest <= timings["a"].median <= timings["a"].slowest


@pytest.mark.parametrize(
    ("field", "value"), [("tokens", ()), ("tokens", (0,)), ("heads", 0), ("slots", -1)]
)
def test_impossible_sizes_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        BenchOpsConfig(**{**TINY, field: value})
