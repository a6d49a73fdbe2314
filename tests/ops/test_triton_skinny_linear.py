"""Products of few rows, in parts: on the GPU if there is one, else in Triton's interpreter.

What stands around them is held to the model's block in `tests/generation/test_skinny_block.py`.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton: Linux, and the dev extra")

from gsa.ops.triton import skinny_linear as skinny
from gsa.ops.triton.skinny_linear import skinny_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cannot multiply bf16
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


def normal(*shape, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("L", "N", "D", "split"), [(64, 128, 640, 4), (19, 77, 152, 2), (2, 8, 8, 2)]
)
def test_parts_add_up_to_the_product(monkeypatch, L, N, D, split, dtype):
    """Of like and unlike length, and empty; whole, it is rounded once."""
    monkeypatch.setattr(skinny, "skinny_split", lambda *_: split)
    x, weight = normal(L, D, dtype=dtype, seed=0), normal(N, D, dtype=dtype, seed=1) / D**0.5
    exact = x.double() @ weight.double().T
    sums = D * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    parts, whole = skinny_parts(x, weight), skinny_parts(x, weight, whole=True)[0]
    assert parts.shape == (split, L, N) and parts.dtype == torch.float32
    assert ((parts.double().sum(0) - exact).abs() <= sums).all()
    assert whole.shape == (L, N) and whole.dtype == dtype
    error = (whole.double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * (exact.abs() + sums) + sums).all()


def test_tiles_fit_and_leave_no_part_without_work():
    for L in (2, 8, 17, 64):
        for N in (1, 2048, 6400, 11264, 32000):
            for weights in (1, 2):
                tile = skinny.skinny_tile(L, N, weights)
                assert tile.rows >= L and tile.stages > 1
                held = tile.stages * (tile.block * weights + tile.rows) * tile.step * 2
                assert held <= 225 << 10
            for D in (8, 2048, 5632):
                assert skinny.skinny_split(N, D) <= -(-D // skinny.STEP)
