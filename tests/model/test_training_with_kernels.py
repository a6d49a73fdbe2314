"""Training on a GPU: kernels against the chunked form, compiled blocks against blocks as they are.

Run with `pytest -m gpu tests/model`.
"""

from pathlib import Path

import pytest
import torch

from gsa.layers import GatedSlotAttention
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.training.blocks import compile_blocks

pytestmark = pytest.mark.gpu
TEXT = Path(__file__).parents[2] / "demo" / "text"
STEPS, BATCH, LENGTH = 200, 8, 512


def batches(device):
    """[STEPS, BATCH, LENGTH + 1] bytes of text, the same for every run."""
    text = b"\n".join(path.read_bytes() for path in sorted(TEXT.rglob("*.txt")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rng = torch.Generator().manual_seed(0)
    starts = torch.randint(len(tokens) - LENGTH, (STEPS, BATCH, 1), generator=rng)
    return tokens[starts + torch.arange(LENGTH)].long().to(device)


def curve(impl, device, nudge=0.0):
    """The loss of every step, in fp32; weights are nudged by so much before the first."""
    torch.manual_seed(0)
    config = GSAConfig(vocab_size=256, hidden_size=256, num_hidden_layers=3, num_heads=2)
    model = GSAForCausalLM(config).to(device, torch.bfloat16)
    for module in model.modules():
        if isinstance(module, GatedSlotAttention):
            module.impl = impl
    with torch.no_grad():
        for weight in model.parameters():
            weight += nudge * weight.abs().mean() * torch.randn_like(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device == "cuda")
    losses = []
    for tokens in batches(device):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return torch.stack(losses).cpu()


def test_200_steps_give_the_same_curve_within_noise():
    """Noise: what weights that differ in their last bf16 bit make of the curve.

    Curves of bf16 weights drift apart from any difference, so they are compared smoothed.
    """
    chunked, kernels = curve("chunked", "cuda"), curve("triton", "cuda")
    others = [curve("chunked", "cuda", nudge=2**-8) for _ in range(2)]
    assert chunked[-20:].mean() < chunked[:5].mean() - 1.5, "nothing was learned"

    def smooth(losses):
        return losses.unfold(0, 20, 20).mean(1)

    noise = torch.stack([(smooth(x) - smooth(chunked)).abs() for x in others]).amax(0)
    gap = (smooth(kernels) - smooth(chunked)).abs()
    assert gap.mean() <= 2 * noise.mean(), (gap, noise)
    assert gap.max() <= 3 * noise.max(), (gap, noise)
    assert torch.equal(curve("triton", "cuda"), kernels), "and bit for bit the same again"


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"num_slots": 32},
        {"num_slots": 32, "output_gate": True, "num_kv_heads": 1},
        {"mixer": "gla", "output_gate": True, "num_kv_heads": 1},
        {"mixer": "retnet", "expand_v": 2, "rope_theta": 1e4},
        {"mixer": "hgrn2"},
        {"mixer": "rwkv6"},
        {"mixer": "mamba", "head_dim": 1, "expand_k": 16, "intermediate_size": 0},
    ],
)
def test_compiled_blocks_have_the_gradients_of_blocks(lean, options):
    """All in fp32: differences are those of sums in another order."""
    torch.manual_seed(0)
    config = GSAConfig(vocab_size=256, hidden_size=256, num_hidden_layers=2, num_heads=2, **options)
    model = GSAForCausalLM(config).cuda().train()
    tokens = batches("cuda")[0, :3]
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model, lean=lean)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    torch._functorch.config.activation_memory_budget = 1.0
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
