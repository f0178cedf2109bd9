"""Products with matrices that stay packed in memory."""

from effjax.kernels.quantized_matmul.formats import Format, Nibbles

__all__ = ["Format", "Nibbles"]
