"""Products with matrices that stay packed in memory."""

from effjax.kernels.quantized_matmul.formats import (
  FLOATS,
  NORMAL,
  Format,
  Indices,
  Integers,
  Nibbles,
)
from effjax.kernels.quantized_matmul.integers import integer_matmul, integer_product
from effjax.kernels.quantized_matmul.packed import packed_product

__all__ = [
  "FLOATS",
  "NORMAL",
  "Format",
  "Indices",
  "Integers",
  "Nibbles",
  "integer_matmul",
  "integer_product",
  "packed_product",
]
