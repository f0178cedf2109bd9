"""Which tiles the programs of a TPU's kernel work on, one after the other.

The grid goes through the listed tiles of all rows (or columns) in order, so that the next tile
arrives while this one is worked on, whatever the mask leaves out. Its last axis goes through the
query heads that share a tile's keys, which are read once for all of them.
"""

import dataclasses
from typing import Any

from jax import lax

from effjax.core.typing import Array
from effjax.kernels.flash_attention.fused import walks
from effjax.kernels.flash_attention.fused.jobs import Job
from effjax.kernels.flash_attention.fused.places import Place

_ROWS = 1024  # queries of all heads that keep their sums in VMEM at the same time


@dataclasses.dataclass(frozen=True)
class Route(Place):
  """A place whose blocks follow a walk.

  Kinds of axes besides those of a place: g all query heads of a program's group, x the group.

  Attributes:
    walk: of the lists; None visits every tile, as a partial one.
    entry: where a program's step is in the walk's arrays, from the program's indices.
    apart: whether each query head of a group has a result of its own, or all have one together.
    keys_across: whether keys lie along the last axis of a tile.
  """

  walk: walks.Walk | None
  entry: Any
  apart: bool
  keys_across: bool

  @property
  def repeats(self) -> int:
    """Programs in a row that work on one step."""
    return self.grid[-1]


def by_rows(job: Job) -> Route:
  """The tiles of each row of tiles, for as many query heads of a group as VMEM has room for."""
  walk = walks.Walk.of(job.lists, job.tiles[1])
  most = max(1, _ROWS // job.size.queries) if walk.heads == 1 else 1
  repeats = max(n for n in range(1, most + 1) if job.group % n == 0)
  return _listed(job, walk, repeats, True)


def by_columns(job: Job) -> Route:
  """The tiles of each column, for key-value heads where the lists are one for all query heads."""
  walk = walks.Walk.of(job.lists, job.tiles[0])
  return _listed(job, walk, job.group if walk.heads == 1 else 1, False)


def _listed(job: Job, walk: walks.Walk, repeats: int, by_rows: bool) -> Route:
  B, _, N, _ = job.query.shape
  head = lambda x, g: x * repeats + g
  entry = lambda b, x, s, g: walk.entry(b, head(x, g), s)
  tile = lambda which: lambda b, x, s, g, *lists: lists[which][entry(b, x, s, g)]
  axes = {
    "b": (None, lambda b, x, s, g, *lists: b),
    "x": (None, lambda b, x, s, g, *lists: x),
    "n": (None, lambda b, x, s, g, *lists: head(x, g)),
    "m": (None, lambda b, x, s, g, *lists: lax.div(head(x, g), job.group)),
    "q": (job.size.queries, tile(0 if by_rows else 1)),
    "k": (job.size.keys, tile(1 if by_rows else 0)),
  }
  axes["g"] = (repeats, axes["x"][1]) if by_rows else axes["n"]
  return Route((B, N // repeats, walk.used, repeats), axes, walk, entry, by_rows, by_rows)


def by_bias(job: Job, bias: Array) -> Route:
  """The tiles of the bias, and for each the batch rows and heads that share it."""
  B, _, N, _ = job.query.shape
  b, n = bias.shape[:2]
  shared = N // n
  axes = {
    "y": (None, lambda y, z, i, j, r: y),
    "z": (None, lambda y, z, i, j, r: z),
    "b": (None, lambda y, z, i, j, r: y + lax.div(r, shared)),
    "n": (None, lambda y, z, i, j, r: z + lax.rem(r, shared)),
    "m": (None, lambda y, z, i, j, r: lax.div(z + lax.rem(r, shared), job.group)),
    "q": (job.size.queries, lambda y, z, i, j, r: i),
    "k": (job.size.keys, lambda y, z, i, j, r: j),
  }
  axes["g"] = axes["n"]
  return Route((b, n, *job.tiles, B // b * shared), axes, None, None, False, True)
