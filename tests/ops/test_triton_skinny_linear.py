"""Products of few rows: on the GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.ops.triton import skinny_linear as skinny
from gsa.ops.triton.skinny_linear import SkinnyTile, skinny_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cannot multiply bf16
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
# block, step, split, stages, warps: one part; several, of unlike length, or empty
TILES = [(64, 64, 1, 3, 4), (64, 32, 2, 3, 4), (128, 64, 4, 2, 4)]


def normal(*shape, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("L", "N", "D", "biased"), [(64, 128, 128, False), (19, 77, 152, True)])
def test_it_is_the_product(monkeypatch, L, N, D, biased, tile, dtype):
    """Rounded once: sums of fp32 are far finer than the dtype."""
    monkeypatch.setattr(skinny, "skinny_tile", lambda *_: SkinnyTile(*tile))
    x, weight = normal(L, D, dtype=dtype, seed=0), normal(N, D, dtype=dtype, seed=1) / D**0.5
    bias = normal(N, dtype=dtype, seed=2) if biased else None
    got = skinny_linear(x, weight, bias)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert got.shape == (L, N) and got.dtype == dtype
    sums = D * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    error = (got.double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * (exact.abs() + sums) + sums).all()
    assert torch.equal(skinny_linear(x, weight, bias), got)


def test_tiles_leave_no_part_without_work():
    for N in (1, 2048, 6400, 11264, 32000):
        for D in (8, 2048, 5632):
            tile = skinny.skinny_tile(N, D)
            steps = -(-D // tile.step)
            assert tile.split <= steps
            assert 2 * tile.stages * (64 + tile.block) * tile.step * 2 <= 227 << 10


def test_what_it_does_not_take_is_refused():
    x, weight = (
        normal(2, 16, dtype=torch.float16, seed=0),
        normal(3, 16, dtype=torch.float16, seed=1),
    )
    for wrong in ((x.expand(40, 2, 16).reshape(80, 16), weight), (x.float(), weight.float())):
        with pytest.raises(ValueError, match=r"^x.*expected .*F\.linear"):
            skinny_linear(*wrong)
    with pytest.raises(ValueError, match=r"^x: expected .*in one piece"):
        skinny_linear(x[:, :12].contiguous(), weight[:, :12].contiguous())
    with pytest.raises(ValueError, match=r"^weight: expected .*in one piece"):
        skinny_linear(x, torch.cat([weight, weight], 1)[:, :16])
