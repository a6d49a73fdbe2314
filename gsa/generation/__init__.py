"""Generation: text out of a model's folder, as it is written."""

from gsa.generation.config import GenerateConfig

__all__ = ["GenerateConfig"]
