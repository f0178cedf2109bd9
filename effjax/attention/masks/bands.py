"""Masks of position alone, part of the compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from effjax.attention.masks.base import FAR, Mask, at_least, namespace, of_positions


class _Band(Mask):
  """Query q sees keys q − left … q + right; None is no bound."""

  left: int | None
  right: int | None
  exact = relative = True

  @property
  def band(self) -> tuple[int | None, int | None]:
    left, right = (None if x is None or x >= FAR else int(x) for x in (self.left, self.right))
    return left, right

  @property
  def causal(self) -> bool:
    return self.band[1] == 0

  def predicate(self, q, k, q_features, k_features):
    left, right = self.band
    if left is None and right is None:
      return namespace(q, k).ones(jnp.broadcast_shapes(np.shape(q), np.shape(k)), bool)
    # Widths are added to keys, of which there are few enough; a query may claim any position.
    low = None if left is None else k + left >= q
    high = None if right is None else k - right <= q
    return high if low is None else low if high is None else low & high

  def spans(self, grid, q_features, k_features):
    left, right = (FAR if width is None else width for width in self.band)
    some = grid.touching(grid.first - left, grid.last + right)
    return some, grid.inside(grid.last - left, grid.first + right)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Full(_Band):
  """Every query sees every key."""

  left = right = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Causal(_Band):
  """Query q sees keys 0 … q."""

  left, right = None, 0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SlidingWindow(_Band):
  """Query q sees keys q − left … q + right; None on a side is no bound there.

  Raises:
    ValueError: a negative width.

  Reference: Longformer (arXiv 2004.05150), section 3.1.
  """

  left: int | None
  right: int | None

  def __post_init__(self):
    for side in ("left", "right"):
      width = getattr(self, side)
      if width is not None:
        at_least(f"SlidingWindow: {side}", width, 0, " or None for no bound")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
  """Every `dilation`-th key on both sides: |q − k| ≤ window · dilation and dilation | q − k.

  Example:
    >>> Dilated(1, 2).dense(5)[2].astype(int).tolist()
    [1, 0, 1, 0, 1]

  Raises:
    ValueError: a negative window, or a dilation below 1.

  Reference: Longformer (arXiv 2004.05150), section 3.1.
  """

  window: int
  dilation: int
  relative = True

  def __post_init__(self):
    at_least("Dilated: window", self.window, 0)
    at_least("Dilated: dilation", self.dilation, 1)

  @property
  def _band(self) -> SlidingWindow:
    return SlidingWindow(self.window * self.dilation, self.window * self.dilation)

  def features(self, q_positions, length):
    return of_positions(q_positions, length, lambda x: x % min(self.dilation, FAR))

  def predicate(self, q, k, q_features, k_features):
    return self._band.predicate(q, k, (), ()) & (q_features == k_features)

  def spans(self, grid, q_features, k_features):
    some, every = self._band.spans(grid, (), ())
    return some, every if self.dilation == 1 else Mask.spans(self, grid, (), ())[1]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockWindow(Mask):
  """Queries of block i see the keys of blocks i − left … i + right.

  Reference: BigBird (arXiv 2007.14062), section 2 and appendix D.
  """

  left: int
  right: int
  block: int
  exact = True

  def __post_init__(self):
    for name, least in (("left", 0), ("right", 0), ("block", 1)):
      at_least(f"BlockWindow: {name}", getattr(self, name), least)

  @property
  def causal(self) -> bool:
    return (self.right, self.block) == (0, 1)

  def features(self, q_positions, length):
    return of_positions(q_positions, length, lambda x: x // self._sizes[2])

  def predicate(self, q, k, q_features, k_features):
    left, right, _ = self._sizes
    return SlidingWindow(left, right).predicate(q_features, k_features, (), ())

  def spans(self, grid, q_features, k_features):
    left, right, size = self._sizes
    first, last = grid.first // size, grid.last // size
    start = lambda block: block * size
    return (
      grid.touching(start(first - left), start(last + right + 1) - 1),
      grid.inside(start(last - left), start(first + right + 1) - 1),
    )

  @property
  def _sizes(self) -> tuple[int, int, int]:
    """left, right and block, none of which goes further than `FAR`."""
    size = min(self.block, FAR)
    most = max(FAR // size - 1, 0)
    return min(self.left, most), min(self.right, most), size
