"""Random blocks of BigBird (arXiv 2007.14062)."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.attention.masks.base import FAR, Mask, at_least, check_integers, namespace
from effjax.attention.masks.named import ByValue
from effjax.core.known import indices
from effjax.core.typing import Array, Int
from effjax.kernels.flash_attention.tile_map.spans import union


@functools.partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["block"])
@dataclasses.dataclass(frozen=True, eq=False)
class RandomBlocks(ByValue, Mask):
  """The queries of a block see the keys of a few blocks named in a table.

  Args:
    table: [B or 1, N or 1, blocks, r], for each block of queries the blocks of keys it sees;
      negative for none.
    block: positions in a block.

  Reference: BigBird (arXiv 2007.14062), section 2.
  """

  table: Any  # not checked here: jax rebuilds trees with leaves of other types
  block: int

  def __post_init__(self):
    at_least("RandomBlocks: block", self.block, 1)
    if self.block > FAR:
      raise ValueError(f"RandomBlocks: block={self.block}; allowed: 1 … {FAR}")

  @classmethod
  def draw(
    cls, key: Array, length: int, *, block: int, number: int, heads: int = 1, causal: bool = False
  ) -> "RandomBlocks":
    """`number` different blocks for each block of queries, none beside it, nor the first or last.

    Where fewer are left than `number`, all of them. With `causal` they lie before the queries, and
    those of a block are the same for any length.
    """
    for name, value in (("length", length), ("block", block), ("heads", heads)):
      at_least(f"RandomBlocks: {name}", value, 1)
    at_least("RandomBlocks: number", number, 0)
    return cls(_table(key, -(-length // block), number, heads, causal), block)

  @property
  def heads(self) -> int:
    return self.table.shape[1]

  def features(self, q_positions, length):
    B, N, blocks, r = self.table.shape
    at = q_positions[:, None] // self.block  # [b, 1, T]
    batch = indices(0, B)[:, None, None]
    xp = namespace(self.table, at)
    rows = xp.asarray(self.table)[batch, np.arange(N)[:, None], at.clip(0, blocks - 1)]
    rows = xp.where(((at >= 0) & (at < blocks))[..., None], rows, -1)
    return tuple(rows[..., i] for i in range(r)), (indices(0, length) // self.block)[None, None]

  def predicate(self, q, k, q_features, k_features):
    seen = [chosen == k_features for chosen in q_features] or [k_features < 0]
    return functools.reduce(operator.or_, seen)

  def spans(self, grid, q_features, k_features):
    if not grid.contiguous:
      return Mask.spans(self, grid, q_features, k_features)
    first, last = grid.first // self.block, grid.last // self.block  # [1, 1, rows]
    most = (grid.index.shape[-1] - 2) // self.block + 2
    own = first[0, 0, :, None] + np.arange(most)[None]
    xp = namespace(self.table, own)
    chosen = self.table[:, :, xp.minimum(own, self.table.shape[2] - 1)]  # [B, N, rows, most, r]
    valid = (own <= last[0, 0, :, None])[None, None, ..., None] & (chosen >= 0)
    empty = Mask.spans(self, grid, (), ())[1]
    if chosen.shape[-1] == 0:
      return empty, empty
    low = (chosen * self.block).reshape(*chosen.shape[:3], -1)
    high = xp.where(valid.reshape(low.shape), low + self.block - 1, low - 1)
    return union(*grid.covering(low, high)), empty

  def check(self, batch, T, S, positions=False):
    blocks = -(-S // self.block)
    what = "an integer array [batch, heads, blocks, any]"
    check_integers("mask: RandomBlocks: table", self.table, 4, what)
    if self.table.shape[0] not in (1, batch) or self.table.shape[2] != blocks:
      raise ValueError(
        f"mask: RandomBlocks has a table {self.table.shape}, expected ({batch} or 1, heads or 1, "
        f"{blocks}, any) for {S} positions in blocks of {self.block}"
      )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _table(
  key: Array, blocks: int, number: int, heads: int, causal: bool
) -> Int[Array, "1 {heads} {blocks} {number}"]:
  own = jnp.arange(blocks)[None, None]
  # To choose from: `before` blocks 1 … own − 2 and `after` blocks own + 2 … blocks − 2.
  before, next_after = jnp.maximum(own - 2, 0), jnp.maximum(own + 2, 1)
  after = jnp.zeros_like(own) if causal else jnp.maximum(blocks - 1 - next_after, 0)
  shape = (1, heads, blocks)
  keys = jax.vmap(lambda block: jax.random.split(jax.random.fold_in(key, block), number))(own[0, 0])
  chosen: list[Array] = []
  for j in range(number):
    left = before + after - j
    draw = lambda key, most: jax.random.randint(key, (heads,), 0, most)
    x = jax.vmap(draw, out_axes=1)(keys[:, j], jnp.maximum(left[0, 0], 1))[None]
    for y in jnp.moveaxis(jnp.sort(jnp.stack(chosen, -1), -1), -1, 0) if chosen else ():
      x = x + (x >= y).astype(x.dtype)
    chosen.append(jnp.where(left > 0, x, FAR))
  ranks = jnp.stack(chosen, -1) if chosen else jnp.zeros((*shape, 0), jnp.int32)
  low = ranks < before[..., None]
  found = jnp.where(low, ranks + 1, ranks - before[..., None] + next_after[..., None])
  return jnp.where(ranks < FAR, found, -1).astype(jnp.int32)
