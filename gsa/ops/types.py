"""Names shared by every implementation of the operator.

The package has one alphabet for dimensions, used as suffixes of tensor names:

    B batch · T tokens · H query heads · G key/value heads · R = H/G query heads per key/value head
    K key width · V value width · M slots · X = K+V, one row of the memory · N chunks · C tokens per
    chunk · S sequences of a packed batch · E channels of a selective scan
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "chunked", "triton"]
SlotActivation = Literal["softmax", "identity", "swish", "relu", "relu2"]

IMPLS: tuple[str, ...] = get_args(Impl)
SLOT_ACTIVATIONS: tuple[str, ...] = get_args(SlotActivation)


class SlotAttentionOutput(NamedTuple):
    """What the operator returns.

    output: [B, T, H, V] in q's dtype.
    memory: [B, G, M, K+V] ([S, G, M, K+V] if packed), fp32 (fp64 for fp64 inputs): the memory after
        the last token, keys in the first K columns and values in the rest.
    """

    output: Tensor
    memory: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the memory and of everything inside: fp64 stays fp64, all else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast changes nothing inside the operator; the meta device knows no autocast."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
