"""Generation: the fast decoder, a model's state as a file, text out of a model's folder.

    from gsa.generation import Decoder, ModelState, Sampling

Settings load nothing heavy; the rest loads when its name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gsa.generation.config import GenerateConfig

if TYPE_CHECKING:
    from gsa.generation.decoder import Decoder as Decoder
    from gsa.generation.sampling import Sampling as Sampling
    from gsa.generation.state import ModelState as ModelState

_HOME = {"Decoder": "decoder", "ModelState": "state", "Sampling": "sampling"}

__all__ = ["Decoder", "GenerateConfig", "ModelState", "Sampling"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gsa.generation' has no attribute {name!r}")
    return getattr(import_module(f"gsa.generation.{_HOME[name]}"), name)
