"""Exact attention in tiles, in plain XLA: for every backend, skipping tiles a mask leaves empty.

Forward, for a tile of queries Q and each visited tile of keys (online softmax, running maximum m
and sum l per query):
  S = scale·QKᵀ → softcap → + bias → mask;  m' = max(m, rowmax S);  P = exp(S − m')
  l ← l·exp(m − m') + rowsum P;  A ← A·exp(m − m') + PV;  at the end O = A / l, LSE = m + log l.
Any m that keeps l in range gives the same O and LSE. With `fixed` tiles the maximum over the first
keys stays; where some l then ends outside 2^±60, those queries start again with the running one.
Backward, from O and LSE alone, with D = rowsum(dO∘O) − dLSE:
  P = exp(S − LSE);  dV += PᵀdO;  dS = P∘(dOVᵀ − D);  dQ += scale·dS·K;  dK += scale·dSᵀQ.
Tangents, from LSE too, with Ṡ = scale·(Q̇Kᵀ + QK̇ᵀ) through the soft cap, + the bias's:
  LṠE = rowsum P∘Ṡ;  Ȯ = (P∘Ṡ)V + PV̇ − LṠE∘O.

References: Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691, algorithms
1 and 2.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.polynomial import Polynomial
from numpy.polynomial.chebyshev import chebpts1

from effjax.core import numerics
from effjax.core.linear_map import linear_map
from effjax.core.typing import Array, Float, Int
from effjax.kernels.flash_attention import row_bias
from effjax.kernels.flash_attention.tile_map.sight import Where
from effjax.kernels.flash_attention.tiled import layout
from effjax.kernels.flash_attention.tiled import tiles as tiling
from effjax.kernels.flash_attention.tiled.visits import GroupedSight

_MOST = 2.0**60  # sums up to it, and down to its inverse, are far from float32's ends
_FLOOR = -1e30  # least running maximum: finite, so that a row of −inf scores gives exp(−inf) = 0
_LOG2E = math.log2(math.e)
_FIRST = 32  # keys of a query's first tile that a fixed maximum is over
_ROUND = np.float32(1.5 * 2**23)  # x plus it has round(x) in its lowest bits
_X = chebpts1(64) / 2
_SLOPE = Polynomial.fit(_X, (np.exp2(_X) - 1) / _X, 4, w=_X / np.exp2(_X)).convert().coef
# Coefficients of 2^x on [−½, ½]: relative error 1e-7, exact at 0.
_EXP2 = np.array([*_SLOPE[::-1], 1], np.float32)


@row_bias.outside
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
  where = Where(mask, segment_ids, query_positions)
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
  saved = (query, key, value, None, Where(mask, None, None), *results)
  return _backward(plan, saved, cotangents)[:3]


def _planned(query, key, value, mask, scale, softcap, tiles=None) -> layout.Plan:
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  tiles = tiles or tiling.choose(B, T, S, K, N // K, mask)
  return layout.Plan(B, T, S, K, N // K, H, value.shape[-1], tiles, float(scale), softcap)


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


def _compute_type(x: Array) -> Any:
  """The type of a product's factors: float16 is slow on CPUs, and exact in float32."""
  slow = x.dtype == jnp.float16 and jax.default_backend() == "cpu"
  return jnp.float32 if slow else x.dtype


def _dot(a: Array, b: Array) -> Array:
  """[n, i, j] · [n, j, k] in the type of b, accumulated in at least float32."""
  wide = jnp.promote_types(b.dtype, jnp.float32)
  a = a.astype(b.dtype)
  if b.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
    # XLA chooses its bfloat16 product, which takes no transposes, before it folds transposes in.
    a, b = lax.optimization_barrier((a, b))
  return lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))), preferred_element_type=wide)


def _exp(x: Array) -> Array:
  return _exp2(x * _LOG2E)


@jax.custom_jvp
def _exp2(x: Array) -> Array:
  """2^x; on CPUs at most 2^127, by a polynomial of degree 5 in 0.6 of jnp.exp's time.

  Rounding by adding a large number takes none of the tests that XLA guards conversions with. Past
  the barrier XLA does not see that the same number is subtracted.
  """
  if jax.default_backend() != "cpu" or x.dtype != jnp.float32:
    return jnp.exp2(x)
  x = jnp.clip(x, -127, 127)
  shifted = x + _ROUND
  part = x - (shifted - lax.optimization_barrier(_ROUND))
  part = functools.reduce(lambda y, c: y * part + c, _EXP2[1:], _EXP2[0])
  whole = lax.bitcast_convert_type(shifted, jnp.int32) << 23
  bits = lax.bitcast_convert_type(part, jnp.int32) + whole  # those of 0 for 2^−127
  return lax.bitcast_convert_type(bits, x.dtype)


@_exp2.defjvp
def _exp2_jvp(primals, tangents):
  y = _exp2(*primals)
  return y, y * (tangents[0] / _LOG2E)


def _scaled(plan: layout.Plan, q: Array) -> Array:
  wide = jnp.promote_types(q.dtype, jnp.float32)
  return (q.astype(wide) * plan.scale).astype(_compute_type(q))


def _scores(plan: layout.Plan, q: Array, k: Array, bias: Array | None):
  """Scores of a tile [batch, heads, G, queries, keys] without the mask, and before the bias."""
  capped = _dot(q, k).reshape(plan.tile)
  capped = numerics.softcap(capped, plan.softcap)
  return capped if bias is None else capped + bias.astype(capped.dtype), capped


def _hide(seen: Array | None, x: Array, value: float) -> Array:
  """`x`, shaped like scores, with `value` where the mask hides."""
  return x if seen is None else jnp.where(seen, x, value)


def _masked(seen: Array | None, scores: Array) -> Array:
  return scores if seen is None else lax.optimization_barrier(_hide(seen, scores, -jnp.inf))


def _forward(plan, query, key, value, bias, where):
  sight = GroupedSight(plan, where)
  compute = _compute_type(query)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  addressed = None if bias is None else layout.Bias(plan, bias.shape)
  padded = None if bias is None else addressed.pad(bias)
  queries = layout.pad_rows(plan, query)

  def group(results, c):
    lay = lambda x, across: layout.to_keys(plan, layout.take(plan, x, c).astype(compute), across)
    values = lay(value, False)
    if plan.groups == 1:
      keys = lay(key, True)
    else:
      # Of two copies XLA would make one, whose long strides miss the caches, but not past a branch.
      keys = lax.cond(c >= 0, lambda x: lay(x, False), lambda x: -lay(x, False), key)
      keys = keys.swapaxes(2, 3)
    zeros = lambda width: _zeros((plan.stacked, plan.rows, width), wide, query)
    start = zeros(1), zeros(1) + _FLOOR, zeros(plan.Hv)

    def row(results, i):
      q = _scaled(plan, layout.take_rows(plan, queries, c, i))
      flat = lambda x: x.reshape(*q.shape[:2], -1)

      def unmasked(j):
        extra = None if bias is None else addressed.read(plan, padded, c, i, j)
        return flat(_scores(plan, q, keys[j], extra)[0])

      def running(j, seen, carry):
        total, top, out = carry
        scores = _masked(seen, unmasked(j))
        new = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = lax.optimization_barrier(_exp(scores - new).astype(compute))
        fade = jnp.exp(top - new)
        total = total * fade + weights.sum(-1, keepdims=True, dtype=wide)
        return total, new, out * fade + _dot(weights, values[j])

      def fixed(j, seen, carry):
        total, top, out = carry
        scores = unmasked(j)
        first = lambda: jnp.maximum(scores[..., :_FIRST].max(-1, keepdims=True), _FLOOR) * _LOG2E
        top = lax.cond(top[0, 0, 0] == -jnp.inf, first, lambda: top)
        weights = _hide(seen, _exp2(scores * _LOG2E - top), 0.0)
        weights = lax.optimization_barrier(weights.astype(compute))
        total = total + weights.sum(-1, keepdims=True, dtype=wide)
        return total, top, out + _dot(weights, values[j])

      carry, again = start, True
      if plan.tiles.fixed:
        total, top, out = sight.visit(c, i, fixed, (start[0], start[1] - jnp.inf, start[2]))
        fits = (total > 1 / _MOST) & (total < _MOST)
        again = ~(fits & jnp.isfinite(out.sum(-1, keepdims=True))).all()
        tried = total, top / _LOG2E, out
        carry = jax.tree.map(lambda x, y: jnp.where(again, x, y), start, tried)
      total, top, out = sight.visit(c, i, running, carry, again)
      some = total > 0
      safe = jnp.where(some, total, 1.0)
      lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
      put = lambda whole, part: layout.put_rows(plan, whole, part, c, i)
      return tuple(map(put, results, (out / safe, lse))), None

    return lax.scan(row, results, jnp.arange(plan.q_tiles))

  shape = queries.shape[:3]
  results = _zeros((*shape, plan.Hv), query.dtype, query), _zeros((*shape, 1), wide, query)
  out, lse = lax.scan(group, results, jnp.arange(plan.groups))[0]
  return out[:, : plan.T], lse[:, : plan.T, :, 0]


def _backward(plan, saved, cotangents):
  query, key, value, bias, where, out, lse = saved
  d_out, d_lse = cotangents
  sight = GroupedSight(plan, where)
  compute = _compute_type(query)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  addressed = None if bias is None else layout.Bias(plan, bias.shape)
  padded = None if bias is None else addressed.pad(bias)
  some = lse > -jnp.inf
  pair = d_out.astype(wide), out.astype(wide)
  # A sum of a product in XLA on CPUs takes ten times as long.
  delta = jnp.einsum("btnh,btnh->btn", *pair, precision=lax.Precision.HIGHEST) - d_lse
  delta = jnp.where(some, delta, 0.0)[..., None]
  # Rows with nothing to attend to, padded ones among them: exp(score − large) = 0.
  lse = layout.pad_rows(plan, jnp.where(some, lse, -_FLOOR), -_FLOOR)[..., None]
  rows = [layout.pad_rows(plan, x) for x in (query, d_out, delta)]

  def group(carry, c):
    (d_query, d_key, d_value), d_bias = carry
    take = lambda x: layout.take(plan, x, c).astype(compute)
    keys, keys_across = (layout.to_keys(plan, take(key), across) for across in (False, True))
    values_across = layout.to_keys(plan, take(value), across=True)

    def row(carry, i):
      d_query, *carry = carry
      q, do, delta, ends = (layout.take_rows(plan, x, c, i) for x in (*rows, lse))
      q, do = _scaled(plan, q), do.astype(compute)
      q_across, do_across = jnp.swapaxes(q, 1, 2), jnp.swapaxes(do, 1, 2)

      def tile(j, seen, carry):
        d_q, d_k, d_v, d_bias = carry
        extra = None if bias is None else addressed.read(plan, padded, c, i, j)
        scores, capped = _scores(plan, q, keys_across[j], extra)
        weights = _exp(_masked(seen, scores.reshape(*ends.shape[:2], -1)) - ends)
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
      return (layout.put_rows(plan, d_query, d_q * plan.scale, c, i), *carry), None

    d_k = _zeros(keys_across.shape, wide, query)
    d_v = _zeros(values_across.shape, wide, query)
    carry = d_query, d_k, d_v, d_bias
    d_query, d_k, d_v, d_bias = lax.scan(row, carry, jnp.arange(plan.q_tiles))[0]
    d_key = layout.put(plan, d_key, layout.from_keys(plan, d_k), c)
    d_value = layout.put(plan, d_value, layout.from_keys(plan, d_v), c)
    return ((d_query, d_key, d_value), d_bias), None

  start = tuple(_zeros(x.shape, x.dtype, query) for x in (rows[0], key, value))
  d_bias = None if bias is None else _zeros(addressed.shape, wide, query)
  (gradients, d_bias), _ = lax.scan(group, (start, d_bias), jnp.arange(plan.groups))
  d_query, d_key, d_value = gradients
  if bias is not None:
    d_bias = d_bias[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
  return d_query[:, : plan.T], d_key, d_value, d_bias


def _tangents(plan, saved, moves):
  """Tangents of out and lse."""
  query, key, value, bias, where, out, lse = saved
  sight = GroupedSight(plan, where)
  compute = _compute_type(query)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  addressed = None if bias is None else layout.Bias(plan, bias.shape)
  padded = [None if bias is None else addressed.pad(x) for x in (bias, moves[3])]
  some = lse > -jnp.inf
  ends = layout.pad_rows(plan, jnp.where(some, lse, -_FLOOR), -_FLOOR)[..., None]
  rows = [layout.pad_rows(plan, x) for x in (query, moves[0])]

  def group(results, c):
    take = lambda x: layout.take(plan, x, c).astype(compute)
    keys = [layout.to_keys(plan, take(x), across=True) for x in (key, moves[1])]
    values = [layout.to_keys(plan, take(x), across=False) for x in (value, moves[2])]
    zeros = lambda width: _zeros((plan.stacked, plan.rows, width), wide, query)

    def row(results, i):
      q, q_move = (_scaled(plan, layout.take_rows(plan, x, c, i)) for x in rows)
      end = layout.take_rows(plan, ends, c, i)

      def tile(j, seen, carry):
        extra = [None if x is None else addressed.read(plan, x, c, i, j) for x in padded]
        scores, capped = _scores(plan, q, keys[0][j], extra[0])
        weights = _exp(_masked(seen, scores.reshape(*end.shape[:2], -1)) - end)
        move = (_dot(q_move, keys[0][j]) + _dot(q, keys[1][j])).reshape(scores.shape)
        if plan.softcap is not None:
          move = move * (1 - jnp.square(capped / plan.softcap))
        if bias is not None:
          move = move + extra[1].astype(move.dtype)
        move = lax.optimization_barrier(weights * move.reshape(weights.shape))
        d_lse, d_out = carry
        d_out = d_out + _dot(move, values[0][j]) + _dot(weights, values[1][j])
        return d_lse + move.sum(-1, keepdims=True), d_out

      parts = sight.visit(c, i, tile, (zeros(1), zeros(plan.Hv)))
      return tuple(layout.put_rows(plan, *x, c, i) for x in zip(results, parts, strict=True)), None

    return lax.scan(row, results, jnp.arange(plan.q_tiles))

  shape = rows[0].shape[:3]
  results = _zeros((*shape, 1), wide, query), _zeros((*shape, plan.Hv), wide, query)
  parts = lax.scan(group, results, jnp.arange(plan.groups))[0]
  d_lse, d_out = (x[:, : plan.T] for x in parts)
  return (d_out - d_lse * out.astype(wide)).astype(query.dtype), d_lse[..., 0]


def _zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
  return numerics.vary_alike(jnp.zeros(shape, dtype), like)
