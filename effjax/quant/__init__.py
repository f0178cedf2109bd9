"""Quantised weights: integers, codes and scales that stand where a matrix stood."""

from effjax.quant.awq import awq
from effjax.quant.dynamic import Int8Dynamic
from effjax.quant.dynamic8 import Dynamic8
from effjax.quant.four_bit import FP4, NF4
from effjax.quant.gguf_blocks import GGUF
from effjax.quant.gptq import gptq
from effjax.quant.input_scaled import InputScaled
from effjax.quant.int4 import Int4, Int4Affine
from effjax.quant.int8 import Int8
from effjax.quant.llm_int8 import LLMInt8, LLMInt8Exact, has_outliers, outliers
from effjax.quant.model import dequantize, fake_quantize, methods, quantize
from effjax.quant.palette import Palette, kmeans
from effjax.quant.qmoe import qmoe
from effjax.quant.smoothquant import smoothquant
from effjax.quant.ternary import Ternary

__all__ = [
  "FP4",
  "GGUF",
  "NF4",
  "Dynamic8",
  "InputScaled",
  "Int4",
  "Int4Affine",
  "Int8",
  "Int8Dynamic",
  "LLMInt8",
  "LLMInt8Exact",
  "Palette",
  "Ternary",
  "awq",
  "dequantize",
  "fake_quantize",
  "gptq",
  "has_outliers",
  "kmeans",
  "methods",
  "outliers",
  "qmoe",
  "quantize",
  "smoothquant",
]
