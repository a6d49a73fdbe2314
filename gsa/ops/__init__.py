"""The gated slot attention operator: mathematics only, on plain torch tensors.

    from gsa.ops import gated_slot_attention, gated_slot_step
    from gsa.ops import gated_linear_attention, gated_linear_step
    from gsa.ops import selective_scan, selective_step

`reference.py` is the definition, `chunked.py` computes the same in chunks, `api.py` checks the
arguments and chooses. Nothing here imports transformers or triton.
"""

from gsa.ops.api import (
    describe_impl,
    gated_linear_attention,
    gated_linear_step,
    gated_slot_attention,
    gated_slot_step,
)
from gsa.ops.selective_scan import selective_scan, selective_step
from gsa.ops.types import IMPLS, SLOT_ACTIVATIONS, Impl, SlotActivation, SlotAttentionOutput
from gsa.ops.validation import check_cu_seqlens

__all__ = [
    "IMPLS",
    "SLOT_ACTIVATIONS",
    "Impl",
    "SlotActivation",
    "SlotAttentionOutput",
    "check_cu_seqlens",
    "describe_impl",
    "gated_linear_attention",
    "gated_linear_step",
    "gated_slot_attention",
    "gated_slot_step",
    "selective_scan",
    "selective_step",
]
