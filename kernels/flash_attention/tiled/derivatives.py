"""The derivatives of attention in tiles, in plain XLA: from O and LSE, no weights kept.

Backward, with D = rowsum(dO∘O) − dLSE:
  P = exp(S − LSE);  dV += PᵀdO;  dS = P∘(dOVᵀ − D);  dQ += scale·dS·K;  dK += scale·dSᵀQ.
Tangents, with Ṡ = scale·(Q̇Kᵀ + QK̇ᵀ) through the soft cap, + the bias's and the score's:
  LṠE = rowsum P∘Ṡ;  Ȯ = (P∘Ṡ)V + PV̇ − LṠE∘O.

Reference: FlashAttention-2, arXiv 2307.08691, algorithm 2.
"""

import jax.numpy as jnp
from jax import lax

from effjax.core import numerics
from effjax.kernels.flash_attention.tiled import layout, steps
from effjax.kernels.flash_attention.tiled.added import Added
from effjax.kernels.flash_attention.tiled.steps import FLOOR, LOG2E
from effjax.kernels.flash_attention.tiled.visits import GroupedSight


def backward(plan, saved, cotangents):
  """Gradients of query, key, value and bias, and of what trains in the terms."""
  query, key, value, *_ = saved
  compute, wide = steps.compute_type(query), numerics.wide(query.dtype)
  sight, added, rows = _opened(plan, saved, cotangents, wide)

  def group(carry, c):
    (d_query, d_key, d_value), d_added = carry
    take = lambda x: layout.take(plan, x, c).astype(compute)
    keys_across = layout.to_keys(plan, take(key), across=True)
    keys = layout.to_keys(plan, steps.clean(take(key)), across=False)
    values_across = layout.to_keys(plan, steps.clean(take(value)), across=True)

    def row(carry, i):
      d_query, *carry = carry
      q, do, *ends = (layout.take_rows(plan, x, c, i) for x in rows)
      q, do = steps.scaled(plan, q), do.astype(compute)
      q_across, do_across = jnp.swapaxes(steps.clean(q), 1, 2), jnp.swapaxes(do, 1, 2)

      def tile(j, seen, carry):
        d_q, d_k, d_v, d_added = carry
        of_tile = keys_across[j], values_across[j], seen, (c, i, j)
        weights, d_scores, capped, d_added = _tile(plan, added, (q, do, *ends), *of_tile, d_added)
        d_v = d_v.at[j].add(steps.dot(do_across, weights.astype(compute)))
        if added.cap is not None:
          d_scores = d_scores * (1 - jnp.square(capped.reshape(d_scores.shape) / added.cap))
        d_scores = lax.optimization_barrier(d_scores.astype(compute))
        d_k = d_k.at[j].add(steps.dot(q_across, d_scores))
        return d_q + steps.dot(d_scores, keys[j]), d_k, d_v, d_added

      carry = steps.zeros(q.shape, wide, query), *carry
      d_q, *carry = sight.visit(c, i, tile, carry)
      return (layout.put_rows(plan, d_query, d_q * plan.scale, c, i), *carry), None

    d_k = steps.zeros(keys_across.shape, wide, query)
    d_v = steps.zeros(values_across.shape, wide, query)
    carry = d_query, d_k, d_v, d_added
    d_query, d_k, d_v, d_added = lax.scan(row, carry, jnp.arange(plan.q_tiles, dtype=jnp.int32))[0]
    d_key = layout.put(plan, d_key, layout.from_keys(plan, d_k), c)
    d_value = layout.put(plan, d_value, layout.from_keys(plan, d_v), c)
    return ((d_query, d_key, d_value), d_added), None

  start = tuple(steps.zeros(x.shape, x.dtype, query) for x in (rows[0], key, value))
  start = start, added.zeros(query)
  (gradients, d_added), _ = lax.scan(group, start, jnp.arange(plan.groups, dtype=jnp.int32))
  d_query, d_key, d_value = gradients
  return d_query[:, : plan.T], d_key, d_value, *added.gradients(d_added)


def of_terms(plan, saved, cotangents):
  """The gradients of what trains in the terms alone, as of `backward`."""
  query, key, value, *_ = saved
  compute, wide = steps.compute_type(query), numerics.wide(query.dtype)
  sight, added, rows = _opened(plan, saved, cotangents, wide)

  def group(d_added, c):
    lay = lambda x: layout.to_keys(plan, layout.take(plan, x, c).astype(compute), across=True)
    keys, values = lay(key), steps.clean(lay(value))

    def row(d_added, i):
      q, do, *ends = (layout.take_rows(plan, x, c, i) for x in rows)
      taken = steps.scaled(plan, q), do.astype(compute), *ends

      def tile(j, seen, d_added):
        return _tile(plan, added, taken, keys[j], values[j], seen, (c, i, j), d_added)[-1]

      return sight.visit(c, i, tile, d_added), None

    return lax.scan(row, d_added, jnp.arange(plan.q_tiles, dtype=jnp.int32))

  start = None, added.zeros(query)[1]
  return added.gradients(lax.scan(group, start, jnp.arange(plan.groups, dtype=jnp.int32))[0])[1]


def _opened(plan, saved, cotangents, wide):
  """Which tiles are visited, what is added on them, and the `_rows`."""
  query, _, _, bias, where, terms, *results = saved
  sight = GroupedSight(plan, where)
  added = Added(plan, sight, bias, terms, wide)
  return sight, added, _rows(plan, query, results, cotangents, wide)


def _rows(plan, query, results, cotangents, wide):
  """Padded queries, dO without what is not finite, D, LSE and its rest, [B, padded T, N, ...]."""
  (out, lse, rest), (d_out, d_lse) = results, cotangents
  pair = d_out.astype(wide), out.astype(wide)
  # A sum of a product in XLA on CPUs takes ten times as long.
  delta = jnp.einsum("btnh,btnh->btn", *pair, precision=lax.Precision.HIGHEST) - d_lse
  delta = jnp.where(lse == -jnp.inf, 0, delta)[..., None]
  # Behind a barrier: where dO is all ones XLA takes seconds to reduce them while it compiles.
  finite = jnp.isfinite(lax.optimization_barrier(d_out)).all(-1) | (lse == -jnp.inf)
  ends = _ends(plan, jnp.where(finite, lse, jnp.nan), rest)
  return *(layout.pad_rows(plan, x) for x in (query, steps.clean(d_out), delta)), *ends


def _ends(plan, lse, rest):
  """LSE, and what its rounding left out in units of log 2, [B, padded T, N, 1].

  Rows with nothing to attend to, padded ones among them: exp(score − large) = 0.
  """
  lse = layout.pad_rows(plan, jnp.where(lse == -jnp.inf, -FLOOR, lse), -FLOOR)
  return lse[..., None], layout.pad_rows(plan, rest * LOG2E)[..., None]


def _weights(scores, ends, seen):
  """P = exp(S − LSE) of the pairs that are seen."""
  lse, rest = ends
  weights = steps.exp2((scores.reshape(*lse.shape[:2], -1) - lse) * LOG2E - rest)
  return steps.hide(seen, weights, 0.0)


def _tile(plan, added, rows, keys, values, seen, place, d_added):
  """P and dS of a tile, its capped scores, and the gradients of what is added with this tile's."""
  q, do, delta, *ends = rows
  bias = added.bias(*place)
  term, pull = added.pulled(steps.shown(plan, seen, bias), *place)
  given = bias, term
  scores, capped, seen = steps.shown_scores(plan, q, keys, added.cap, seen, *given)
  seen = None if seen is None else seen.reshape(*delta.shape[:2], -1)
  weights = _weights(scores, ends, seen)
  d_scores = steps.hide(seen, weights * (steps.dot(do, values) - delta), 0.0)
  d_added = added.collect(d_added, pull, d_scores.reshape(scores.shape), capped, *place)
  return weights, d_scores, capped[1], d_added


def tangents(plan, saved, moves):
  """Tangents of out and lse, from those of query, key, value, bias and what trains in the terms."""
  query, key, value, bias, where, terms, *results = saved
  sight = GroupedSight(plan, where)
  compute = steps.compute_type(query)
  wide = numerics.wide(query.dtype)
  added = Added(plan, sight, bias, terms, wide)
  bias_moves = Added(plan, sight, moves[3], None, wide)
  term_moves = added.pad(moves[4]) if moves[4] else []
  out, lse, rest = results
  ends = _ends(plan, lse, rest)
  rows = [layout.pad_rows(plan, x) for x in (query, moves[0])]

  def group(results, c):
    take = lambda x: layout.take(plan, x, c).astype(compute)
    keys = [layout.to_keys(plan, take(x), across=True) for x in (key, moves[1])]
    values = [layout.to_keys(plan, take(x), across=False) for x in (value, moves[2])]
    zeros = lambda width: steps.zeros((plan.stacked, plan.rows, width), wide, query)

    def row(results, i):
      q, q_move = (steps.scaled(plan, layout.take_rows(plan, x, c, i)) for x in rows)
      end = [layout.take_rows(plan, x, c, i) for x in ends]

      def tile(j, seen, carry):
        term, term_move = added.moved(term_moves, c, i, j)
        given = added.bias(c, i, j), term
        scores, capped, seen = steps.shown_scores(plan, q, keys[0][j], added.cap, seen, *given)
        seen = None if seen is None else seen.reshape(*q.shape[:2], -1)
        weights = _weights(scores, end, seen)
        move = (steps.dot(q_move, keys[0][j]) + steps.dot(q, keys[1][j])).reshape(scores.shape)
        if added.cap is not None:
          move = move * (1 - jnp.square(capped[1] / added.cap))
        if added.cap is not plan.softcap:
          move = move + added.slope(*capped) * term_moves[-1]
        for each in (bias_moves.bias(c, i, j), term_move):
          move = move if each is None else move + each.astype(move.dtype)
        move = steps.hide(seen, weights * move.reshape(weights.shape), 0.0)
        move = lax.optimization_barrier(move)
        d_lse, d_out = carry
        d_out = d_out + steps.shown_dot(seen, move, values[0][j])
        d_out = d_out + steps.shown_dot(seen, weights, values[1][j])
        return d_lse + move.sum(-1, keepdims=True), d_out

      parts = sight.visit(c, i, tile, (zeros(1), zeros(plan.Hv)))
      return tuple(layout.put_rows(plan, *x, c, i) for x in zip(results, parts, strict=True)), None

    return lax.scan(row, results, jnp.arange(plan.q_tiles, dtype=jnp.int32))

  shape = rows[0].shape[:3]
  results = steps.zeros((*shape, 1), wide, query), steps.zeros((*shape, plan.Hv), wide, query)
  parts = lax.scan(group, results, jnp.arange(plan.groups, dtype=jnp.int32))[0]
  d_lse, d_out = (x[:, : plan.T] for x in parts)
  return (d_out - d_lse * out.astype(wide)).astype(query.dtype), d_lse[..., 0]
