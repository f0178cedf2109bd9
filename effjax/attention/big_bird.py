"""BigBird: blocks that see their neighbours, the ends and random others (arXiv 2007.14062)."""

import jax
import jax.numpy as jnp

from effjax.attention import masks
from effjax.attention.multi_head import Attention


class BigBird(Attention):
  """Attention through `masks.bigbird`, with random blocks of its own for each head.

  Given randomness under "mask", as in training, the random blocks are drawn afresh; without it, as
  in evaluation, they are those of `seed`. Parameters are those of `Attention`.

  Attributes:
    mask: `Causal()`, where nothing sees what comes after it, or `Full()`.
    block: positions in a block (64 in the paper).
    number: random blocks of a block of queries (3 in the paper); 0 for none.
    seed: of the random blocks without randomness.

  Reference: BigBird, section 2 (ITC, with the first and last block as global tokens).
  """

  takes_prefix = False

  block: int = 64
  number: int = 3
  seed: int = 0

  def _mask(self, context, length):
    key = self.make_rng("mask") if self.has_rng("mask") else jax.random.key(self.seed)
    return self._pattern(key, length, self.heads)

  def _pattern(self, key, length: int, heads: int) -> masks.Mask:
    if self.mask not in (masks.Causal(), masks.Full()) or self.cross:
      given = f"mask={self.mask}, cross={self.cross}"
      raise ValueError(f"BigBird: {given}; allowed: Causal() or Full(), and cross=False")
    causal = self.mask == masks.Causal()
    return masks.bigbird(
      key, length, block=self.block, number=self.number, heads=heads, causal=causal
    )

  def init_cache(self, width, batch, length, dtype=jnp.float32):
    """As in `Attention`.

    Raises:
      ValueError: without `Causal()`.
    """
    if self.mask != masks.Causal():
      raise ValueError(f"BigBird: a cache with mask={self.mask}; allowed: Causal()")
    return super().init_cache(width, batch, length, dtype)

  def _mean_keys(self, length, queries):
    return self._pattern(jax.random.key(self.seed), length, 1).mean_keys(length, queries)
