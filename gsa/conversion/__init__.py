"""Pretrained Transformers into GSA models, and what they lose by it taught again.

from gsa.conversion import ConvertConfig, convert
"""

from gsa.conversion.config import ConvertConfig
from gsa.conversion.conversion import Conversion, convert
from gsa.conversion.distill_config import DistillConfig
from gsa.conversion.distillation import DistillResult, distill

__all__ = [
    "Conversion",
    "ConvertConfig",
    "DistillConfig",
    "DistillResult",
    "convert",
    "distill",
]
