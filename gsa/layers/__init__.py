"""What the model is built of: token mixers, norms, the MLP. Plain torch on top of `gsa.ops`.

    from gsa.layers import GatedSlotAttention

Dimension letters are those of `gsa/ops/types.py`, and D model width · F MLP width.
"""

from gsa.layers.linear_attention import LinearAttention
from gsa.layers.mlp import SwiGLU
from gsa.layers.norm import RMSNorm
from gsa.layers.slot_attention import GatedSlotAttention
from gsa.layers.softmax_attention import SoftmaxAttention
from gsa.layers.token_layout import TokenLayout

__all__ = [
    "GatedSlotAttention",
    "LinearAttention",
    "RMSNorm",
    "SoftmaxAttention",
    "SwiGLU",
    "TokenLayout",
]
