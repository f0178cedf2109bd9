"""Products with matrices that stay packed in memory."""

from effjax.kernels.quantized_matmul.formats import FLOATS, NORMAL, Format, Indices, Nibbles

__all__ = ["FLOATS", "NORMAL", "Format", "Indices", "Nibbles"]
