"""The published patterns, composed."""

from typing import Any

from effjax.attention.masks.bands import BlockWindow, Causal, Dilated, SlidingWindow
from effjax.attention.masks.base import Mask
from effjax.attention.masks.per_head import PerHead
from effjax.attention.masks.random_blocks import RandomBlocks
from effjax.attention.masks.tokens import Global
from effjax.core.typing import Array


def longformer(
  window: int,
  positions: Any = 0,
  *,
  dilation: int | tuple[int, ...] = 1,
  causal: bool = False,
) -> Mask:
  """A window of `window` keys on each side, with gaps, and global tokens.

  Args:
    positions: the global tokens, as in `Global`.
    dilation: distance of the keys a query sees, or one for each head.
    causal: nothing sees what comes after it.

  Example:
    >>> longformer(1, 1).dense(4).astype(int).tolist()
    [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]]

  Reference: Longformer (arXiv 2004.05150), section 3.1.
  """
  local: Mask
  band = lambda gap: SlidingWindow(window, window) if gap == 1 else Dilated(window, gap)
  if isinstance(dilation, tuple):
    gaps = sorted(set(dilation))
    local = PerHead(tuple(map(band, gaps)), tuple(map(gaps.index, dilation)))
  else:
    local = band(dilation)
  seen = local if isinstance(positions, int) and positions == 0 else local | Global(positions)
  return seen & Causal() if causal else seen


def bigbird(
  key: Array,
  length: int,
  *,
  block: int = 64,
  number: int = 3,
  heads: int = 1,
  causal: bool = False,
) -> Mask:
  """Blocks that see themselves, their neighbours, `number` random ones, the first and the last.

  Args:
    key: draws the random blocks, different ones for each of `heads`.
    length: the sequence's, of any number of positions.
    causal: nothing sees what comes after it. The first block alone is global then, so that what a
      token sees does not depend on how long the sequence becomes.

  Example:
    >>> import jax
    >>> mask = bigbird(jax.random.key(0), 16, block=2, number=1)
    >>> int(mask.dense(16)[0, 0, 6].sum())  # three blocks beside it, the two ends, one drawn
    12

  Reference: BigBird (arXiv 2007.14062), section 2 and appendix D.
  """
  drawn = RandomBlocks.draw(key, length, block=block, number=number, heads=heads, causal=causal)
  first = min(block, length)
  if causal:
    return (BlockWindow(1, 0, block) | Global(first) | drawn) & Causal()
  last = (-(-length // block) - 1) * block
  ends = Global(tuple(range(first)) + tuple(range(max(last, block), length)))
  return BlockWindow(1, 1, block) | ends | drawn
