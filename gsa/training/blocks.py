"""What is done to the blocks of a model before it is trained."""

from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch.utils.checkpoint import checkpoint

from gsa.training.config import TrainConfig

LEAN = 0.9
"""Of what a compiled block would keep; below 1 the compiler begins with what costs nearly nothing
to compute again, and that is far more than a tenth. It is a setting of the process."""


def prepare_blocks(model: Any, config: TrainConfig) -> None:
    """Every `recompute`-th block keeps its input only; each block is compiled if asked for.

    Blocks are compiled one by one: all are alike, so one graph serves all of them.
    """
    recompute_blocks(model, config.recompute)
    if config.compile:
        compile_blocks(model, lean=config.lean)


def sum_blocks_in(model: Any, dtype: torch.dtype) -> None:
    """Gives the sum of embedding and blocks' outputs that dtype, whatever weights are in.

    Autocast leaves it in that of the embedding's weight: fp32, twice the memory and traffic.
    """
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, tokens, output: output.to(dtype))


def compile_blocks(model: Any, *, lean: bool) -> None:
    """Compiles each block, when it is first called; lean as in `TrainConfig`."""
    torch._functorch.config.activation_memory_budget = LEAN if lean else 1.0
    for block in model.model.layers:
        block.compile(fullgraph=True)


def recompute_blocks(model: Any, every: int) -> None:
    """Every so-manieth block keeps its input only and is computed again backwards; 0 for none.

    Nothing in a block is random, so nothing random has to be the same the second time.
    """
    for i, block in enumerate(model.model.layers):
        block.gradient_checkpointing = every > 0 and i % every == 0
        block._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )
