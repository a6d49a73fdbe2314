"""A block by kernels for one row, in Triton's interpreter, beside the block by torch."""

import pytest
import torch
from tiny_models import SLOTS, build_tiny

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.generation.step import Head, StepBlock
from gsa.generation.thin_block import ThinBlock, ThinHead, is_usual, takes_thin_blocks
from gsa.layers.token_layout import TokenLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
USUAL = {
    "plain": {},
    "biased": {"qkv_bias": True, "gate_bias": True},
    "no_weights_in_norms": {"elementwise_affine": False},
    "relu_slots": {"slot_activation": "relu"},
    "slots": SLOTS,
    "turned_and_stretched": {
        **{"rope_theta": 100.0, "value_activation": "identity"},
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0},
            **{"original_max_position_embeddings": 64, "attention_factor": 1.2},
        },
    },
}
UNUSUAL = {
    "no MLP": {"intermediate_size": 0},
    "abc": {"gate": "abc"},
    "static": {"gate": "data_independent"},
    "output_gate": {"output_gate": True},
    "qk_norm": {"qk_norm": True},
    "window": {"window_branch": 4},
    "relu": {"feature_map": "relu"},
    "short_conv": {"use_short_conv": True},
}


@pytest.mark.parametrize("options", USUAL.values(), ids=USUAL.keys())
def test_it_is_the_block(options):
    model = build_tiny(**options).float().to(DEVICE)
    D = model.config.hidden_size
    rng = torch.Generator().manual_seed(0)
    for block, asleep in zip(model.model.layers, (False, True), strict=True):
        assert is_usual(block)
        pads = torch.tensor([[asleep]], device=DEVICE)
        layout = TokenLayout(torch.full((1, 1), -1 if asleep else 7007, device=DEVICE), pads)
        state = block.attn.empty_state(1, 1)
        memory = torch.randn(state["memory"].shape, generator=rng).to(DEVICE)
        x = torch.randn(1, 1, D, generator=rng).to(DEVICE)
        ours, theirs = {"memory": memory.clone()}, {"memory": memory.clone()}
        with torch.no_grad():
            expected = StepBlock(block)(x, layout, theirs)
            got = ThinBlock(block)(x, layout, ours)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(ours["memory"], theirs["memory"], rtol=1e-5, atol=1e-5)
        assert torch.equal(ours["memory"], memory) == asleep
    with torch.no_grad():
        torch.testing.assert_close(ThinHead(model)(x), Head(model)(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_blocks_of_another_kind_are_not_taken(options):
    assert not any(is_usual(block) for block in build_tiny(**options).model.layers)


def test_rows_and_devices():
    model = build_tiny().float().to(DEVICE)
    on_gpu = DEVICE == "cuda"
    assert [takes_thin_blocks(model, rows) for rows in (1, 2)] == [on_gpu, False]
    model.lm_head.register_forward_hook(lambda *_: None)
    assert not takes_thin_blocks(model, 1)
