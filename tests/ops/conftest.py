import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numerics import HOME

from gsa.ops.triton import sizes

IMPLS = ["reference", "chunked"]
if torch.cuda.is_available():
    IMPLS.append("triton")


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every implementation that runs here at full speed, with inputs of a kind that it takes.

    In Triton's interpreter, `test_triton_operator.py` has cases small enough for it.
    """
    if request.param == "triton":
        monkeypatch.setattr(HOME, "device", "cuda")
        monkeypatch.setattr(HOME, "dtype", torch.float32)
    return request.param


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, in_bounds: None) -> None:
    """Inputs for the kernels: on the GPU if there is one, else for Triton's interpreter."""
    monkeypatch.setattr(HOME, "device", "cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(HOME, "dtype", torch.float32)
    monkeypatch.setattr(sizes, "span_tokens", lambda: 256)  # so that few tokens have several spans


class Guard:
    """The interpreter's loads and stores, which may touch what the kernel was given and no more."""

    def __init__(self, native: object) -> None:
        self.native = native
        self.begins = self.ends = np.zeros(0, np.uint64)

    def __getattr__(self, name: str) -> object:
        return getattr(self.native, name)

    def admit(self, arguments: list[object]) -> None:
        tensors = [getattr(x, "base", x) for x in arguments]
        tensors = [x for x in tensors if isinstance(x, torch.Tensor) and x.numel()]
        begins = [x.data_ptr() for x in tensors]
        spans = [
            sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in tensors
        ]
        ends = [
            begin + (span + 1) * x.element_size()
            for begin, span, x in zip(begins, spans, tensors, strict=True)
        ]
        self.begins, self.ends = (np.array(x, np.uint64) for x in (begins, ends))

    def check(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        touched = pointers[np.broadcast_to(mask, pointers.shape).astype(bool, copy=False)]
        if touched.size:  # an access reaches into one tensor
            first, last = touched.min(), touched.max() + np.uint64(size)
            inside = (self.begins <= first) & (last <= self.ends)
            assert inside.any(), "an access outside of every tensor"

    def load(self, pointers, mask, other, dtype):
        self.check(pointers, mask, np.dtype(dtype).itemsize)
        return self.native.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.check(pointers, mask, value.dtype.itemsize)
        return self.native.store(pointers, value, mask)


@pytest.fixture
def in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels in the interpreter fail where they touch memory that is not theirs."""
    if torch.cuda.is_available():
        return  # compute-sanitizer does that
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    guard = Guard(interpreter._interpreter)
    prepare: Callable = interpreter.GridExecutor._init_args_hst

    def admitted(self, args, kwargs):
        hosted = prepare(self, args, kwargs)
        guard.admit([*hosted[0], *hosted[1].values()])
        return hosted

    monkeypatch.setattr(interpreter, "_interpreter", guard)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", admitted)
    patch, first = interpreter._patch_builtin, {}

    def patch_once(place, builder, scope):
        """A function called by a kernel looks for what to patch anew: a quarter of the time."""
        if place not in first:
            first[place] = [n for n, member in inspect.getmembers(place) if is_builtin(member)][:1]
        if any(is_builtin(getattr(place, name)) for name in first[place]):
            patch(place, builder, scope)

    monkeypatch.setattr(interpreter, "_patch_builtin", patch_once)
