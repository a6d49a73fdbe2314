"""What is done to the blocks of a model before it is trained."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from gsa.training.config import TrainConfig


def prepare_blocks(model: Any, config: TrainConfig) -> None:
    """Every `recompute`-th block keeps its input only; each block is compiled if asked for.

    Blocks are compiled one by one: all are alike, so one graph serves all of them.
    """
    recompute_blocks(model, config.recompute)
    for block in model.model.layers:
        if config.compile:
            block.compile(fullgraph=True)


def recompute_blocks(model: Any, every: int) -> None:
    """Every so-manieth block keeps its input only and is computed again backwards; 0 for none."""
    for i, block in enumerate(model.model.layers):
        block.gradient_checkpointing = every > 0 and i % every == 0
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
