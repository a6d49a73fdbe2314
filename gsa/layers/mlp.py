"""The gated feed-forward part of a block."""

import warnings

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """W_down( swish(W_gate x) ⊙ W_up x ), no biases: [..., D] to [..., D] through width F.

    A width of 0 is a block without MLP: the result is 0.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
            self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
            self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
