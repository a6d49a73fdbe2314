"""Pretrained Transformers into GSA models.

from gsa.conversion import ConvertConfig, convert
"""

from gsa.conversion.config import ConvertConfig
from gsa.conversion.conversion import Conversion, convert

__all__ = ["Conversion", "ConvertConfig", "convert"]
