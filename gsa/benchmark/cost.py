"""The fewest bytes an operation can move: each input read once, each output written once.

Divided by the bandwidth of a copy this is a floor of its time. What an implementation reads or
writes besides (memories at chunk boundaries, saved scores) is its own affair.
"""

import math
from dataclasses import dataclass

from gsa.benchmark.cases import Case


@dataclass(frozen=True, kw_only=True)
class Bytes:
    forward: int
    backward: int

    @property
    def forward_backward(self) -> int:
        return self.forward + self.backward


def input_bytes(case: Case) -> int:
    """q, k, v in bf16, log_forget in fp32."""
    per_token = 2 * (case.H * case.K + case.G * (case.K + case.V)) + 4 * case.G * case.M
    return case.B * case.T * per_token


def output_bytes(case: Case) -> int:
    """The output, or its gradient, in bf16."""
    return 2 * case.B * case.T * case.H * case.V


def memory_bytes(case: Case) -> int:
    """The memory of B sequences, in fp32."""
    return 4 * case.B * case.G * case.M * (case.K + case.V)


def attention_bytes(case: Case) -> Bytes:
    """Forward: inputs in, output and final memory out. Backward: inputs and the output's gradient
    in, the inputs' gradients out."""
    inputs, output = input_bytes(case), output_bytes(case)
    return Bytes(forward=inputs + output + memory_bytes(case), backward=inputs + output + inputs)


def step_bytes(case: Case) -> int:
    """One token: the memory read and written. Its query, key and value do not count."""
    return 2 * memory_bytes(case)


def set_count(set_bytes: int, cache_bytes: int) -> int:
    """Input sets to rotate among, so that they exceed a cache twice over."""
    return max(1, math.ceil(2 * cache_bytes / max(set_bytes, 1)))
