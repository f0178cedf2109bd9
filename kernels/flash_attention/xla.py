"""Exact attention in tiles, in plain XLA: for every backend, skipping tiles a mask leaves empty.

Forward, for a tile of queries Q and each visited tile of keys (online softmax, running maximum m
and sum l per query):
  S = scale·QKᵀ → softcap → + bias → mask;  m' = max(m, rowmax S);  P = exp(S − m')
  l ← l·exp(m − m') + rowsum P;  A ← A·exp(m − m') + PV;  at the end O = A / l, LSE = m + log l.
Backward, from O and LSE alone, with D = rowsum(dO∘O) − dLSE:
  P = exp(S − LSE);  dV += PᵀdO;  dS = P∘(dOVᵀ − D);  dQ += scale·dS·K;  dK += scale·dSᵀQ.
Tangents, from LSE too, with Ṡ = scale·(Q̇Kᵀ + QK̇ᵀ) through the soft cap, + the bias's:
  LṠE = rowsum P∘Ṡ;  Ȯ = (P∘Ṡ)V + PV̇ − LṠE∘O.

References: Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691, algorithms
1 and 2.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.polynomial import Polynomial
from numpy.polynomial.chebyshev import chebpts1

from effjax.core import numerics
from effjax.core.linear_map import linear_map
from effjax.core.typing import Array, Float, Int
from effjax.kernels.flash_attention import tiles as tiling
from effjax.kernels.flash_attention.spans import Grid, equal_ids, tiled

_FLOOR = -1e30  # least running maximum: finite, so that a row of −inf scores gives exp(−inf) = 0
_NODES = chebpts1(64) / 2
_EXP2 = Polynomial.fit(_NODES, np.exp2(_NODES), 6).convert().coef[::-1]  # 2^x on [−½, ½]


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  *,
  mask: Any,
  scale: float,
  logit_softcap: float | None = None,
  bias: Float[Array, "#B #N #T #S"] | None = None,
  segment_ids: tuple[Int[Array, "#B T"], Int[Array, "#B S"]] | None = None,
  query_positions: Int[Array, "#B T"] | None = None,
  tiles: tiling.Tiles | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
  """Attention and its log-sum-exp; time follows the tiles visited, memory is linear in T and S.

  Args:
    mask: a pytree with `features`, `predicate` and `spans`, as in `effjax.attention.masks`.
    segment_ids: of queries and keys; equal ids ≥ 0 see each other, within the mask.
    query_positions: absolute position of each query; the last T of S when None.
    tiles: sizes to work in, chosen for the backend when None.

  Derivatives of out and lse by query, key, value and bias are exact in both modes, forwards over
  each included. Reverse-mode over derivatives raises ValueError; the reference does that too.
  """
  plan = _planned(query, key, value, mask, scale, logit_softcap, tiles)
  where = _Where(mask, segment_ids, query_positions)
  operands = (query, key, value, bias, where)
  return _attention(plan, *numerics.vary_alike(operands, operands))


def gradients(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K Hv"],
  results: tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]],
  cotangents: tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]],
  *,
  mask: Any,
  scale: float,
  logit_softcap: float | None = None,
) -> tuple[Array, Array, Array]:
  """Gradients of query, key and value as far as these keys go.

  Args:
    results: out and log-sum-exp of attention to these keys and any others.
    cotangents: theirs.
  """
  plan = _planned(query, key, value, mask, scale, logit_softcap)
  saved = (query, key, value, None, _Where(mask, None, None), *results)
  return _backward(plan, saved, cotangents)[:3]


class _Where(NamedTuple):
  """What decides who sees whom."""

  mask: Any
  segment_ids: Any
  query_positions: Any


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Sizes known while tracing. A row of a tile is a (query head of the group, query) pair."""

  B: int
  T: int
  S: int
  K: int
  G: int
  H: int
  Hv: int
  tiles: tiling.Tiles
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
  def groups(self) -> int:
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

  def place(self, x: Array, c: Array) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Where group c lies in x [B or 1, length, heads, ...]: starts and sizes."""
    (batch, head), heads = self.split(c), x.shape[2] * self.tiles.heads // self.K
    rest = x.shape[3:]
    start = (batch * self.tiles.batch, 0, head * heads, *(0 for _ in rest))
    return start, (self.tiles.batch, x.shape[1], heads, *rest)


def _planned(query, key, value, mask, scale, softcap, tiles=None) -> _Plan:
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  tiles = tiles or tiling.choose(B, T, S, K, N // K, mask)
  return _Plan(B, T, S, K, N // K, H, value.shape[-1], tiles, float(scale), softcap)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attention(plan, query, key, value, bias, where):
  return _forward(plan, query, key, value, bias, where)


@_attention.defjvp
def _attention_jvp(plan, primals, tangents):
  results = _attention(plan, *primals)
  forward = lambda saved, moves: _tangents(plan, saved, moves)
  backward = lambda saved, cotangents: _backward(plan, saved, cotangents)
  moved = linear_map(forward, backward, (*primals, *results), tangents[:4], results)
  return results, moved


# Layout: a group of heads is taken out of the arrays and laid out tile by tile, and its results are
# put back, so that what a step holds does not grow with the number of groups.


def _take(plan: _Plan, x: Array, c: Array) -> Array:
  """[B, T, heads, ...] → those of group c."""
  if plan.groups == 1:
    return x
  return lax.dynamic_slice(x, *plan.place(x, c))


def _put(plan: _Plan, x: Array, part: Array, c: Array) -> Array:
  """`x` with the values of group c replaced."""
  part = part.astype(x.dtype)
  return part if plan.groups == 1 else lax.dynamic_update_slice(x, part, plan.place(x, c)[0])


def _to_rows(plan: _Plan, x: Array) -> Array:
  """[batch, T, heads · G, X] → [query tiles, stacked, rows, X], padded with zeros."""
  t, X = plan.tiles, x.shape[-1]
  x = _pad(x, 1, plan.q_tiles * t.queries)
  x = x.reshape(t.batch, plan.q_tiles, t.queries, t.heads, plan.G, X).transpose(1, 0, 3, 4, 2, 5)
  return x.reshape(plan.q_tiles, plan.stacked, plan.rows, X)


def _from_rows(plan: _Plan, x: Array) -> Array:
  """[query tiles, stacked, rows, X] → [batch, T, heads · G, X]."""
  t, X = plan.tiles, x.shape[-1]
  x = x.reshape(plan.q_tiles, t.batch, t.heads, plan.G, t.queries, X).transpose(1, 0, 4, 2, 3, 5)
  return x.reshape(t.batch, -1, t.heads * plan.G, X)[:, : plan.T]


def _to_keys(plan: _Plan, x: Array, across: bool) -> Array:
  """[batch, S, heads, X] → [key tiles, stacked, keys, X], or [..., X, keys] when `across`."""
  t, X = plan.tiles, x.shape[-1]
  x = _pad(x, 1, plan.k_tiles * t.keys)
  x = x.reshape(t.batch, plan.k_tiles, t.keys, t.heads, X)
  x = x.transpose(1, 0, 3, *((4, 2) if across else (2, 4)))
  return x.reshape(plan.k_tiles, plan.stacked, *x.shape[-2:])


def _from_keys(plan: _Plan, x: Array) -> Array:
  """[key tiles, stacked, X, keys] → [batch, S, heads, X]."""
  t, X = plan.tiles, x.shape[-2]
  x = x.reshape(plan.k_tiles, t.batch, t.heads, X, t.keys).transpose(1, 0, 4, 2, 3)
  return x.reshape(t.batch, -1, t.heads, X)[:, : plan.S]


def _pad(x: Array, axis: int, length: int, value: Any = 0) -> Array:
  short = length - x.shape[axis]
  widths = [(0, short if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value) if short else x


def _compute_type(x: Array) -> Any:
  """Half precision products are slow on CPUs, and exact in float32."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return wide if jax.default_backend() == "cpu" else x.dtype


def _dot(a: Array, b: Array) -> Array:
  """[n, i, j] · [n, j, k] in the type of b, accumulated in at least float32."""
  wide = jnp.promote_types(b.dtype, jnp.float32)
  dims = (((2,), (1,)), ((0,), (0,)))
  return lax.dot_general(a.astype(b.dtype), b, dims, preferred_element_type=wide)


@jax.custom_jvp
def _exp(x: Array) -> Array:
  """e^x for x ≤ 0. On CPUs by a polynomial of degree 6, to 1e-7 of 1 in 0.7 of jnp.exp's time."""
  if jax.default_backend() != "cpu" or x.dtype != jnp.float32:
    return jnp.exp(x)
  power = x * np.float32(np.log2(np.e))
  whole = jnp.round(power)
  part = jnp.polyval(jnp.asarray(_EXP2, x.dtype), power - whole, unroll=16)
  bits = lax.bitcast_convert_type(part, jnp.int32) + (whole.astype(jnp.int32) << 23)
  return jnp.where(power < -126, 0, lax.bitcast_convert_type(bits, x.dtype))


@_exp.defjvp
def _exp_jvp(primals, tangents):
  y = _exp(*primals)
  return y, y * tangents[0]


# Who sees whom.


class _Sight:
  """The mask of every tile: which tiles to visit, and the predicate on one."""

  def __init__(self, plan: _Plan, where: _Where):
    self.plan, self.mask, t = plan, where.mask, plan.tiles
    positions = index = where.query_positions
    if positions is None:
      positions = np.arange(plan.S - plan.T, plan.S, dtype=np.int32)[None]
      index = lax.iota(jnp.int32, plan.T)[None] + (plan.S - plan.T)
      grid = Grid.of(plan.T, plan.S, t.queries, t.keys)
    else:
      grid = Grid(tiled(positions, t.queries), plan.S, t.keys)
    features = self.mask.features(positions, plan.S)
    some, every = self.mask.spans(grid, *features)
    if where.segment_ids is not None:
      same, all_same = equal_ids(
        grid.split(where.segment_ids[0][:, None]), grid.split_keys(where.segment_ids[1][:, None])
      )
      some, every = some & same, every & all_same
    heads = t.heads * plan.G
    some = tiling.merge(some, t.batch, heads)
    rest = tiling.merge(every.complement(plan.k_tiles), t.batch, heads)
    every = rest.complement(plan.k_tiles)
    self.partial, self.full = tiling.partition(some, every, plan.S // t.keys, plan.k_tiles)
    rows = (index[:, None], *_segments(where, 0)), features[0]
    self.queries = self._padded(rows, plan.q_tiles * t.queries)
    self.keys = self._padded((_segments(where, 1), features[1]), plan.k_tiles * t.keys)

  def visit(self, c: Array, i: Array, body: Any, carry: Any) -> Any:
    """Folds `body(tile, seen, carry)` over the key tiles of query tile i of group c."""
    for visits, masked in ((self.full, False), (self.partial, True)):
      if visits.none:
        continue
      count, tile = visits.row(*self.plan.split(c), i)

      def step(n, carry, masked=masked, tile=tile):
        j = tile(n)
        return body(j, self.seen(c, i, j) if masked else None, carry)

      carry = lax.fori_loop(0, count, step, carry)
    return carry

  def seen(self, c: Array, i: Array, j: Array) -> Array:
    """[batch, heads, G, queries, keys] of booleans (axes of one where they do not matter)."""
    t = self.plan.tiles
    (q, *q_ids), q_features = self._tile(self.queries, c, i, t.queries, np.s_[..., :, None])
    k_ids, k_features = self._tile(self.keys, c, j, t.keys, np.s_[..., None, :])
    k = j * t.keys + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, t.keys), 4)
    seen = self.mask.predicate(q, k, q_features, k_features)
    for a, b in zip(q_ids, k_ids, strict=True):
      seen = seen & (a == b) & (a >= 0)
    return seen & (k < self.plan.S) if self.plan.S % t.keys else seen

  def _padded(self, features: Any, length: int) -> Any:
    return jax.tree.map(lambda x: x if x.shape[2] == 1 else _edge(x, length), features)

  def _tile(self, features: Any, c: Array, i: Array, size: int, place: Any) -> Any:
    """Tile i of features [b, h, length], for group c, with an axis for the other side's tile."""
    t, groups = self.plan.tiles, self.plan.split(c)
    sizes = t.batch, t.heads * self.plan.G, size

    def cut(x: Any) -> Array:
      index = zip(x.shape, sizes, (*groups, i), strict=True)
      places = ((n * g, n) if whole > 1 else (0, 1) for whole, n, g in index)
      start, (batch, n, length) = zip(*places, strict=True)
      x = lax.dynamic_slice(jnp.asarray(x), start, (batch, n, length))
      split = (t.heads, self.plan.G) if n > 1 else (1, 1)
      return x.reshape(batch, *split, length)[place]

    return jax.tree.map(cut, features)


def _segments(where: _Where, side: int) -> tuple[Array, ...]:
  return () if where.segment_ids is None else (where.segment_ids[side][:, None],)


def _edge(x: Any, length: int) -> Any:
  """[b, h, X] continued to `length` with its last element."""
  short = length - x.shape[2]
  return jnp.pad(x, ((0, 0), (0, 0), (0, short)), mode="edge") if short else x


class _Bias:
  """A bias, or its gradient, addressed by tiles. Axes of one stay axes of one."""

  def __init__(self, plan: _Plan, shape: tuple[int, ...]):
    t = plan.tiles
    whole = (plan.B, plan.K * plan.G, plan.q_tiles * t.queries, plan.k_tiles * t.keys)
    part = (t.batch, t.heads * plan.G, t.queries, t.keys)
    wide = [n > 1 for n in shape]
    self.shape = tuple(n if w else 1 for n, w in zip(whole, wide, strict=True))
    self.part = tuple(n if w else 1 for n, w in zip(part, wide, strict=True))
    heads = (t.heads, plan.G) if wide[1] else (1, 1)
    self.tile = (self.part[0], *heads, *self.part[2:])

  def start(self, plan: _Plan, c: Array, i: Array, j: Array) -> list[Any]:
    index = (*plan.split(c), i, j)
    return [n * x if w > 1 else 0 for n, x, w in zip(self.part, index, self.shape, strict=True)]

  def pad(self, bias: Array) -> Array:
    for axis in (2, 3):
      bias = _pad(bias, axis, self.shape[axis])
    return bias

  def read(self, plan: _Plan, bias: Array, c: Array, i: Array, j: Array) -> Array:
    tile = lax.dynamic_slice(bias, self.start(plan, c, i, j), self.part)
    return tile.reshape(self.tile)

  def add(self, plan: _Plan, total: Array, scores: Array, c: Array, i: Array, j: Array) -> Array:
    """`total` with the gradient of a tile of scores added where the bias was read."""
    axes = tuple(a for a, n in enumerate(self.tile) if n == 1 and scores.shape[a] > 1)
    scores = jnp.sum(scores, axes, keepdims=True).reshape(self.part)
    start = self.start(plan, c, i, j)
    return lax.dynamic_update_slice(
      total, lax.dynamic_slice(total, start, self.part) + scores, start
    )


def _scores(plan: _Plan, q: Array, k: Array, bias: Array | None, seen: Array | None):
  """Scores of a tile [batch, heads, G, queries, keys], and before bias and mask."""
  t = plan.tiles
  capped = _dot(q, k).reshape(t.batch, t.heads, plan.G, t.queries, t.keys)
  capped = numerics.softcap(capped, plan.softcap)
  scores = capped if bias is None else capped + bias.astype(capped.dtype)
  if seen is not None:
    scores = jnp.where(seen, scores, -jnp.inf)
  return scores, capped


def _forward(plan, query, key, value, bias, where):
  sight = _Sight(plan, where)
  compute = _compute_type(query)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  addressed = None if bias is None else _Bias(plan, bias.shape)
  padded = None if bias is None else addressed.pad(bias)

  def group(results, c):
    queries = _to_rows(plan, (_take(plan, query, c).astype(wide) * plan.scale).astype(compute))
    keys = _to_keys(plan, _take(plan, key, c).astype(compute), across=True)
    values = _to_keys(plan, _take(plan, value, c).astype(compute), across=False)
    zeros = lambda width: _zeros((plan.stacked, plan.rows, width), wide, query)
    start = zeros(1), zeros(1) + _FLOOR, zeros(plan.Hv)

    def row(_, x):
      i, q = x

      def tile(j, seen, carry):
        total, top, out = carry
        extra = None if bias is None else addressed.read(plan, padded, c, i, j)
        scores = _scores(plan, q, keys[j], extra, seen)[0].reshape(*q.shape[:2], -1)
        new = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = lax.optimization_barrier(_exp(scores - new))
        fade = jnp.exp(top - new)
        total = total * fade + weights.sum(-1, keepdims=True)
        return total, new, out * fade + _dot(weights, values[j])

      total, top, out = sight.visit(c, i, tile, start)
      some = total > 0
      safe = jnp.where(some, total, 1.0)
      lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
      return None, ((out / safe).astype(query.dtype), lse)

    parts = lax.scan(row, None, (jnp.arange(plan.q_tiles), queries))[1]
    put = lambda whole, part: _put(plan, whole, _from_rows(plan, part), c)
    return tuple(map(put, results, parts)), None

  shape = query.shape[:3]
  results = _zeros((*shape, plan.Hv), query.dtype, query), _zeros((*shape, 1), wide, query)
  out, lse = lax.scan(group, results, jnp.arange(plan.groups))[0]
  return out, lse[..., 0]


def _backward(plan, saved, cotangents):
  query, key, value, bias, where, out, lse = saved
  d_out, d_lse = cotangents
  sight = _Sight(plan, where)
  compute = _compute_type(query)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  addressed = None if bias is None else _Bias(plan, bias.shape)
  padded = None if bias is None else addressed.pad(bias)
  some = lse > -jnp.inf
  delta = jnp.sum(d_out.astype(wide) * out.astype(wide), -1) - d_lse
  delta = jnp.where(some, delta, 0.0)[..., None]
  # Rows with nothing to attend to, padded ones among them: exp(score − large) = 0.
  lse = jnp.where(some, lse, -_FLOOR)
  lse = _pad(lse, 1, plan.q_tiles * plan.tiles.queries, -_FLOOR)[..., None]

  def group(carry, c):
    (d_query, d_key, d_value), d_bias = carry
    take = lambda x, kind=compute: _take(plan, x, c).astype(kind)
    rows = (
      jnp.arange(plan.q_tiles),
      _to_rows(plan, (take(query, wide) * plan.scale).astype(compute)),
      _to_rows(plan, take(d_out)),
      _to_rows(plan, take(lse, wide)),
      _to_rows(plan, take(delta, wide)),
    )
    keys, keys_across = (_to_keys(plan, take(key), across) for across in (False, True))
    values_across = _to_keys(plan, take(value), across=True)

    def row(carry, x):
      i, q, do, lse, delta = x
      q_across, do_across = jnp.swapaxes(q, 1, 2), jnp.swapaxes(do, 1, 2)

      def tile(j, seen, carry):
        d_q, d_k, d_v, d_bias = carry
        extra = None if bias is None else addressed.read(plan, padded, c, i, j)
        scores, capped = _scores(plan, q, keys_across[j], extra, seen)
        weights = _exp(scores.reshape(*lse.shape[:2], -1) - lse)
        d_v = d_v.at[j].add(_dot(do_across, weights.astype(compute)))
        d_scores = weights * (_dot(do, values_across[j]) - delta)
        if bias is not None:
          d_bias = addressed.add(plan, d_bias, d_scores.reshape(scores.shape), c, i, j)
        if plan.softcap is not None:
          d_scores = d_scores * (1 - jnp.square(capped.reshape(d_scores.shape) / plan.softcap))
        d_scores = lax.optimization_barrier(d_scores.astype(compute))
        d_k = d_k.at[j].add(_dot(q_across, d_scores))
        return d_q + _dot(d_scores, keys[j]), d_k, d_v, d_bias

      carry = _zeros(q.shape, wide, query), *carry
      d_q, *carry = sight.visit(c, i, tile, carry)
      return tuple(carry), (d_q * plan.scale).astype(query.dtype)

    d_k = _zeros(keys_across.shape, wide, query)
    d_v = _zeros(values_across.shape, wide, query)
    (d_k, d_v, d_bias), d_q = lax.scan(row, (d_k, d_v, d_bias), rows)
    d_query = _put(plan, d_query, _from_rows(plan, d_q), c)
    d_key = _put(plan, d_key, _from_keys(plan, d_k), c)
    d_value = _put(plan, d_value, _from_keys(plan, d_v), c)
    return ((d_query, d_key, d_value), d_bias), None

  start = tuple(_zeros(x.shape, x.dtype, query) for x in (query, key, value))
  d_bias = None if bias is None else _zeros(addressed.shape, wide, query)
  (gradients, d_bias), _ = lax.scan(group, (start, d_bias), jnp.arange(plan.groups))
  if bias is not None:
    d_bias = d_bias[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
  return *gradients, d_bias


def _tangents(plan, saved, moves):
  """Tangents of out and lse."""
  query, key, value, bias, where, out, lse = saved
  sight = _Sight(plan, where)
  compute = _compute_type(query)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  addressed = None if bias is None else _Bias(plan, bias.shape)
  padded = [None if bias is None else addressed.pad(x) for x in (bias, moves[3])]
  some = lse > -jnp.inf
  safe = jnp.where(some, lse, -_FLOOR)
  safe = _pad(safe, 1, plan.q_tiles * plan.tiles.queries, -_FLOOR)[..., None]

  def group(results, c):
    take = lambda x, kind=compute: _take(plan, x, c).astype(kind)
    queries = [
      _to_rows(plan, (take(x, wide) * plan.scale).astype(compute)) for x in (query, moves[0])
    ]
    keys = [_to_keys(plan, take(x), across=True) for x in (key, moves[1])]
    values = [_to_keys(plan, take(x), across=False) for x in (value, moves[2])]
    zeros = lambda width: _zeros((plan.stacked, plan.rows, width), wide, query)

    def row(_, x):
      i, q, q_move, lse = x

      def tile(j, seen, carry):
        extra = [None if x is None else addressed.read(plan, x, c, i, j) for x in padded]
        scores, capped = _scores(plan, q, keys[0][j], extra[0], seen)
        weights = _exp(scores.reshape(*lse.shape[:2], -1) - lse)
        move = (_dot(q_move, keys[0][j]) + _dot(q, keys[1][j])).reshape(scores.shape)
        if plan.softcap is not None:
          move = move * (1 - jnp.square(capped / plan.softcap))
        if bias is not None:
          move = move + extra[1].astype(move.dtype)
        move = lax.optimization_barrier(weights * move.reshape(weights.shape))
        d_lse, d_out = carry
        d_out = d_out + _dot(move, values[0][j]) + _dot(weights, values[1][j])
        return d_lse + move.sum(-1, keepdims=True), d_out

      return None, sight.visit(c, i, tile, (zeros(1), zeros(plan.Hv)))

    rows = jnp.arange(plan.q_tiles), *queries, _to_rows(plan, take(safe, wide))
    parts = lax.scan(row, None, rows)[1]
    put = lambda whole, part: _put(plan, whole, _from_rows(plan, part), c)
    return tuple(map(put, results, parts)), None

  shape = query.shape[:3]
  results = _zeros((*shape, 1), wide, query), _zeros((*shape, plan.Hv), wide, query)
  d_lse, d_out = lax.scan(group, results, jnp.arange(plan.groups))[0]
  return (d_out - d_lse * out.astype(wide)).astype(query.dtype), d_lse[..., 0]


def _zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
  return numerics.vary_alike(jnp.zeros(shape, dtype), like)
