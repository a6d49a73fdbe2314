"""Launches by the CUDA driver, their parameters laid out once.

Triton's launcher takes arguments apart at every call, asks the driver about every pointer and makes
every descriptor anew. Here a call puts new addresses where they belong, and nothing else. That
parameters lie as is thought is checked against what the driver knows of the compiled kernel; where
it is not so, in a Triton to come, its own launcher is used.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from gsa.ops.triton.steps import CheckedDescriptor, Place, Step, Tiles

NUMBERS = {
    "i1": ctypes.c_bool, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float
}  # fmt: skip
"""Kinds of numbers among the arguments. What fp32 cannot hold is infinite."""

MAP_BYTES = 128
"""Of a descriptor as the device takes it (CUtensorMap)."""


def launches(
    device: torch.device, steps: list[Step], kernels: list[Any]
) -> Callable[[Sequence[Tensor | None]], None]:
    """A function from tensors, numbered as in the steps' places, to their launches.

    kernels: the steps' own, compiled and loaded on the device.
    """
    try:
        return Launches(device, steps, kernels)
    except (Unknown, AttributeError, ImportError, OSError):  # Triton or a driver without such
        return ByTriton(device, steps, kernels)


class Unknown(Exception):
    """Parameters are not where they are thought to be."""


def addresses(given: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in given]


class Launches:
    """See `launches`."""

    def __init__(self, device: torch.device, steps: list[Step], kernels: list[Any]):
        self.index = device.index
        self.lock = threading.Lock()  # the driver copies parameters when it launches
        self.before: list[int] = []
        self.words: Any = None
        self.pointers: list[tuple[int, int, int]] = []  # word, number, bytes after it
        self.maps: list[tuple[int, int, int]] = []  # address of a map, number, bytes after it
        self.objects: list[object] = []  # what holds the maps
        values: list[int] = []
        calls: list[tuple[Any, list[tuple[bool, int]]]] = []
        for step, kernel in zip(steps, kernels, strict=True):
            parameters = list(self.parameters(step, kernel, values))
            if step.programs:
                calls.append(((step, kernel), parameters))
        self.words = (ctypes.c_uint64 * max(len(values), 1))(*values)
        first = ctypes.addressof(self.words)
        self.calls = []
        for (step, kernel), parameters in calls:
            where = [x if outside else first + 8 * x for outside, x in parameters]
            fixed = (ctypes.c_void_p(kernel.function), *dimensions(step, kernel))
            self.calls.append((fixed, (ctypes.c_void_p * len(where))(*where)))

    def parameters(self, step: Step, kernel: Any, values: list[int]) -> Iterator[tuple[bool, int]]:
        """Those of a kernel in order: (whether it lies outside `words`, its address or word)."""
        meta = kernel.metadata
        if (
            meta.num_ctas != 1 or meta.launch_pdl or meta.launch_cooperative_grid
            or meta.global_scratch_size or meta.profile_scratch_size
        ):  # fmt: skip
            raise Unknown
        found: list[tuple[bool, int]] = []
        sizes: list[int] = []
        descriptors = iter(meta.tensordesc_meta or ())

        def add(kind: Any, number: float) -> None:
            sizes.append(ctypes.sizeof(kind))
            found.append((False, len(values)))
            values.append(int.from_bytes(bytes(kind(number)), "little"))

        types = kernel.src.signature
        for name, x, place in zip(step.kernel.arg_names, step.arguments, step.places, strict=False):
            kind = types[name]
            if kind == "constexpr":
                continue
            if isinstance(place, Tiles):
                what, known = place.tiles, next(descriptors, None)
                if not kind.startswith("tensordesc") or known is None:
                    raise Unknown
                address = self.tensor_map(place.place, what, known)
                sizes.append(MAP_BYTES)
                found.append((True, address))
                for n in what.shape:
                    add(ctypes.c_int32, n)
                for n in what.strides:
                    add(ctypes.c_int64, n)
            elif place is not None and kind.startswith("*"):
                self.pointers.append((len(values), *place))
                add(ctypes.c_uint64, 0)
            elif place is None and kind in NUMBERS:
                add(NUMBERS[kind], x)
            else:
                raise Unknown
        add(ctypes.c_uint64, 0)  # scratch memory of the kernel's own, and of a profiler: none
        add(ctypes.c_uint64, 0)
        if sizes != list(parameter_sizes(kernel.function)):
            raise Unknown
        return iter(found)

    def tensor_map(self, place: Place, tiles: Any, known: Any) -> int:
        """The address of a descriptor's map, which Triton makes."""
        from triton.backends.nvidia.driver import make_tensordesc_arg

        first, second = Address(1 << 30), 1 << 31
        sketch = CheckedDescriptor(first, tiles.shape, tiles.strides, tiles.block_shape)
        try:
            made = make_tensordesc_arg(sketch, known)[0]
            address = id(made) + type(made).__basicsize__ - MAP_BYTES  # the last of the object
            if ctypes.c_uint64.from_address(address).value != first.address:
                raise Unknown
            replace_address(address, second)
        except RuntimeError as error:
            raise Unknown from error
        if ctypes.c_uint64.from_address(address).value != second:
            raise Unknown
        self.objects.append(made)
        self.maps.append((address, *place))
        return address

    def __call__(self, given: Sequence[Tensor | None]) -> None:
        now = addresses(given)
        stream = driver.active.get_current_stream(self.index)  # pyright: ignore[reportAttributeAccessIssue]
        with self.lock:
            if now != self.before:
                before = self.before or [-1] * len(now)
                self.before = []  # not known until all are written: Ctrl-C may come
                words = self.words
                for word, number, offset in self.pointers:
                    words[word] = now[number] + offset
                for address, number, offset in self.maps:
                    if now[number] != before[number]:
                        replace_address(address, now[number] + offset)
                self.before = now
            launch = library().cuLaunchKernel
            for fixed, parameters in self.calls:
                check(launch(*fixed, stream, parameters, None))


class Address:
    """An address in the place of a tensor."""

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class ByTriton:
    """The same by Triton's launcher."""

    def __init__(self, device: torch.device, steps: list[Step], kernels: list[Any]):
        self.steps, self.kernels = steps, kernels

    def __call__(self, given: Sequence[Tensor | None]) -> None:
        now = addresses(given)

        def argument(x: Any, place: Place | Tiles | None) -> object:
            if isinstance(place, Tiles):
                tiles, (number, offset) = place.tiles, place.place
                base = Address(now[number] + offset)
                return CheckedDescriptor(base, tiles.shape, tiles.strides, tiles.block_shape)
            return x if place is None else now[place.number] + place.offset

        for step, kernel in zip(self.steps, self.kernels, strict=True):
            if step.programs:
                arguments = map(argument, step.arguments, step.places)
                rest = (None,) * (len(step.kernel.arg_names) - len(step.arguments))
                kernel[(step.programs, 1, 1)](*arguments, *rest)


def dimensions(step: Step, kernel: Any) -> tuple[Any, ...]:
    """Of the grid and of a block, and bytes of shared memory."""
    threads = 32 * kernel.metadata.num_warps
    sizes = (step.programs, 1, 1, threads, 1, 1, kernel.metadata.shared)
    return tuple(ctypes.c_uint(n) for n in sizes)


@cache
def library() -> Any:
    """The CUDA driver."""
    found = ctypes.CDLL("libcuda.so.1")
    pointer, number, size = ctypes.c_void_p, ctypes.c_uint, ctypes.c_size_t
    found.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    found.cuTensorMapReplaceAddress.argtypes = [pointer, pointer]
    found.cuFuncGetParamInfo.argtypes = [pointer, size, pointer, pointer]
    found.cuGetErrorName.argtypes = [ctypes.c_int, pointer]
    return found


def check(status: int) -> None:
    if status:
        name = ctypes.c_char_p()
        library().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"CUDA driver: {(name.value or b'unknown error').decode()} ({status})")


def replace_address(tensor_map: int, address: int) -> None:
    check(library().cuTensorMapReplaceAddress(tensor_map, address))


def parameter_sizes(function: int) -> Iterator[int]:
    """Bytes of each parameter of a kernel."""
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    ask = library().cuFuncGetParamInfo
    i = 0
    while ask(function, i, ctypes.byref(offset), ctypes.byref(size)) == 0:
        yield size.value
        i += 1
