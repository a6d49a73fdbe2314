"""The learning rate as a function of the step."""

import math

from gsa.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 1 … steps: linear up to lr over `warmup` steps, then a cosine to min_lr.

    Step warmup has lr, step `steps` has min_lr exactly.
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    first = max(config.warmup, 1)
    if config.steps == first:
        return config.lr
    done = (step - first) / (config.steps - first)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
