"""A call of the kernels noted down once, and played from then on.

To find out what to allocate and what to launch takes Python longer than the kernels run. It depends
on shapes, strides and dtypes alone: so a call is made once on tensors without memory, what it
launches is noted, and later calls put addresses in.
"""

# Triton's types do not describe what may stand in a kernel or be passed to one.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportReturnType=false

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gsa.ops.triton import cuda
from gsa.ops.triton.program import INTERPRETED, Constants, compile_all
from gsa.ops.triton.steps import CheckedDescriptor, Place, Step, Tiles

SCRATCH_ALIGNMENT = 256


class Tape:
    """What a call allocates and launches, whatever the addresses."""

    def __init__(
        self, device: torch.device, results: list[Tensor], scratch: int, steps: list[Step]
    ):
        """results: tensors on the meta device, made new for every call. scratch: bytes that the
        launches share; the last of what `run` is given."""
        self.device, self.scratch, self.steps = device, scratch, steps
        self.results = [(tuple(x.shape), x.dtype) for x in results]
        self.run: Callable[[Sequence[Tensor | None]], None] | None = None

    def jobs(self) -> list[tuple[Any, list[object], dict[str, object]]]:
        """What is to be compiled: (kernel, arguments without memory, constants)."""
        return [(step.kernel, step.arguments, step.constants) for step in self.steps]

    def ready(self, kernels: list[Any]) -> None:
        """kernels: the steps' own, compiled, and loaded on the device."""
        if INTERPRETED:
            self.run = lambda given: interpret(self.steps, given)
        else:
            self.run = cuda.launches(self.device, self.steps, kernels)

    def play(self, *inputs: Tensor | None) -> list[Tensor]:
        """inputs: in the order in which they were declared, of the same form, at multiples of 16
        bytes. Returns the results."""
        device = self.device
        results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.results]
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device)
        assert self.run is not None
        self.run((*inputs, *results, scratch))
        return results


class Recorder:
    """The machine of a call whose tensors are on the meta device: notes what it would do."""

    def __init__(self, device: torch.device):
        """device: where the call is going to run."""
        self.device = device
        self.inputs: dict[int, int] = {}  # from the storage to its number
        self.blocks: dict[int, int] = {}  # scratch: from the storage to its bytes
        self.held: list[Tensor] = []  # so that no storage is taken for another
        self.steps: list[Step] = []

    def input(self, form: "Form | None") -> Tensor | None:
        """The next input of the call; None keeps its number empty."""
        number = len(self.held)
        if form is None:
            self.held.append(torch.empty(0, device="meta"))
            return None
        shape, stride, dtype = form
        x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        self.held.append(x)
        self.inputs[storage(x)] = number
        return x

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device="meta")
        self.held.append(x)
        self.blocks[storage(x)] = x.untyped_storage().nbytes()
        return x

    def launch(self, kernel: Any, programs: int, arguments: tuple[object, ...],
               constants: Constants) -> None:  # fmt: skip
        for x in arguments:
            x = x.base if isinstance(x, TensorDescriptor) else x
            if isinstance(x, Tensor):
                assert storage(x) in self.inputs or storage(x) in self.blocks, "a hidden copy"
        self.steps.append(Step(kernel, programs, list(arguments), constants))

    def finish(self, *results: Tensor) -> Tape:
        """The tape; results are the call's own, made by `new`, whole."""
        places = {key: Place(number, 0) for key, number in self.inputs.items()}
        count = len(self.held) - len(self.blocks)
        for x in results:
            places[storage(x)] = Place(count, 0)
            count += 1
        passing = {key: size for key, size in self.blocks.items() if key not in places}
        offsets, scratch = arrange(passing, [mentioned(step) for step in self.steps])
        for key, offset in offsets.items():
            places[key] = Place(count, offset)
        steps = [step._replace(places=placed(step, places)) for step in self.steps]
        return Tape(self.device, list(results), scratch, steps)


Form = tuple[Sequence[int], Sequence[int], torch.dtype]
"""Shape, strides and dtype of a tensor."""


def form_of(x: Tensor | None) -> Form | None:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def mentioned(step: Step) -> set[int]:
    tensors = (x.base if isinstance(x, TensorDescriptor) else x for x in step.arguments)
    return {storage(x) for x in tensors if isinstance(x, Tensor)}


def arrange(sizes: dict[int, int], uses: list[set[int]]) -> tuple[dict[int, int], int]:
    """(where each block begins, bytes in all). uses: the blocks that each launch needs; blocks that
    are needed at the same time do not overlap, from the first use of each to its last."""
    spans: dict[int, tuple[int, int]] = {}
    for i, keys in enumerate(uses):
        for key in keys & sizes.keys():
            spans[key] = (spans.get(key, (i, i))[0], i)
    offsets: dict[int, int] = {}
    for key in sorted(spans, key=lambda key: (-sizes[key], spans[key])):
        first, last = spans[key]
        beside = sorted(
            (offsets[other], offsets[other] + sizes[other]) for other in offsets
            if spans[other][0] <= last and first <= spans[other][1]
        )  # fmt: skip
        offset = 0
        for begin, end in beside:
            if offset + sizes[key] <= begin:
                break
            offset = max(offset, -(-end // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT)
        offsets[key] = offset
    return offsets, max((offsets[key] + sizes[key] for key in offsets), default=0)


def placed(step: Step, places: dict[int, Place]) -> list[Place | Tiles | None]:
    found: list[Place | Tiles | None] = []
    for x in step.arguments:
        tiles = isinstance(x, TensorDescriptor)
        base = x.base if tiles else x
        if not isinstance(base, Tensor):
            found.append(None)
            continue
        number, offset = places[storage(base)]
        place = Place(number, offset + base.storage_offset() * base.itemsize)
        found.append(Tiles(place, x) if tiles else place)
    return found


def interpret(steps: list[Step], given: Sequence[Tensor | None]) -> None:
    """On the CPU, in Triton's interpreter."""

    def at(place: Place, like: Tensor) -> Tensor:
        base = given[place.number]
        assert base is not None
        first = base.storage_offset() * base.itemsize + place.offset
        assert first % like.itemsize == 0
        x = torch.empty(0, dtype=like.dtype, device=base.device)
        return x.set_(base.untyped_storage(), first // like.itemsize, like.shape, like.stride())

    for step in steps:
        arguments = []
        for x, place in zip(step.arguments, step.places, strict=True):
            if isinstance(place, Tiles):
                tiles = place.tiles
                base = at(place.place, tiles.base)
                x = CheckedDescriptor(base, tiles.shape, tiles.strides, tiles.block_shape)
            elif place is not None:
                x = at(place, x)
            arguments.append(x)
        if step.programs:
            step.kernel[(step.programs,)](*arguments, **step.constants)


def make_ready(tapes: list[Tape]) -> None:
    """Compiles what they launch, all at once."""
    if INTERPRETED:
        for tape in tapes:
            tape.ready([])
        return
    jobs = [job for tape in tapes for job in tape.jobs()]
    kernels = iter(compile_all(jobs, tapes[0].device))
    for tape in tapes:
        tape.ready([next(kernels) for _ in tape.steps])
