"""How the work is cut up: the sizes of a tile."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from effjax.core.known import is_size
from effjax.core.typing import Dim
from effjax.kernels.flash_attention.tile_map.spans import Grid

_CPU_TILE = 2**20  # scores worked on at once: fewer, and two cores wait for each other more
_DEVICE_TILE = 2**24
# Sizes of a tile, and the time one takes on two CPU cores, relative to the others.
_SIZES = {(512, 512): 8.0, (512, 256): 4.0, (256, 256): 3.7, (128, 128): 1.05}


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Batch rows, key-value heads, queries and keys that one step works on.

  `batch` divides B and `heads` divides K; T and S are padded to multiples of `queries` and `keys`.
  `fixed` tries the maximum over a query's first tile in place of a running one: less to do in each
  tile, and all of it twice for queries whose other scores lie far from it or that see nothing.
  """

  batch: int
  heads: int
  queries: int
  keys: int
  fixed: bool = False


def choose(B: Dim, T: int, S: int, K: int, G: int, mask: Any) -> Tiles:
  """Tile sizes for the default backend; G is the number of query heads to a key-value head.

  A mask known while tracing decides how fine the tiles are: a narrow window wants small ones. Where
  heads differ in what they see, none waits for another's tiles.
  One CPU device takes heads a few at a time, so that a tile of scores stays in cache. With more
  devices, and on accelerators, a step spans the whole batch and all heads: a scan over an axis that
  the compiler shards would gather it. A batch whose size is a symbol goes row by row.
  """
  B = B if is_size(B) else 1
  static = not jax.tree.leaves(mask)
  sizes = [
    (_even(T, queries), _even(S, keys), time / (queries * keys))
    for (queries, keys), time in _SIZES.items()
  ]
  time = lambda size: _pairs(mask, T, S, size[0], size[1]) * size[2]
  queries, keys, _ = min(sizes, key=time) if static else sizes[1]
  if jax.default_backend() == "cpu" and jax.device_count() == 1:
    room = max(_CPU_TILE // (G * queries * keys), 1)
    heads = 1 if mask.heads > 1 else _divisor(K, max(room, 2 if K % 2 == 0 else 1))
    return Tiles(_divisor(B, room // heads) if heads == K else 1, heads, queries, keys, fixed=True)
  while B * K * G * queries * keys > _DEVICE_TILE and max(queries, keys) > 128:
    queries, keys = _even(T, max(queries // 2, 128)), _even(S, max(keys // 2, 128))
  return Tiles(B, K, queries, keys)


def _pairs(mask: Any, T: int, S: int, queries: int, keys: int) -> int:
  """Pairs in the tiles that a mask visits."""
  grid = Grid.of(T, S, queries, keys)
  some, _ = mask.spans(grid, *mask.features(np.arange(S - T, S)[None], S))
  return int(some.count().sum()) * queries * keys


def _even(length: int, most: int) -> int:
  """The size of equal tiles of at most `most`, a multiple of 8, that pads `length` least."""
  size = math.ceil(length / math.ceil(length / most))
  return min(math.ceil(size / 8) * 8, max(most, 8))


def _divisor(n: int, most: int) -> int:
  return max(d for d in range(1, max(min(n, most), 1) + 1) if n % d == 0)
