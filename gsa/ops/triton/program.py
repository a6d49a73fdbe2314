"""Launching kernels: compiled side by side the first time, not looked up again after that.

Finding a compiled kernel by its arguments takes Triton longer than some kernels run. What decides
between the compiled forms of a kernel is known here: the kind of call (`Recipe` in `plan.py`),
which arguments are None, and that addresses are multiples of 16.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gsa.ops.triton import common

INTERPRETED = not isinstance(common.plan_kernel, triton.JITFunction)
"""Whether kernels run on the CPU in Triton's interpreter."""

Launcher = Callable[[Hashable, Any, int, tuple[object, ...], Callable[[], dict[str, object]]], None]
"""From (name, kernel, programs, arguments, constants) to nothing.

The name tells a launch from others of its kind of call, and determines `constants`, the
compile-time parameters that follow the arguments in the kernel's signature.
"""


class Job(NamedTuple):
    """A launch that is to be compiled."""

    kernel: Any
    arguments: tuple[object, ...]
    constants: dict[str, object]


class Programs:
    """The compiled kernels of a kind of call."""

    def __init__(self) -> None:
        self.compiled: dict[Hashable, tuple[Any, tuple[None, ...]]] = {}
        self.begun: set[Hashable] = set()

    def launch(self, name, kernel, programs, arguments, constants) -> None:
        """A `Launcher`; addresses of all arguments are multiples of 16."""
        key = (name, *[x is None for x in arguments])
        if known := self.compiled.get(key):
            compiled, rest = known
            compiled[(programs, 1, 1)](*arguments, *rest)
        else:
            compiled = kernel[(programs,)](*arguments, **constants())
            rest = (None,) * (len(kernel.arg_names) - len(arguments))  # where constants would be
            self.compiled[key] = (compiled, rest)


def launch_any(name, kernel, programs, arguments, constants) -> None:
    """A `Launcher` for any arguments: Triton looks for what fits."""
    kernel[(programs,)](*arguments, **constants())


class Jobs:
    """Collects what a call would launch, and compiles it."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def launch(self, name, kernel, programs, arguments, constants) -> None:
        """A `Launcher`; tensors may be on the meta device."""
        self.jobs.append(Job(kernel, arguments, constants()))

    def compile(self, device: torch.device) -> None:
        """All at once, for a device: a kernel takes seconds, most of them in LLVM and ptxas, which
        share a processor well."""

        def load(kernel: Any) -> None:  # a thread begins on the first device, whatever its maker's
            with torch.cuda.device(device):
                kernel.run  # noqa: B018  # loads it, and builds its launcher

        workers = min(len(self.jobs), os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            with triton.AsyncCompileMode(pool):
                found = [
                    job.kernel.warmup(*job.arguments, grid=(1,), **job.constants)
                    for job in self.jobs
                ]
            kernels = [x.result() if hasattr(x, "result") else x for x in found]
            list(pool.map(load, kernels))


def may_repeat(*arguments: Tensor | None) -> bool:
    """Whether what Triton compiles for these tensors fits all that do: see `Programs.launch`."""
    return not INTERPRETED and not any(x is not None and x.data_ptr() & 15 for x in arguments)


class Entered(threading.local):
    """Devices whose context is this thread's own."""

    def __init__(self) -> None:
        self.devices: set[torch.device] = set()


entered = Entered()


def enter_context(device: torch.device) -> None:
    """Makes this thread ready for descriptors, whose making asks for a CUDA context and, unlike a
    launch, does not see to it that there is one: autograd's threads may have none yet."""
    if device.type == "cuda" and device not in entered.devices:
        torch.cuda.mem_get_info(device)
        entered.devices.add(device)
