"""What `gsa generate` is asked to do."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One continuation. ValueError naming the field if a value makes no sense."""

    model: str
    """Folder of a GSA model: a finished run, a checkpoint, or a published one."""
    prompt: str
    """The text to continue."""
    max_new_tokens: int = 200
    """Tokens to write at most; the end of the document stops earlier."""
    temperature: float = 0.8
    """Divides the logits before sampling: below 1 is surer, above 1 wilder."""
    top_k: int = 0
    """Sample among the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability; 1 for all."""
    seed: int = 0
    """The same seed writes the same text."""
    greedy: bool = False
    """Always take the likeliest token; temperature, top_k, top_p and seed play no part."""
    device: str = "cpu"
    """Where to run: cpu, cuda, ..."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: expected the folder of a model, got an empty string")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature: expected a number above 0, got {self.temperature}; for no chance at "
                "all use greedy"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
