"""The arithmetic of one tile of scores in XLA: products, 2^x, the soft cap and the mask."""

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
from effjax.core.typing import Array, Dim
from effjax.kernels.flash_attention.tiled.layout import Plan

# Least running maximum: finite, so that a row of −inf scores gives exp(−inf) = 0; above no score.
FLOOR = float(np.finfo(np.float32).min)
LOG2E = math.log2(math.e)
_ROUND = np.float32(1.5 * 2**23)  # x plus it has round(x) in its lowest bits
_X = chebpts1(64) / 2
_SLOPE = Polynomial.fit(_X, (np.exp2(_X) - 1) / _X, 4, w=_X / np.exp2(_X)).convert().coef
# Coefficients of 2^x on [−½, ½]: relative error 1e-7, exact at 0.
_EXP2 = np.array([*_SLOPE[::-1], 1], np.float32)


def compute_type(x: Array) -> Any:
  """The type of a product's factors: float16 is slow on CPUs, and exact in float32."""
  slow = x.dtype == jnp.float16 and jax.default_backend() == "cpu"
  return jnp.float32 if slow else x.dtype


def dot(a: Array, b: Array) -> Array:
  """[n, i, j] · [n, j, k] in the type of b, accumulated in at least float32."""
  wide = numerics.wide(b.dtype)
  a = a.astype(b.dtype)
  if b.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
    # XLA chooses its bfloat16 product, which takes no transposes, before it folds transposes in.
    a, b = lax.optimization_barrier((a, b))
  return lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))), preferred_element_type=wide)


def exp(x: Array) -> Array:
  """e^x, by `exp2`."""
  return exp2(x * LOG2E)


@jax.custom_jvp
def exp2(x: Array) -> Array:
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


@exp2.defjvp
def _exp2_jvp(primals, tangents):
  y = exp2(*primals)
  return y, y * (tangents[0] / LOG2E)


def scaled(plan: Plan, q: Array) -> Array:
  """Queries times the scale, as factors of scores."""
  wide = numerics.wide(q.dtype)
  return (q.astype(wide) * plan.scale).astype(compute_type(q))


def clean(x: Array) -> Array:
  """`x` with zeros for what is not finite, which zero weights do not keep out of products."""
  return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def scores(
  plan: Plan, q: Array, k: Array, cap: Any, *added: Array | None
) -> tuple[Array, tuple[Array, Array]]:
  """Scores of a tile [batch, heads, G, queries, keys] without the mask.

  Returns:
    The scores with what is `added`, and the products of queries and keys and these capped.
  """
  products = dot(q, k).reshape(plan.tile)
  found = capped = numerics.softcap(products, cap)
  for each in added:
    found = found if each is None else found + each.astype(found.dtype)
  return found, (products, capped)


def shown_scores(
  plan: Plan, q: Array, k: Array, cap: Any, seen: Array | None, *added: Array | None
) -> tuple[Array, tuple[Array, Array], Array | None]:
  """`scores`, with zeros for the products and −inf for the scores of the pairs that are hidden.

  Returns:
    Scores, products and capped ones as `scores` does, and which pairs are seen; None for all.
  """
  seen = shown(plan, seen, *added)
  products = dot(q, k).reshape(plan.tile)
  products = products if cap is None else hide(seen, products, 0.0)
  found = capped = numerics.softcap(products, cap)
  for each in added:
    found = found if each is None else found + each.astype(found.dtype)
  return masked(seen, found), (products, capped), seen


def shown(plan: Plan, seen: Array | None, *added: Array | None) -> Array | None:
  """Which pairs of a tile are seen, without those to whose scores −inf is added; None for all."""
  seen = None if seen is None else seen.reshape(plan.tile)
  for each in added:
    if each is not None:
      shows = jnp.broadcast_to(each != -jnp.inf, plan.tile)
      seen = shows if seen is None else seen & shows
  return seen


def hide(seen: Array | None, x: Array, value: float) -> Array:
  """`x`, shaped like scores, with `value` where the mask hides."""
  return x if seen is None else jnp.where(seen, x, value)


def masked(seen: Array | None, scores: Array) -> Array:
  """Scores, −inf where the mask hides."""
  return scores if seen is None else lax.optimization_barrier(hide(seen, scores, -jnp.inf))


def shown_dot(seen: Array | None, weights: Array, v: Array) -> Array:
  """weights · v over the pairs [n, rows, keys] that are seen, whatever the others hold."""
  if seen is None:
    return dot(weights, v)

  def exactly():
    kept = dot(weights, clean(v))
    for end in (jnp.inf, -jnp.inf):
      reached = dot(seen.astype(v.dtype), ((v == end) | jnp.isnan(v)).astype(v.dtype)) > 0
      kept = kept + jnp.where(reached, end, 0).astype(kept.dtype)
    return kept

  return lax.cond(jnp.isfinite(v).all(), lambda: dot(weights, v), exactly)


def zeros(shape: tuple[Dim, ...], dtype: Any, like: Array) -> Array:
  """What a loop begins with whose results vary over the mesh axes that `like` varies over."""
  return numerics.vary_alike(jnp.zeros(shape, dtype), like)
