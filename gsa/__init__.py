"""Gated Slot Attention: an operator, a layer, a language model, and what it takes to train one.

    from gsa.ops import gated_slot_attention
    from gsa import GSAConfig, GSAForCausalLM

Importing `gsa` is cheap; the model side (transformers) loads when one of its names is first used.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gsa.layers.slot_attention import GatedSlotAttention as GatedSlotAttention
    from gsa.model import GSAConfig as GSAConfig
    from gsa.model import GSAForCausalLM as GSAForCausalLM
    from gsa.model import GSAModel as GSAModel

_HOME = {
    "GatedSlotAttention": "gsa.layers.slot_attention",
    "GSAConfig": "gsa.model",
    "GSAModel": "gsa.model",
    "GSAForCausalLM": "gsa.model",
}

__all__ = ["GSAConfig", "GSAForCausalLM", "GSAModel", "GatedSlotAttention", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gsa' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
