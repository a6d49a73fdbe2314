"""What is done to the blocks of a model before it is trained."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from gsa.training.config import TrainConfig


def prepare_blocks(model: Any, config: TrainConfig) -> None:
    """Every `recompute`-th block keeps its input only; each block is compiled if asked for.

    Blocks are compiled one by one: all are alike, so one graph serves all of them.
    """
    for i, block in enumerate(model.model.layers):
        if config.recompute and i % config.recompute == 0:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        if config.compile:
            block.compile(fullgraph=True)
