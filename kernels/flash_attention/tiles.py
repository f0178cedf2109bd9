"""How the work is cut up: sizes of a tile, and the order in which a row of tiles is visited."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Array
from effjax.kernels.flash_attention.spans import Grid, Spans, union

_CPU_TILE = 2**19  # scores worked on at once: two megabytes of float32 stay near two cores
_DEVICE_TILE = 2**24
_SIZES = ((512, 512), (256, 256), (128, 128))
_STEP = 2**15  # what one more tile costs, in scores of a head


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Batch rows, key-value heads, queries and keys that one step works on.

  `batch` divides B and `heads` divides K; T and S are padded to multiples of `queries` and `keys`.
  """

  batch: int
  heads: int
  queries: int
  keys: int


def choose(B: int, T: int, S: int, K: int, G: int, mask: Any) -> Tiles:
  """Tile sizes for the default backend; G is the number of query heads to a key-value head.

  A mask known while tracing decides how fine the tiles are: a narrow window wants small ones. Where
  heads differ in what they see, none waits for another's tiles.
  One CPU device takes heads a few at a time, so that a tile of scores stays in cache. With more
  devices, and on accelerators, a step spans the whole batch and all heads: a scan over an axis that
  the compiler shards would gather it.
  """
  static = not jax.tree.leaves(mask)
  sizes = [(_even(T, queries), _even(S, keys)) for queries, keys in _SIZES]
  queries, keys = min(sizes, key=lambda size: _cost(mask, T, S, *size)) if static else sizes[1]
  if jax.default_backend() == "cpu" and jax.device_count() == 1:
    room = max(_CPU_TILE // (G * queries * keys), 1)
    heads = 1 if mask.heads > 1 else _divisor(K, max(room, 2 if K % 2 == 0 else 1))
    return Tiles(_divisor(B, room // heads) if heads == K else 1, heads, queries, keys)
  while B * K * G * queries * keys > _DEVICE_TILE and max(queries, keys) > 128:
    queries, keys = _even(T, max(queries // 2, 128)), _even(S, max(keys // 2, 128))
  return Tiles(B, K, queries, keys)


def _cost(mask: Any, T: int, S: int, queries: int, keys: int) -> int:
  grid = Grid.of(T, S, queries, keys)
  some, _ = mask.spans(grid, *mask.features(np.arange(S - T, S)[None], S))
  return int(some.count().sum()) * (queries * keys + _STEP)


def _even(length: int, most: int) -> int:
  """The size of equal tiles of at most `most`, a multiple of 8, that pads `length` least."""
  size = math.ceil(length / math.ceil(length / most))
  return min(math.ceil(size / 8) * 8, max(most, 8))


def _divisor(n: int, most: int) -> int:
  return max(d for d in range(1, max(min(n, most), 1) + 1) if n % d == 0)


@dataclasses.dataclass(frozen=True)
class Visits:
  """For each group of batch rows and heads and each query tile, intervals of key tiles to visit."""

  spans: Spans

  @property
  def none(self) -> bool:
    """True where it is known while tracing that there is nothing to visit."""
    return isinstance(self.spans.start, np.ndarray) and not self.spans.count().any()

  def row(self, batch: Any, head: Any, i: Any) -> tuple[Array, Any]:
    """Number of key tiles for query tile i, and a function from 0 … number − 1 to the tile."""
    start, stop = (_at(x, batch, head, i) for x in (self.spans.start, self.spans.stop))
    size = jnp.maximum(stop - start, 0)
    after = jnp.cumsum(size)

    def tile(n: Any) -> Array:
      if start.shape[0] == 1:
        return start[0] + n
      which = jnp.sum(after <= n)
      return start[which] + n - (after[which] - size[which])

    return after[-1], tile


def _at(x: Any, batch: Any, head: Any, i: Any) -> Array:
  x = jnp.asarray(x, jnp.int32)
  return x[batch if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0, i]


def partition(some: Spans, every: Spans, whole: int, tiles: int) -> tuple[Visits, Visits]:
  """Tiles that need the mask evaluated and tiles that do not.

  Args:
    whole: key tiles without padding; a padded one is never free of the mask.
    tiles: all key tiles.
  """
  ragged = Spans(np.full((1, 1, 1, 1), whole), np.full((1, 1, 1, 1), tiles))
  every = every & ragged.complement(tiles)
  return Visits(some & every.complement(tiles)), Visits(every)


def merge(spans: Spans, batch: int, heads: int) -> Spans:
  """What is in the spans of any of `batch` rows and `heads` heads that are worked on together."""
  groups = [(x, batch, heads) for x in (spans.start, spans.stop)]
  return union(*(_grouped(*group) for group in groups)) if batch * heads > 1 else spans


def _grouped(x: Any, batch: int, heads: int) -> Any:
  """[b, h, rows, n] as [b / batch, h / heads, rows, batch · heads · n]; axes of one stay."""
  b, h, rows, n = x.shape
  batch, heads = min(b, batch), min(h, heads)
  x = x.reshape(b // batch, batch, h // heads, heads, rows, n).transpose(0, 2, 4, 1, 3, 5)
  return x.reshape(b // batch, h // heads, rows, -1)
