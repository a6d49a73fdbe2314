"""Launching and compiling kernels."""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from gsa.ops.triton import common

INTERPRETED = not isinstance(common.plan_kernel, triton.JITFunction)
"""Whether kernels run on the CPU in Triton's interpreter."""

Constants = dict[str, object]
"""The compile-time parameters of a kernel, which follow its arguments, and its launch options."""


class Machine(Protocol):
    """What allocates and launches for a call (`Plan`)."""

    device: torch.device

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised."""
        ...

    def launch(
        self, kernel: Any, programs: int, arguments: tuple[object, ...], constants: Constants
    ) -> None: ...


class Direct:
    """At once, by Triton's own launcher."""

    def __init__(self, device: torch.device):
        self.device = device

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def launch(self, kernel, programs, arguments, constants) -> None:
        kernel[(programs,)](*arguments, **constants)


Job = tuple[Any, Sequence[object], Constants]
"""A launch that is to be compiled: kernel, arguments (tensors may be on the meta device)."""


def compile_all(jobs: Sequence[Job], device: torch.device) -> list[Any]:
    """The compiled kernels, loaded on the device. Those that are not yet are compiled all at once:
    a kernel takes seconds, most of them in LLVM and ptxas, which share a processor well."""

    def load(kernel: Any) -> None:  # a thread begins on the first device, whatever its maker's
        with torch.cuda.device(device):
            kernel.run  # noqa: B018  # loads it, and builds its launcher

    def begin(pool: ThreadPoolExecutor) -> list[Any]:
        with triton.AsyncCompileMode(pool):
            return [
                kernel.warmup(*arguments, grid=(1,), **constants)
                for kernel, arguments, constants in jobs
            ]

    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        # The mode stays on in its context where a kernel does not compile, or Ctrl-C comes.
        found = copy_context().run(begin, pool)
        kernels = [x.result() if hasattr(x, "result") else x for x in found]
        list(pool.map(load, [x for x in kernels if x.module is None]))
    return kernels


class Entered(threading.local):
    """Devices whose context is this thread's own."""

    def __init__(self) -> None:
        self.devices: set[torch.device] = set()


entered = Entered()


def enter_context(device: torch.device) -> None:
    """Makes this thread ready for calls of the CUDA driver, which asks for a context: autograd's
    threads may have none yet."""
    if device.type == "cuda" and device not in entered.devices:
        torch.cuda.mem_get_info(device)
        entered.devices.add(device)
