"""Gated Slot Attention: an operator, a layer, a language model, and what it takes to train one.

    from gsa.ops import gated_slot_attention
    from gsa import GSAConfig, GSAForCausalLM

Importing `gsa` is cheap; the model side loads when one of its names is first used, or as soon as
transformers is imported, so that its Auto classes know the model whichever import comes first.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
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
    return getattr(import_module(_HOME[name]), name)


class _OnImportOfTransformers:
    """Import finder that lets `gsa.model` register itself right after transformers was imported.

    Importing transformers here would burden those who want `gsa.ops` alone; waiting for
    `gsa.model` would leave the Auto classes ignorant after `import gsa`.
    """

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(cls)  # type: ignore[arg-type]
        spec = PathFinder.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module("gsa.model")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    import_module("gsa.model")
else:
    sys.meta_path.insert(0, _OnImportOfTransformers)  # type: ignore[arg-type]
