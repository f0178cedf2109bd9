"""Products with matrices that stay packed in memory."""

from effjax.kernels.quantized_matmul.formats import FLOATS, NORMAL, Format, Nibbles
from effjax.kernels.quantized_matmul.integers import integer_matmul, integer_product

__all__ = ["FLOATS", "NORMAL", "Format", "Nibbles", "integer_matmul", "integer_product"]
