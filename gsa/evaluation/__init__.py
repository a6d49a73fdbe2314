"""Evaluation: perplexity by position, and tasks of lm-eval scored through a model's state.

    from gsa.evaluation import PerplexityConfig, TasksConfig

Settings load nothing heavy. `perplexity`, `run_tasks` and `speed` are in the modules of that name
(`tasks` for the second), the lm-eval model is `gsa.evaluation.harness.StateLM`.
"""

from gsa.evaluation.config import PerplexityConfig, SpeedConfig, TasksConfig

__all__ = ["PerplexityConfig", "SpeedConfig", "TasksConfig"]
