"""Training from shards to a folder that `from_pretrained` opens: one small loop on stock parts.

    from gsa.training import TrainConfig, train

    result = train(TrainConfig(name="mine", data="shards/books", out="runs/mine", ...))

`TrainConfig` is cheap to import; torch loads when `train` is first used.
"""

from typing import TYPE_CHECKING

from gsa.training.config import TrainConfig
from gsa.training.errors import RunError

if TYPE_CHECKING:
    from gsa.training.loop import TrainResult as TrainResult
    from gsa.training.loop import train as train

__all__ = ["RunError", "TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> object:
    if name not in ("TrainResult", "train"):
        raise AttributeError(f"module 'gsa.training' has no attribute {name!r}")
    from gsa.training import loop

    return getattr(loop, name)
