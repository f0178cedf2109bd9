"""The forward pass of attention in tiles, in plain XLA.

For a tile of queries Q and each visited tile of keys (online softmax, running maximum m and sum l
per query):
  S = scale·QKᵀ → softcap → + bias, score → mask;  m' = max(m, rowmax S);  P = exp(S − m')
  l ← l·exp(m − m') + rowsum P;  A ← A·exp(m − m') + PV;  at the end O = A / l, LSE = m + log l.
Any m that keeps l in range gives the same O and LSE. With `fixed` tiles the maximum over the first
keys stays; where some l then ends outside 2^±60, those queries start again with the running one,
as they do where O is not finite, with hidden pairs taken out of the products; which a score like ALiBi's would have all of them do: with one, the maximum runs.

References: Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2 (arXiv 2307.08691), algorithm
1.
"""

import jax
import jax.numpy as jnp
from jax import lax

from effjax.kernels.flash_attention.tiled import layout, steps
from effjax.kernels.flash_attention.tiled.added import Added
from effjax.kernels.flash_attention.tiled.steps import FLOOR, LOG2E
from effjax.kernels.flash_attention.tiled.visits import GroupedSight

_MOST = 2.0**60  # sums up to it, and down to its inverse, are far from float32's ends
_FIRST = 32  # keys of a query's first tile that a fixed maximum is over


def attention(plan, query, key, value, bias, where, terms):
  """out, log-sum-exp, and what the latter's rounding left out."""
  sight = GroupedSight(plan, where)
  compute = steps.compute_type(query)
  wide = jnp.promote_types(query.dtype, jnp.float32)
  added = Added(plan, sight, bias, terms, wide)
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
    zeros = lambda width: steps.zeros((plan.stacked, plan.rows, width), wide, query)
    start = zeros(1), zeros(1) + FLOOR, zeros(plan.Hv)

    def row(results, i):
      q = steps.scaled(plan, layout.take_rows(plan, queries, c, i))
      flat = lambda x: x.reshape(*q.shape[:2], -1)

      def unmasked(j):
        more = added.bias(c, i, j), added.value(c, i, j)
        return flat(steps.scores(plan, q, keys[j], added.cap, *more)[0])

      def taken(carry, scores, weigh):
        total, top, out = carry
        new = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = lax.optimization_barrier(steps.exp(scores - new).astype(compute))
        fade = jnp.exp(top - new)
        total = total * fade + weights.sum(-1, keepdims=True, dtype=wide)
        return total, new, out * fade + weigh(weights)

      def running(j, seen, carry):
        scores = steps.masked(seen, unmasked(j))
        return taken(carry, scores, lambda weights: steps.dot(weights, values[j]))

      def exact(j, seen, carry):
        more = added.bias(c, i, j), added.value(c, i, j)
        scores, _, seen = steps.shown_scores(plan, q, keys[j], added.cap, seen, *more)
        seen = None if seen is None else flat(seen)
        return taken(carry, flat(scores), lambda x: steps.shown_dot(seen, x, values[j]))

      def fixed(j, seen, carry):
        total, top, out = carry
        scores = unmasked(j)
        least = lambda: jnp.maximum(scores[..., :_FIRST].max(-1, keepdims=True), FLOOR / 2)
        top = lax.cond(top[0, 0, 0] == -jnp.inf, lambda: least() * LOG2E, lambda: top)
        weights = steps.hide(seen, steps.exp2(scores * LOG2E - top), 0.0)
        weights = lax.optimization_barrier(weights.astype(compute))
        total = total + weights.sum(-1, keepdims=True, dtype=wide)
        return total, top, out + steps.dot(weights, values[j])

      fixes = plan.tiles.fixed and not added.scored
      if fixes:
        total, top, out = sight.visit(c, i, fixed, (start[0], start[1] - jnp.inf, start[2]))
        fits, tried = (total > 1 / _MOST) & (total < _MOST), (total, top / LOG2E, out)
      else:
        tried, fits = sight.visit(c, i, running, start), True
      again = ~(fits & jnp.isfinite(tried[2].sum(-1, keepdims=True))).all()
      carry = jax.tree.map(lambda x, y: jnp.where(again, x, y), start, tried)
      total, top, out = sight.visit(c, i, exact, carry, again)
      none = total == 0
      safe = jnp.where(none, 1, total)
      log_sum = jnp.log(safe)
      lse = jnp.where(none, -jnp.inf, top + log_sum)
      rest = jnp.where(none, 0, log_sum - (lse - top))
      put = lambda whole, part: layout.put_rows(plan, whole, part, c, i)
      return tuple(map(put, results, (out / safe, lse, rest))), None

    return lax.scan(row, results, jnp.arange(plan.q_tiles, dtype=jnp.int32))

  shape = queries.shape[:3]
  results = (
    steps.zeros((*shape, plan.Hv), query.dtype, query),
    *(steps.zeros((*shape, 1), wide, query) for _ in range(2)),
  )
  out, *lines = lax.scan(group, results, jnp.arange(plan.groups, dtype=jnp.int32))[0]
  return out[:, : plan.T], *(x[:, : plan.T, :, 0] for x in lines)
