"""The learning rate as a function of the step."""

import math

from gsa.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 1 … steps: linear up to lr over `warmup` steps, then down to min_lr.

    Step warmup has lr, step `steps` has min_lr exactly. Down by a cosine; or, as "wsd", not before
    the last `decay` of all steps, then by 1 - sqrt (Hägele et al. 2024, "Scaling laws and
    compute-optimal training beyond fixed training durations"), so that a run can be prolonged from
    any checkpoint before that.
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    first = max(config.warmup, 1)
    if config.schedule == "wsd":
        first = max(first, config.steps - round(config.decay * config.steps))
    if config.steps == first or step <= first:
        return config.lr
    done = (step - first) / (config.steps - first)
    left = 1 - math.sqrt(done) if config.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left
