"""A launch whose addresses are not known yet."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class CheckedDescriptor(TensorDescriptor):
    """A descriptor that `descriptor` in `plan.py` has looked at, which Triton need not do again."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: list[int]):
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block


class Place(NamedTuple):
    """Where a tensor is going to begin: bytes after the first number of tensor `number`."""

    number: int
    offset: int


class Tiles(NamedTuple):
    """A descriptor, and where its tensor is going to begin."""

    place: Place
    tiles: TensorDescriptor


class Step(NamedTuple):
    """A launch: its arguments with tensors on the meta device, and where those are going to be."""

    kernel: Any
    programs: int
    arguments: list[object]
    constants: dict[str, object]
    places: "Sequence[Place | Tiles | None]" = ()  # beside every argument
