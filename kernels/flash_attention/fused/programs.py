"""Which program of a GPU's grid does what.

Programs start in the order of the grid, its first axis the fastest. Those that go through the same
keys (or queries) start together and find them in the cache; among them the longest lists come
first, so that what is left at the end is short and no part of the device waits for long.
"""

from jax import lax

from effjax.core.typing import Array
from effjax.kernels.flash_attention.fused.jobs import Job
from effjax.kernels.flash_attention.fused.places import Place

PIECES = -2  # the axis of a grid that counts pieces, the longest first
_CACHE = 2**25  # bytes that a device keeps beside what is streamed: less than an A100's L2


def by_rows(job: Job, pieces: int) -> Place:
  """A program for each piece of a list of a tile of queries, query head and batch row."""
  (B, S, K, _), G = job.key.shape, job.group
  near = _together(B * K, S * _bytes(job))
  of = lambda t, z: z * near + t
  axes = {
    "b": (None, lambda g, t, i, z: lax.div(of(t, z), K)),
    "n": (None, lambda g, t, i, z: lax.rem(of(t, z), K) * G + g),
    "m": (None, lambda g, t, i, z: lax.rem(of(t, z), K)),
  }
  return Place((G, near, pieces, B * K // near), axes)


def by_columns(job: Job, pieces: int) -> Place:
  """A program for each piece of a list of a tile of keys, key-value head and batch row."""
  (B, T, *_), K = job.query.shape, job.key.shape[2]
  near = _together(B * K, T * job.group * _bytes(job))
  of = lambda t, z: z * near + t
  head = lambda t, j, z: lax.rem(of(t, z), K)
  axes = {
    "b": (None, lambda t, j, z: lax.div(of(t, z), K)),
    "n": (job.group, head),
    "m": (None, head),
  }
  return Place((near, pieces, B * K // near), axes)


def by_bias(job: Job, bias: Array) -> Place:
  """A program for each tile of the bias."""
  (B, _, N, _), K = job.query.shape, job.key.shape[2]
  b, n = bias.shape[:2]
  axes = {
    "b": (B // b, lambda i, j, c: lax.div(c, n)),
    "n": (N // n, lambda i, j, c: lax.rem(c, n)),
    "m": (K, lambda i, j, c: 0)
    if n == 1
    else (1, lambda i, j, c: lax.div(lax.rem(c, n), job.group)),
    "q": (job.size.queries, lambda i, j, c: i),
    "k": (job.size.keys, lambda i, j, c: j),
  }
  return Place((*job.tiles, b * n), axes)


def _bytes(job: Job) -> int:
  """Of a key and its value, or of a query and its gradient."""
  return (job.query.shape[3] + job.value.shape[3]) * job.key.dtype.itemsize


def _together(pairs: int, size: int) -> int:
  """How many heads of so many bytes the cache holds, a divisor of their number."""
  return max(n for n in range(1, pairs + 1) if pairs % n == 0 and (n == 1 or n * size <= _CACHE))
