"""Attention: masks as values, and the functions and modules that attend through them."""

from effjax.attention import masks
from effjax.attention.attend import attend

__all__ = ["attend", "masks"]
