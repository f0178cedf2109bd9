"""How tiled attention in XLA lays its arrays out: a group of heads at a time, tile by tile.

A group of heads is taken out of the arrays and laid out, and its results are put back, so that what
a step holds does not grow with the number of groups. Keys are laid out once for a group, as many
query tiles read them; queries and results a tile at a time, as one step alone uses each.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from effjax.core.typing import Array, Dim
from effjax.kernels.flash_attention.tiled.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes known while tracing. A row of a tile is a (query head of the group, query) pair."""

  B: Dim
  T: int
  S: int
  K: int
  G: int
  H: int
  Hv: int
  tiles: Tiles
  scale: float
  softcap: float | None

  @property
  def rows(self) -> int:
    return self.G * self.tiles.queries

  @property
  def stacked(self) -> int:
    """Batch axis of a tile's products: batch rows × key-value heads."""
    return self.tiles.batch * self.tiles.heads

  @property
  def tile(self) -> tuple[int, ...]:
    """Axes of a tile of scores: batch, heads, G, queries, keys."""
    t = self.tiles
    return t.batch, t.heads, self.G, t.queries, t.keys

  @property
  def groups(self) -> Dim:
    return (self.B // self.tiles.batch) * (self.K // self.tiles.heads)

  @property
  def q_tiles(self) -> int:
    return -(-self.T // self.tiles.queries)

  @property
  def k_tiles(self) -> int:
    return -(-self.S // self.tiles.keys)

  def split(self, c: Array) -> tuple[Array, Array]:
    """The batch group and head group of group c."""
    heads = self.K // self.tiles.heads
    return c // heads, c % heads

  def place(self, x: Array, c: Array, i: Any = None) -> tuple[tuple[Any, ...], tuple[Dim, ...]]:
    """Where group c lies in x [B or 1, length, heads, ...]: starts and sizes; of query tile i."""
    (batch, head), heads = self.split(c), x.shape[2] * self.tiles.heads // self.K
    first, length = (0, x.shape[1]) if i is None else (i * self.tiles.queries, self.tiles.queries)
    start = (batch * self.tiles.batch, first, head * heads, *(0 for _ in x.shape[3:]))
    return starts(start), (self.tiles.batch, length, heads, *x.shape[3:])


def starts(index: Any) -> tuple[Array, ...]:
  """Where a slice begins, all of one type as XLA has it, in any mode."""
  return tuple(jnp.asarray(i, jnp.int32) for i in index)


def take(plan: Plan, x: Array, c: Array) -> Array:
  """[B, S, heads, ...] → those of group c."""
  if plan.groups == 1:
    return x
  return lax.dynamic_slice(x, *plan.place(x, c))


def put(plan: Plan, x: Array, part: Array, c: Array) -> Array:
  """`x` with the values of group c replaced."""
  part = part.astype(x.dtype)
  return part if plan.groups == 1 else lax.dynamic_update_slice(x, part, plan.place(x, c)[0])


def take_rows(plan: Plan, x: Array, c: Array, i: Array) -> Array:
  """[B, padded T, heads · G, X] → [stacked, rows, X], those of group c and query tile i."""
  t, X = plan.tiles, x.shape[-1]
  x = lax.dynamic_slice(x, *plan.place(x, c, i))
  x = x.reshape(t.batch, t.queries, t.heads, plan.G, X).transpose(0, 2, 3, 1, 4)
  return x.reshape(plan.stacked, plan.rows, X)


def put_rows(plan: Plan, x: Array, part: Array, c: Array, i: Array) -> Array:
  """`x` with the values [stacked, rows, X] of group c and query tile i replaced."""
  t, X = plan.tiles, x.shape[-1]
  part = part.reshape(t.batch, t.heads, plan.G, t.queries, X).transpose(0, 3, 1, 2, 4)
  part = part.reshape(t.batch, t.queries, -1, X).astype(x.dtype)
  return lax.dynamic_update_slice(x, part, plan.place(x, c, i)[0])


def pad_rows(plan: Plan, x: Array, value: Any = 0) -> Array:
  """[B, T, ...] → [B, padded T, ...], whole query tiles."""
  return pad(x, 1, plan.q_tiles * plan.tiles.queries, value)


def to_keys(plan: Plan, x: Array, across: bool) -> Array:
  """[batch, S, heads, X] → [key tiles, stacked, keys, X], or [..., X, keys] when `across`."""
  t, X = plan.tiles, x.shape[-1]
  x = pad(x, 1, plan.k_tiles * t.keys)
  x = x.reshape(t.batch, plan.k_tiles, t.keys, t.heads, X)
  x = x.transpose(1, 0, 3, *((4, 2) if across else (2, 4)))
  return x.reshape(plan.k_tiles, plan.stacked, *x.shape[-2:])


def from_keys(plan: Plan, x: Array) -> Array:
  """[key tiles, stacked, X, keys] → [batch, S, heads, X]."""
  t, X = plan.tiles, x.shape[-2]
  x = x.reshape(plan.k_tiles, t.batch, t.heads, X, t.keys).transpose(1, 0, 4, 2, 3)
  return x.reshape(t.batch, -1, t.heads, X)[:, : plan.S]


def pad(x: Array, axis: int, length: int, value: Any = 0) -> Array:
  """`x` with `value` behind its end, up to `length` along `axis`."""
  short = length - x.shape[axis]
  widths = [(0, short if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value) if short else x


def part(
  plan: Plan, shape: tuple[Dim, ...], c: Array, at: Any, size: int
) -> tuple[tuple[Any, ...], tuple[Dim, ...]]:
  """Starts and sizes, in [b, n, length], of group c and `size` entries from `at`.

  An axis of one stays whole: it stands for all.
  """
  t, groups = plan.tiles, plan.split(c)
  wide = t.batch, t.heads * plan.G
  axes = [(n * g, n) if x != 1 else (0, 1) for x, n, g in zip(shape, wide, groups, strict=False)]
  start, sizes = zip(*axes, (at, size) if shape[2] > 1 else (0, 1), strict=True)
  return starts(start), sizes


def by_group(plan: Plan, x: Array) -> Array:
  """[b, n, length] of a group → [b, heads, G, length]."""
  heads = (plan.tiles.heads, plan.G) if x.shape[1] > 1 else (1, 1)
  return x.reshape(x.shape[0], *heads, x.shape[2])


class Bias:
  """A bias, or its gradient, addressed by tiles. Axes of one stay axes of one."""

  def __init__(self, plan: Plan, shape: tuple[Dim, ...]):
    t = plan.tiles
    whole = (plan.B, plan.K * plan.G, plan.q_tiles * t.queries, plan.k_tiles * t.keys)
    part = (t.batch, t.heads * plan.G, t.queries, t.keys)
    wide = [n != 1 for n in shape]
    self.shape = tuple(n if w else 1 for n, w in zip(whole, wide, strict=True))
    self.part = tuple(n if w else 1 for n, w in zip(part, wide, strict=True))
    heads = (t.heads, plan.G) if wide[1] else (1, 1)
    self.tile = (self.part[0], *heads, *self.part[2:])

  def start(self, plan: Plan, c: Array, i: Array, j: Array) -> tuple[Array, ...]:
    index = (*plan.split(c), i, j)
    each = zip(self.part, index, self.shape, strict=True)
    return starts(n * x if w != 1 else 0 for n, x, w in each)

  def pad(self, bias: Array) -> Array:
    """Up to whole tiles; a padded query is as the last one, to which what that hides is hidden."""
    more = self.shape[2] - bias.shape[2]
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, more), (0, 0)), mode="edge") if more else bias
    return pad(bias, 3, self.shape[3])

  def read(self, plan: Plan, bias: Array, c: Array, i: Array, j: Array) -> Array:
    tile = lax.dynamic_slice(bias, self.start(plan, c, i, j), self.part)
    return tile.reshape(self.tile)

  def add(self, plan: Plan, total: Array, scores: Array, c: Array, i: Array, j: Array) -> Array:
    """`total` with the gradient of a tile of scores added where the bias was read."""
    axes = tuple(a for a, n in enumerate(self.tile) if n == 1 and scores.shape[a] > 1)
    scores = jnp.sum(scores, axes, keepdims=True).reshape(self.part)
    start = self.start(plan, c, i, j)
    return lax.dynamic_update_slice(
      total, lax.dynamic_slice(total, start, self.part) + scores, start
    )
