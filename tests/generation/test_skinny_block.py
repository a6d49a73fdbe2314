"""Blocks by kernels for pools, in Triton's interpreter or on a GPU, beside blocks by torch."""

import pytest
import torch
from numerics import assert_within_budget
from tiny_models import SLOTS, build_tiny

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.generation.skinny_block import SkinnyBlock, SkinnyHead, is_skinny, takes_skinny_blocks
from gsa.generation.step import Head, StepBlock
from gsa.layers.token_layout import TokenLayout

# numpy, in the interpreter, remarks on exponentials that overflow to the right limit
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16  # the interpreter cannot multiply bf16
# rows, options: one kernel for the memory's step up to 16 rows, two beyond
USUAL = {
    "plain": (3, {}),
    "two_kernels": (
        17,
        {"num_slots": 600, "num_heads": 1, "num_hidden_layers": 1, "rope_theta": 100.0},
    ),
    "slots, biased": (5, SLOTS | {"head_dim": 8, "qkv_bias": True}),
    "grouped, odd": (2, {"num_kv_heads": 2, "hidden_size": 152, "num_slots": 70}),
    "no_weights_in_norms": (2, {"elementwise_affine": False}),
}
UNUSUAL = {
    "output_gate": {"output_gate": True},
    "relu": {"feature_map": "relu"},
    "no_output_norm": {"output_norm": False},
    "odd width": {"hidden_size": 20},
    "odd MLP": {"intermediate_size": 20},
}


def made(options, dtype):
    model = build_tiny(**options).to(DTYPE).to(dtype).to(DEVICE)
    if model.model.norm.weight is not None:  # else a forgotten weight would not show
        for name, p in model.named_parameters():
            if "norm" in name:
                p.data += torch.linspace(-0.5, 0.5, len(p), device=DEVICE).to(DTYPE).to(dtype)
    return model


def inputs(model, rows, seed=0):
    """(x [P, 1, D], memories), representable in half."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, model.config.hidden_size, generator=rng)
    shapes = [b.attn.empty_state(rows, 1)["memory"].shape for b in model.model.layers]
    memories = [torch.randn(shape, generator=rng) for shape in shapes]
    return x.to(DTYPE).to(DEVICE), [m.to(DEVICE) for m in memories]


@torch.no_grad()
def run(model, kinds, x, memories, asleep):
    """Logits and the memories after the token, by blocks and head of a kind."""
    rows, (block_of, head_of) = len(x), kinds
    positions = 7 + 1001 * torch.arange(rows, device=DEVICE)[:, None]
    layout = TokenLayout(positions.masked_fill(asleep, -1), asleep)
    after = {}
    for place, (block, memory) in enumerate(zip(model.model.layers, memories, strict=True)):
        more = (rows,) if block_of is SkinnyBlock else ()
        state = {"memory": memory.clone()}
        x = block_of(block, *more)(x, layout, state)
        after[f"memory {place}"] = state["memory"]
    return after | {"output": head_of(model)(x)}


OURS, THEIRS = (SkinnyBlock, SkinnyHead), (StepBlock, Head)


@pytest.mark.parametrize(("rows", "options"), USUAL.values(), ids=USUAL.keys())
def test_it_is_the_block(rows, options):
    """Within the budget of the model in fp64, by the blocks of torch in half as the yardstick."""
    half, exact = (made(options, dtype) for dtype in (DTYPE, torch.float64))
    x, memories = inputs(half, rows)
    asleep = (torch.arange(rows, device=DEVICE) == 1)[:, None]
    assert all(is_skinny(block) for block in half.model.layers)
    got = run(half, OURS, x, memories, asleep)
    ruler = run(half, THEIRS, x, memories, asleep)
    truth = run(exact, THEIRS, x.double(), [m.double() for m in memories], asleep)
    assert_within_budget(got, truth, ruler, DTYPE, "triton")
    for place, memory in enumerate(memories):
        after = got[f"memory {place}"]
        assert torch.equal(after[1], memory[1]) and not torch.equal(after[0], memory[0])


def test_a_row_has_the_same_bits_whoever_is_beside_it():
    """In its place: products of the interpreter depend on that, those of tensor cores do not."""
    model = made({}, DTYPE)
    asleep = torch.tensor([[False], [True], [False]], device=DEVICE)
    x, memories = inputs(model, 3)
    others, other_memories = inputs(model, 3, seed=1)
    others[2] = x[2]
    for memory, other in zip(memories, other_memories, strict=True):
        other[2] = memory[2]
    here = run(model, OURS, x, memories, asleep)
    there = run(model, OURS, others, other_memories, asleep.roll(-1, 0))
    assert all(torch.equal(here[name][2], there[name][2]) for name in here)
    assert not any(torch.equal(here[name][0], there[name][0]) for name in here)


@pytest.mark.parametrize("options", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_blocks_of_another_kind_are_not_taken(options):
    assert not any(is_skinny(block) for block in build_tiny(**options).half().model.layers)


def test_rows_and_devices():
    hopper = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
    model = build_tiny().half().to(DEVICE)
    assert all(is_skinny(block) for block in model.model.layers)
    taken = [takes_skinny_blocks(model, rows) for rows in (1, 2, 64, 65)]
    assert taken == [False, hopper, hopper, False]
    assert not takes_skinny_blocks(model.float(), 2)
