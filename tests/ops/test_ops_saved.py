"""What is held between forward and backward: a few times the inputs, never a memory per token."""

import gc

import pytest
import torch
from numerics import Tensors, leaves, make_inputs

from gsa.ops import gated_slot_attention

WIDTH = {"H": 2, "G": 2, "K": 32, "V": 32, "M": 32, "dtype": torch.float32}


def storages() -> dict[int, int]:
    """Bytes of every storage that tests have made and Python can see, by address."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}


def held(inputs: Tensors, **options: object) -> int:
    """Bytes kept alive by the graph, results and inputs excluded; saved or stray alike."""
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    arguments = leaves(inputs)
    before = storages()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        got = gated_slot_attention(**arguments, impl="chunked", **options)
    after = {**saved, **storages()}
    own = {x.untyped_storage().data_ptr() for x in (*got, *arguments.values())}
    total = sum(n for address, n in after.items() if address not in before and address not in own)
    assert got.output.requires_grad
    return total


def size_of(inputs: Tensors) -> int:
    return sum(x.numel() * x.element_size() for x in inputs.values())


def options(packed: bool, T: int) -> dict[str, torch.Tensor]:
    return {"cu_seqlens": torch.tensor([0, T // 3, T])} if packed else {}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", [True, False])
def test_held_is_less_than_the_inputs(recompute, packed):
    T = 2048
    inputs = make_inputs(T=T, **WIDTH)
    extra = held(inputs, recompute=recompute, **options(packed, T))
    a_memory_per_token = T * 2 * 32 * 64 * 4
    assert extra <= size_of(inputs)
    assert extra <= a_memory_per_token / 20


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", [True, False])
def test_twice_the_tokens_hold_twice_as_much(recompute, packed):
    short, long = (
        held(make_inputs(T=T, **WIDTH), recompute=recompute, **options(packed, T))
        for T in (2048, 4096)
    )
    assert 1.8 <= long / short <= 2.2


def test_recompute_holds_less():
    inputs = make_inputs(T=4096, **WIDTH)
    assert held(inputs, recompute=True) < held(inputs, recompute=False)


def test_the_measure_sees_a_memory_per_token():
    """The reference does keep one: the measure above would notice."""
    T = 256
    inputs = leaves(make_inputs(T=T, **WIDTH))
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gated_slot_attention(**inputs, impl="reference")
    assert sum(saved.values()) > T * 2 * 32 * 64 * 4


def test_heads_are_never_repeated():
    """Eight query heads on one key/value head hold less than on eight of their own."""
    sizes = {"T": 2048, "H": 8, "K": 16, "V": 16, "M": 16, "dtype": torch.float32}
    one, eight = (
        held(make_inputs(**sizes, G=G), recompute=False)
        - 2048 * 8 * 16 * 4  # the scores, one set per query head in either
        for G in (1, 8)
    )
    assert one <= eight / 4
