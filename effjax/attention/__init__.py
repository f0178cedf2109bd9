"""Attention: masks as values, and the functions and modules that attend through them."""

from effjax.attention import masks, scores
from effjax.attention.attend import attend
from effjax.attention.big_bird import BigBird
from effjax.attention.kv_cache import KVCache
from effjax.attention.linear import LinearAttention, linear_attention
from effjax.attention.linformer import Linformer
from effjax.attention.longformer import Longformer
from effjax.attention.longlora import ShiftedSparseAttention, shifted_group_attention
from effjax.attention.lsra import LSRA
from effjax.attention.multi_head import Attention
from effjax.attention.ring import ring_attend
from effjax.layers.prefix import TrainedPrefix

__all__ = [
  "LSRA",
  "Attention",
  "BigBird",
  "KVCache",
  "LinearAttention",
  "Linformer",
  "Longformer",
  "ShiftedSparseAttention",
  "TrainedPrefix",
  "attend",
  "linear_attention",
  "masks",
  "ring_attend",
  "scores",
  "shifted_group_attention",
]
