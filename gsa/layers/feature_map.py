"""Elementwise and learned maps on queries, keys and values."""

from torch import Tensor, nn
from torch.nn import functional as F

FEATURE_MAPS = ("swish", "relu", "identity", "t2r")
VALUE_ACTIVATIONS = ("swish", "identity")


class FeatureMap(nn.Module):
    """The map φ applied to queries and keys [..., K], head by head.

    swish (the paper's Eq. 8), relu, identity, or t2r: relu(W x), one learned K × K matrix per layer
    shared by all heads, queries and keys ("Finetuning Pretrained Transformers into RNNs", arXiv
    2103.13076).
    """

    def __init__(self, kind: str, width: int):
        super().__init__()
        self.kind = kind
        if kind == "t2r":
            self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swish":
            return F.silu(x)
        if self.kind == "relu":
            return x.relu()
        if self.kind == "t2r":
            return self.layer(x).relu()
        return x

    def extra_repr(self) -> str:
        return self.kind
