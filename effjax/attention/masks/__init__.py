"""Who attends to whom, as values: `Causal() & (SlidingWindow(256, 0) | Global(4))`.

Conventions:
  * indices are absolute positions; with T < S the queries are the last T of the S positions;
  * masks are frozen, hashable and compare by value; those that hold arrays are pytrees, and not
    hashable where these are traced;
  * a new kind of mask is one class (`base`): a predicate, and what it needs to skip tiles.
"""

from effjax.attention.masks.bands import (
  BlockWindow,
  Causal,
  Dilated,
  Full,
  SlidingWindow,
)
from effjax.attention.masks.base import And, Mask, Not, Or
from effjax.attention.masks.patterns import bigbird, longformer
from effjax.attention.masks.per_head import PerHead
from effjax.attention.masks.predicate import Predicate
from effjax.attention.masks.random_blocks import RandomBlocks
from effjax.attention.masks.shard import Shard
from effjax.attention.masks.tokens import Documents, Global, Prefix

__all__ = [
  "And",
  "BlockWindow",
  "Causal",
  "Dilated",
  "Documents",
  "Full",
  "Global",
  "Mask",
  "Not",
  "Or",
  "PerHead",
  "Predicate",
  "Prefix",
  "RandomBlocks",
  "Shard",
  "SlidingWindow",
  "bigbird",
  "longformer",
]
