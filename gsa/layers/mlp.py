"""The gated feed-forward part of a block."""

import warnings

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """W_down( swish(W_gate x) ⊙ W_up x ), no biases: [..., D] to [..., D] through width F.

    A width of 0 stands for no MLP: it has no parameters, since what shards, reduces and stores
    parameters does not take such as have no numbers.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
            self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
            self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.absent = intermediate_size == 0
        if self.absent:
            for layer in (self.gate_proj, self.up_proj, self.down_proj):
                empty = layer.weight.detach()
                del layer.weight
                layer.register_buffer("weight", empty, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
