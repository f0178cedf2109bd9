"""What a platform gives, kernels, and what each of them gets, a `Job`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Array
from effjax.kernels.flash_attention.fused import interpreted, steps
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes
from effjax.kernels.flash_attention.tile_map.blocks import TileList, tile_lists
from effjax.kernels.flash_attention.tile_map.partly import Partly
from effjax.kernels.flash_attention.tile_map.sight import Sight
from effjax.kernels.flash_attention.tile_map.terms import Terms

# What makes 2^(score − large) = 0 of rows with nothing to attend to, padded ones among them.
NOTHING = {"top": -steps.FLOOR, "log_sum": 0.0, "lse": -steps.FLOOR, "delta": 0.0}


@dataclasses.dataclass(frozen=True)
class Kernels:
  """A platform's kernels; each takes a `Job` and returns padded arrays.

  Attributes:
    forward: out [B, T, N, Hv] and, [B, N, T], the maximum of the scores in their unit and log₂ of
      the sum of 2^(score − maximum).
    queries: dQ [B, T, N, H], or None where `keys` gives it.
    keys: dK [B, S, K, H] and dV [B, S, K, Hv], then dQ if no other kernel does.
    bias: the bias's gradient, in its shape.
    refusal: why it cannot take these terms, or None.
    platform: "gpu" or "tpu".
    width: the width that a head of a given one is padded to.
    power: 2^(factor · x − y) where the device scales and shifts in one instruction.
    few: gives the forward pass of a few queries another way, as of `few.forward`, if anything does.
  """

  forward: Callable[["Job"], tuple[Array, ...]]
  queries: Callable[["Job"], Array] | None
  keys: Callable[["Job"], tuple[Array, ...]]
  bias: Callable[["Job"], Array]
  refusal: Callable[[Terms | None], str | None]
  platform: str
  width: Callable[[int], int]
  power: Callable[[Array, float, Any], Array] | None = None
  few: Callable[..., tuple[Array, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is known of a call while tracing."""

  kernels: Kernels
  scale: float
  softcap: float | None
  sizes: Sizes
  splits: int
  interpret: Any

  def powers(self, adds: bool, cap: bool) -> steps.Powers:
    """By whether something is added to the scores and whether a soft cap is data."""
    own = self.kernels.power
    power = steps.power if own is None or self.interpret else own
    return steps.Powers.of(self.scale, self.softcap, adds or cap, power, own is not None)

  def result(self, shape: tuple[int, ...], dtype: Any, given: Any) -> jax.ShapeDtypeStruct:
    """A kernel's result, which varies over the mesh axes that the arrays it is given vary over."""
    like = 1.0 if self.interpret else jax.tree.leaves(given)[0]
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)

  def run(self, call: Callable[..., Any], *operands: Any) -> Any:
    """A kernel on its operands."""
    return interpreted.alone(call, operands) if self.interpret else call(*operands)


@dataclasses.dataclass(frozen=True)
class Job:
  """What a kernel works on: arrays padded to whole tiles, and what goes on in each tile.

  Attributes:
    size: of its tiles.
    lists: the tiles of each row (or column) of tiles.
    any_full, any_partial: False where it is known that the lists hold no such tile.
    seen: booleans of a tile from its parts of `queries` and `keys` and the positions of its keys.
    term: from these and the tile's part of `line` what the score adds, None without a score.
    entry: where the pairs of positions q, k are in `line`.
    queries, keys: pytrees [b, h, length], see `Sight` and `Terms`.
    line: pytree [b, h, long + wide − 1] or [b, h, 2 · S − 1], see `Terms`.
    cap: a soft cap known when running alone, [1, 1].
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
  seen: Callable[[Any, Any, Any], Array]
  term: Callable[[Any, Any, Any, Any], Array] | None
  entry: Callable[[Array, Array], Array]
  queries: Any
  keys: Any
  line: Any
  cap: Array | None
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
    where: Partly,
    terms: Any,
    *,
    d_out: Array | None = None,
    lines: dict[str, Array] | None = None,
    by_columns: bool = False,
  ) -> "Job":
    """The arrays padded, and the tiles of each row (or column) listed."""
    T, S = query.shape[1], key.shape[1]
    rows, columns = -(-T // size.queries), -(-S // size.keys)
    long, wide = rows * size.queries, columns * size.keys
    sight, lists = _listed(where, T, S, size.queries, size.keys, by_columns)
    any_full, any_partial = lists.kinds
    scored = terms is not None and terms.structure is not None
    features = (terms.queries, terms.keys) if scored else ((), ())
    asked = any_partial or scored or bias is not None  # where every pair is seen, nothing is
    known = (sight.queries, sight.keys) if asked else ((), ())
    queries, read_queries = _plain((known[0], features[0]), T, long)
    keys, read_keys = _plain((known[1], features[1]), S, wide)

    def term(q, k, at, line):
      (sight_q, q), (_, k) = read_queries(q), read_keys(k)
      return terms.value(q, k, line(sight_q[0], at), sight_q[0], at)

    def entry(q, k):
      return (
        q - k + (wide - 1 - (S - T)) if terms.diagonal else jnp.clip(q - k, 1 - S, S - 1) + S - 1
      )

    head = lambda x, length: _padded(x, length, settings.kernels.width(x.shape[-1]))
    line = lambda x, fill: jnp.pad(
      jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, long - T)), constant_values=fill
    )
    return cls(
      settings=settings,
      size=size,
      lists=lists,
      any_full=any_full,
      any_partial=any_partial,
      seen=lambda q, k, at: sight.seen(read_queries(q)[0], read_keys(k)[0], at),
      term=term if scored else None,
      entry=entry,
      queries=queries,
      keys=keys,
      line=jax.tree.map(jnp.asarray, terms.padded(long, wide).line) if scored else (),
      cap=None if terms is None or terms.softcap is None else terms.softcap.reshape(1, 1),
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
  def adds(self) -> bool:
    """Whether something is added to the scores."""
    return self.bias is not None or self.term is not None

  @property
  def hides(self) -> bool:
    """Whether some pairs may not see each other."""
    return self.any_partial or self.adds

  @property
  def powers(self) -> steps.Powers:
    """2^(score − top)."""
    return self.settings.powers(self.adds, self.cap is not None)

  def scores(
    self,
    a: Array,
    b: Array,
    queries: Any,
    keys: Any,
    at: Array | None,
    line: Callable[[Array, Array], Any],
    bias: Array | None,
    cap: Array | None,
    how: tuple[bool, bool],
  ) -> tuple[Array, Array | None, steps.Shown]:
    """Those of a tile and the soft cap's derivative, see `steps.scores`, and which pairs are seen.

    Args:
      queries, keys: the tile's parts.
      at: positions of its keys.
      line: gives its part of `line` for the positions of queries and keys.
      how: whether the predicate is evaluated, and whether what it hides may be NaN.
    """
    masked, exact = how
    shown = steps.Shown(self.seen(queries, keys, at) if masked else None, exact)
    parts = [] if bias is None else [bias.astype(jnp.float32)]
    if self.term is not None:
      term = jnp.asarray(self.term(queries, keys, at, line)).astype(jnp.float32)
      parts.append(jnp.broadcast_to(term, (a.shape[0], b.shape[0])))
    for part in parts if exact else ():
      shown = shown.without(part == -jnp.inf)
    added = sum(parts[1:], start=parts[0]) if parts else None
    softcap = self.settings.softcap if cap is None else cap
    return *steps.scores(a, b, added, shown, self.settings.scale, softcap), shown


def _listed(where: Partly, T: int, S: int, *how: Any) -> tuple[Sight, TileList]:
  """Who sees whom in tiles, and their list; see `_fixed`."""
  return _sighted(where, T, S, *how) if where.data else _fixed(where, T, S, *how)


def _sighted(
  where: Partly, T: int, S: int, block_q: int, block_k: int, by_columns: bool
) -> tuple[Sight, TileList]:
  sight = Sight.of(where.tree, T, S, block_q, block_k)
  return sight, tile_lists(sight, -(-T // block_q), -(-S // block_k), by_columns=by_columns)


@functools.lru_cache(maxsize=8)
def _fixed(*arguments: Any) -> tuple[Sight, TileList]:
  """Built once, for all layers and for both passes, where all is known while tracing."""
  with jax.ensure_compile_time_eval():
    return _sighted(*arguments)


def _plain(tree: Any, length: int, padded: int) -> tuple[Any, Callable[[Any], Any]]:
  """The arrays as int32 or float32 [b, h, padded], and a function that gives tiles their types."""
  flags = jax.tree.map(lambda x: jnp.dtype(x.dtype) == jnp.bool_, tree)

  def whole(x: Any) -> Any:
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    kind = np.float32 if jnp.issubdtype(x.dtype, jnp.floating) else np.int32
    x = xp.broadcast_to(x, (*x.shape[:2], length)).astype(kind)
    return xp.pad(x, ((0, 0), (0, 0), (0, padded - length)), mode="edge")

  read = lambda tiles: jax.tree.map(lambda flag, x: x != 0 if flag else x, flags, tiles)
  return jax.tree.map(whole, tree), read


def _padded(x: Array, length: int, width: int) -> Array:
  """[B, L, heads, X] with zeros up to `length` and `width`."""
  return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[3])))
