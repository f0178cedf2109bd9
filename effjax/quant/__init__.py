"""Quantised weights: integers and scales that stand where a matrix stood."""

from effjax.quant.int8 import Int8
from effjax.quant.model import dequantize, methods, quantize

__all__ = ["Int8", "dequantize", "methods", "quantize"]
