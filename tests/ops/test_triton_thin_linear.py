"""Products of one row: on the GPU if there is one, else in Triton's interpreter."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.ops.triton.thin_linear import (
    Norm,
    Weights,
    thin_gate_up,
    thin_inputs,
    thin_output,
    thin_tile,
)

# numpy, in the interpreter, remarks on exponentials that overflow to the right limit
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
SIZES = pytest.mark.parametrize("D", [64, 88, 300, 16], ids=["power", "two_parts", "odd", "small"])


def normal(*shape, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(dtype).to(DEVICE)


def normed(x, weight, eps):
    return F.rms_norm(x.double(), x.shape[-1:], None if weight is None else weight.double(), eps)


def close(got, exact, dtype, digits=4):
    """A value is rounded once on its way out, and once or twice more before an activation."""
    scale = exact.abs().max()
    assert got.isfinite().all()
    assert (got.double() - exact).abs().max() <= digits * torch.finfo(dtype).eps * scale


@DTYPES
@SIZES
@pytest.mark.parametrize("biased", [False, True])
def test_inputs(dtype, D, biased):
    """Queries and keys are swished in one case, values in the other."""
    counts = (24, 7, 9, 5)
    x, scale = normal(1, D, dtype=dtype, seed=0), normal(D, dtype=dtype, seed=1)
    asleep = torch.tensor([[biased]], device=DEVICE)
    layers = [
        Weights(
            normal(n, D, dtype=dtype, seed=2 + n) / D**0.5,
            normal(n, dtype=dtype, seed=50 + n) if biased else None,
        )
        for n in counts
    ]
    got = thin_inputs(x, Norm(scale, 1e-5), asleep, tuple(layers), 8.0, biased, not biased)
    h = normed(x, scale, 1e-5)
    for layer, n, y in zip(layers, counts, got, strict=True):
        assert y.shape == (1, n)
        exact = h @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())
        if n == 5:
            assert y.dtype == torch.float32
            exact = F.logsigmoid(exact) / 8
            assert (y == 0).all() == biased
            exact = exact * (not biased)
        else:
            exact = F.silu(exact) if biased == (n != 9) else exact
        close(y, exact, dtype)


def test_gates_near_one_keep_their_digits():
    """1 - f is what is written: it may not lose its digits as log f nears 0."""
    logits = torch.tensor([[-90.0, -20, -1, 0, 1, 5, 12, 20, 60]], device=DEVICE)
    eye = torch.eye(9, device=DEVICE)
    x = torch.nn.functional.pad(logits, (0, 7))
    weight = torch.nn.functional.pad(eye, (0, 7))
    root = (logits.square().sum() / 16 + 1e-5).sqrt().item()
    layers = (Weights(weight * root, None),) * 4
    *_, log_f = thin_inputs(x, Norm(None, 1e-5), torch.zeros(1, 1, dtype=torch.bool, device=DEVICE),
                            layers, 8.0, True, True)  # fmt: skip
    exact = F.logsigmoid(logits.double()) / 8
    assert ((log_f.double() - exact).abs() <= 3e-6 * exact.abs() + 1e-37).all()


@DTYPES
@SIZES
def test_gate_and_up(dtype, D):
    N = 21
    x = normal(1, D, dtype=dtype, seed=0)
    gate, up = (normal(N, D, dtype=dtype, seed=s) / D**0.5 for s in (1, 2))
    got = thin_gate_up(x, Norm(None, 1e-6), gate, up)
    h = normed(x, None, 1e-6)
    close(got, F.silu(h @ gate.double().T) * (h @ up.double().T), dtype)


@DTYPES
@SIZES
@pytest.mark.parametrize("form", ["plain", "residual", "normed", "swished", "all"])
def test_output(dtype, D, form):
    N = 13
    x, weight = normal(1, D, dtype=dtype, seed=0), normal(N, D, dtype=dtype, seed=1) / D**0.5
    scale, residual = normal(D, dtype=dtype, seed=2), normal(1, N, dtype=dtype, seed=3)
    norm = Norm(scale, 1e-5) if form in ("normed", "all") else None
    residual = residual if form in ("residual", "all") else None
    swish = form in ("swished", "all")
    got = thin_output(x, weight, residual, norm=norm, swish=swish)
    h = F.silu(x.double()) if swish else x.double()
    h = h if norm is None else normed(h, scale, 1e-5)
    exact = h @ weight.double().T + (0 if residual is None else residual.double())
    assert got.dtype == dtype
    close(got, exact, dtype)


def test_tiles_hold_every_column_and_no_program_too_much():
    for N in (1, 100, 2048, 32000):
        for D in (1, 16, 576, 2048, 5632, 14336):
            for weights, parts in ((1, 1), (2, 1), (1, 2)):
                tile = thin_tile(N, D, 2, weights, parts)
                assert tile.A + tile.B >= D and tile.A + tile.B < 2 * D + 1
                assert tile.R == 1 or tile.R * D * 2 * weights <= 24576
                assert 1 <= tile.warps <= 8
