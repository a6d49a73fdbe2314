"""A CPU in the GPU's place: the same measuring code, a meter without a device, and cases that have
the names of real ones but tiny sizes."""

import time
from functools import partial

import pytest
import torch

from gsa.benchmark.cases import Case
from gsa.benchmark.ceilings import Ceilings
from gsa.benchmark.ops_gpu import Machine
from gsa.benchmark.peers import Fla
from gsa.benchmark.timing import Prepared, interleaved
from gsa.ops import gated_slot_attention, gated_slot_step

tiny = partial(Case, H=4, G=2, K=8, V=8, M=4)
TINY_CASES = (
    tiny(group="cold-start", name="cold-start", B=1, T=8),
    tiny(group="step", name="step B=1", B=2, T=1),
    tiny(group="1.3B", name="1.3B 8x2048", B=2, T=16),
    tiny(group="1.3B", name="1.3B 1x16384", B=1, T=24),
    Case(group="table", name="M=32 K=V=64", H=2, G=2, K=5, V=5, M=3, B=1, T=8),
)


class HostMeter:
    """Times on the host; device memory is made up."""

    peak = 3 * 2**20

    def first_call(self, run):
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def prepare(self, run):
        return Prepared(run=run, timer="events")

    def in_turns(self, work, seconds):
        runs = {name: one.run for name, one in work.items()}
        return interleaved(runs, seconds=seconds, max_calls=3)

    def eager(self, run, seconds):
        return self.first_call(run)

    def peak_bytes(self, run):
        run()
        return self.peak

    def release(self):
        pass


@pytest.fixture
def machine():
    return Machine(
        device=torch.device("cpu"),
        impl="chunked",
        meter=HostMeter(),
        cache_bytes=4000,
        ceilings=lambda: Ceilings(copy_bytes_per_second=2e9, matmul_flops_per_second=1e12),
        cold_start=lambda case, timeout: {
            "total_seconds": 3.0,
            "without_import_seconds": 2.0,
            "kernels_compiled": 7,
        },
        cases=TINY_CASES,
    )


def chunk(q, k, v, s, g, scale):
    return gated_slot_attention(q, k, v, g, write=s, scale=scale, impl="reference").output, None


def step(q, k, v, s, g, scale, initial_state, output_final_state):
    assert output_final_state
    keys, values = initial_state
    k, v, s, g = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v, s, g))
    memory = torch.cat([keys.transpose(-1, -2), values], -1)
    memory = memory.repeat_interleave(q.shape[2] // memory.shape[1], 1)
    return gated_slot_step(q, k, v, g, memory, write=s, scale=scale)


@pytest.fixture
def fla():
    """A library with fla's signatures and our reference inside."""
    return Fla(version="9.9", import_seconds=1.5, chunk=chunk, step=step)
