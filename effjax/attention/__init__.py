"""Attention: masks as values, and the functions and modules that attend through them."""

from effjax.attention import masks
from effjax.attention.attend import attend
from effjax.attention.multi_head import Attention, KVCache

__all__ = ["Attention", "KVCache", "attend", "masks"]
