"""Who is measured on the GPU: our operator, softmax attention, a library's operator; same inputs.

A contender holds its inputs and how to call it. What is timed runs over all of its input sets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from gsa.benchmark.cases import Case
from gsa.benchmark.cost import input_bytes, set_count
from gsa.ops import Impl, gated_slot_attention


@dataclass(frozen=True, kw_only=True)
class InputSet:
    """q, k, v in bf16, log_forget in fp32 as the model makes it, and the output's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_forget: Tensor
    d_output: Tensor


def make_inputs(case: Case, device: torch.device, cache_bytes: int) -> list[InputSet]:
    """Random inputs, as many sets as exceed the cache twice over."""
    B, T, H, G, K, V, M = case.B, case.T, case.H, case.G, case.K, case.V, case.M

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    sets = []
    for _ in range(set_count(input_bytes(case), cache_bytes)):
        logits = torch.randn(B, T, G, M, device=device) + 1
        sets.append(
            InputSet(
                q=normal(B, T, H, K),
                k=normal(B, T, G, K),
                v=normal(B, T, G, V),
                log_forget=F.logsigmoid(logits) / 8,
                d_output=normal(B, T, H, V),
            )
        )
    return sets


@dataclass(frozen=True, kw_only=True)
class Contender:
    """inputs: leaves that want gradients, one tuple per set. call: from them to the output."""

    inputs: list[tuple[Tensor, ...]]
    d_outputs: list[Tensor]
    call: Callable[..., Tensor]
    forward_too: bool = True
    """False if its forward pass alone is the same as another contender's."""

    @torch.no_grad()
    def forward(self) -> None:
        for inputs in self.inputs:
            self.call(*inputs)

    def forward_backward(self) -> None:
        for inputs, d_output in zip(self.inputs, self.d_outputs, strict=True):
            torch.autograd.grad(self.call(*inputs), inputs, d_output)

    def results(self) -> list[Tensor]:
        """Output and gradients of the first set."""
        output = self.call(*self.inputs[0])
        gradients = torch.autograd.grad(output, self.inputs[0], self.d_outputs[0])
        return [output.detach(), *gradients]

    @property
    def sets(self) -> int:
        return len(self.inputs)

    def set_bytes(self) -> int:
        """Of one set's inputs, the output's gradient included."""
        return sum(x.numel() * x.element_size() for x in (*self.inputs[0], self.d_outputs[0]))


def leaf(tensor: Tensor) -> Tensor:
    """The same storage as an input that wants a gradient."""
    return tensor.detach().requires_grad_()


def _call_ours(impl: Impl, recompute: bool, *inputs: Tensor) -> Tensor:
    return gated_slot_attention(*inputs, impl=impl, recompute=recompute).output


def ours(sets: Sequence[InputSet], impl: Impl, *, recompute: bool) -> Contender:
    inputs = [tuple(leaf(x) for x in (one.q, one.k, one.v, one.log_forget)) for one in sets]
    return Contender(
        inputs=inputs,
        d_outputs=[one.d_output for one in sets],
        call=partial(_call_ours, impl, recompute),
        forward_too=recompute,
    )


def attention_heads(case: Case) -> tuple[int, int, int]:
    """(query heads, key/value heads, width) of softmax attention over as many numbers per token.

    Heads are 128 wide where that divides, as in FlashAttention's own measurements.
    """
    width = 128 if case.H * case.K % 128 == 0 == case.G * case.K % 128 else case.K
    return case.H * case.K // width, case.G * case.K // width, width


def sdpa(case: Case, sets: Sequence[InputSet]) -> Contender:
    """Causal attention by torch, through views of our inputs: [B, T, heads, width], transposed."""
    heads, kv_heads, _ = attention_heads(case)

    def by_head(tensor: Tensor, count: int) -> Tensor:
        return tensor.detach().view(case.B, case.T, count, -1).transpose(1, 2)

    inputs = [
        tuple(
            leaf(by_head(x, n)) for x, n in ((one.q, heads), (one.k, kv_heads), (one.v, kv_heads))
        )
        for one in sets
    ]
    return Contender(
        inputs=inputs,
        d_outputs=[by_head(one.d_output, heads) for one in sets],
        call=partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=heads != kv_heads),
    )
