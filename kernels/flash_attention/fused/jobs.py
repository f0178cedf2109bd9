"""What a platform gives, kernels, and what each of them gets, a `Job`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.typing import Array
from effjax.kernels.flash_attention.fused import steps
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes
from effjax.kernels.flash_attention.tile_map.blocks import TileList, tile_lists
from effjax.kernels.flash_attention.tile_map.sight import Sight, Where

# What makes 2^(score − large) = 0 of rows with nothing to attend to, padded ones among them.
NOTHING = {"top": -steps.FLOOR, "log_sum": 0.0, "lse": -steps.FLOOR, "delta": 0.0}


@dataclasses.dataclass(frozen=True)
class Kernels:
  """A platform's kernels; each takes a `Job` and returns padded arrays.

  Attributes:
    forward: of P parts of each row's tiles out [P, B, T, N, Hv] and, [P, B, N, T], the maximum of
      the scores in their unit and log₂ of the sum of 2^(score − maximum).
    queries: dQ [B, T, N, H].
    keys: dK [B, S, K, H] and dV [B, S, K, Hv].
    bias: the bias's gradient, in its shape.
    platform: "gpu" or "tpu".
    width: the width that a head of a given one is padded to.
  """

  forward: Callable[["Job"], tuple[Array, Array]]
  queries: Callable[["Job"], Array]
  keys: Callable[["Job"], tuple[Array, Array]]
  bias: Callable[["Job"], Array]
  platform: str
  width: Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is known of a call while tracing."""

  kernels: Kernels
  scale: float
  softcap: float | None
  sizes: Sizes
  splits: int
  interpret: bool


@dataclasses.dataclass(frozen=True)
class Job:
  """What a kernel works on: arrays padded to whole tiles, and what goes on in each tile.

  Attributes:
    size: of its tiles.
    lists: the tiles of each row (or column) of tiles.
    any_full, any_partial: False where it is known that the lists hold no such tile.
    seen: booleans of a tile from its parts of `queries` and `keys` and the positions of its keys.
    queries, keys: pytrees of integers [b, h, length], see `Sight`.
    query … bias: [B, T, N, H], [B, S, K, H], [B, S, K, Hv], [b, n, T, S].
    d_out: backward only, [B, T, N, Hv].
    lines: backward only, by name, [B, N, T]: "top" and "log_sum" of the forward kernel; "lse", both
      in units of log 2, NaN where it has too few digits; "delta".
  """

  settings: Settings
  size: Size
  lists: TileList
  any_full: bool
  any_partial: bool
  seen: Callable[[Any, Any, Array], Array]
  queries: Any
  keys: Any
  query: Array
  key: Array
  value: Array
  bias: Array | None
  d_out: Array | None = None
  lines: dict[str, Array] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(
    cls,
    settings: Settings,
    size: Size,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None,
    where: Where,
    *,
    d_out: Array | None = None,
    lines: dict[str, Array] | None = None,
    by_columns: bool = False,
  ) -> "Job":
    """The arrays padded, and the tiles of each row (or column) listed."""
    T, S = query.shape[1], key.shape[1]
    rows, columns = -(-T // size.queries), -(-S // size.keys)
    long, wide = rows * size.queries, columns * size.keys
    sight = Sight.of(where, T, S, size.queries, size.keys)
    lists = tile_lists(sight, rows, columns, by_columns=by_columns)
    queries, read_queries = _integers(sight.queries, T, long)
    keys, read_keys = _integers(sight.keys, S, wide)
    head = lambda x, length: _padded(x, length, settings.kernels.width(x.shape[-1]))
    line = lambda x, fill: jnp.pad(
      jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, long - T)), constant_values=fill
    )
    any_full, any_partial = lists.kinds
    return cls(
      settings=settings,
      size=size,
      lists=lists,
      any_full=any_full,
      any_partial=any_partial,
      seen=lambda q, k, at: sight.seen(read_queries(q), read_keys(k), at),
      queries=queries,
      keys=keys,
      query=head(query, long),
      key=head(key, wide),
      value=head(value, wide),
      bias=bias if bias is None else jnp.pad(bias, ((0, 0), (0, 0), (0, long - T), (0, wide - S))),
      d_out=d_out if d_out is None else head(d_out, long),
      lines={name: line(x, NOTHING[name]) for name, x in (lines or {}).items()},
    )

  @property
  def group(self) -> int:
    """Query heads of a key-value head."""
    return self.query.shape[2] // self.key.shape[2]

  @property
  def tiles(self) -> tuple[int, int]:
    """Number of query tiles and of key tiles."""
    return self.query.shape[1] // self.size.queries, self.key.shape[1] // self.size.keys

  @property
  def hides(self) -> bool:
    """Whether some pairs may not see each other."""
    return self.any_partial or self.bias is not None

  @property
  def unit(self) -> float:
    """Of the scores."""
    return steps.unit(self.settings.scale, self.settings.softcap, self.bias is not None)

  @property
  def log2(self) -> float:
    """A unit of the scores in units of log 2."""
    return self.unit * steps.LOG2E

  def scores(self, a: Array, b: Array, bias: Array | None, shown: steps.Shown):
    """Those of a tile, see `steps.scores`, and `shown` with what the bias hides hidden."""
    if shown.exact and bias is not None:
      shown = shown.without(bias.astype(jnp.float32) == -jnp.inf)
    found = steps.scores(a, b, bias, shown, self.settings.scale, self.settings.softcap)
    return *found, shown

  def result(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result that varies over the mesh axes that the arguments vary over."""
    kind = jax.typeof(self.query).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def _integers(tree: Any, length: int, padded: int) -> tuple[Any, Callable[[Any], Any]]:
  """The arrays as int32 [b, h, padded], and a function that gives tiles of them their types."""
  flags = jax.tree.map(lambda x: jnp.dtype(x.dtype) == jnp.bool_, tree)

  def whole(x: Any) -> Array:
    x = jnp.broadcast_to(x, (*x.shape[:2], length)).astype(jnp.int32)
    return jnp.pad(x, ((0, 0), (0, 0), (0, padded - length)), mode="edge")

  read = lambda tiles: jax.tree.map(lambda flag, x: x != 0 if flag else x, flags, tiles)
  return jax.tree.map(whole, tree), read


def _padded(x: Array, length: int, width: int) -> Array:
  """[B, L, heads, X] with zeros up to `length` and `width`."""
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[3])))
