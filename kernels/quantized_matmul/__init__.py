"""Products with matrices that stay packed in memory."""

from effjax.kernels.quantized_matmul.formats import (
  FLOATS,
  NORMAL,
  Format,
  Indices,
  Integers,
  Nibbles,
  Numbers,
)
from effjax.kernels.quantized_matmul.integers import integer_matmul, integer_product
from effjax.kernels.quantized_matmul.lying import Lying, as_it_lies
from effjax.kernels.quantized_matmul.packed import packed_product

__all__ = [
  "FLOATS",
  "NORMAL",
  "Format",
  "Indices",
  "Integers",
  "Lying",
  "Nibbles",
  "Numbers",
  "as_it_lies",
  "integer_matmul",
  "integer_product",
  "packed_product",
]
