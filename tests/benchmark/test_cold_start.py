"""Cold start in a real child process, on a CPU."""

import pytest

from gsa.benchmark.cases import Case
from gsa.benchmark.cold_start import cold_start

CASE = Case(group="x", name="x", H=2, G=1, K=8, V=8, M=4, B=1, T=8)


def test_seconds_add_up():
    found = cold_start(CASE, device="cpu", impl="chunked", timeout=120)
    parts = [found[f"{part}_seconds"] for part in ("python", "import", "device", "operator")]
    assert found["total_seconds"] == pytest.approx(sum(parts), abs=0.005)
    without_import = found["total_seconds"] - found["python_seconds"] - found["import_seconds"]
    assert found["without_import_seconds"] == pytest.approx(without_import, abs=0.005)
    assert found["import_seconds"] > 0.1 and found["kernels_compiled"] == 0


def test_a_failure_and_a_timeout_say_so():
    found = cold_start(CASE, device="cpu", impl="abacus", timeout=120)
    assert found["failed"].startswith("ValueError: impl: expected one of")
    assert cold_start(CASE, device="cpu", impl="chunked", timeout=0.01) == {
        "failed": "not done after 0.01 s"
    }
