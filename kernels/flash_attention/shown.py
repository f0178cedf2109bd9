"""Products over pairs of queries and keys that stay clear of hidden ones, whatever these hold.

Zero times NaN is NaN: a weight of zero keeps nothing out of a product. Three products are the
derivatives of one another, and none lets a pair that is not seen take part, in any order:
  pairs S = XYᵀ;  rows X = PY, over keys;  columns Y = PᵀX, over queries.
Axes: queries x [B, T, K, G, H], keys y [B, S, K, H], pairs p and `seen` [B, K, G, T, S].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.linear_map import linear_map
from effjax.core.typing import Array

_ROWS, _COLUMNS = "bkgts,bskh->btkgh", "bkgts,btkgh->bskh"


@jax.custom_jvp
def pairs(x: Array, y: Array, seen: Array) -> Array:
  """Products of queries and keys in at least float32, zero where not seen."""
  return jnp.where(seen, _product("btkgh,bskh->bkgts", x, y), 0)


@pairs.defjvp
def _pairs_jvp(primals, tangents):
  return _moved(pairs, rows, columns, primals, tangents)


@jax.custom_jvp
def rows(p: Array, y: Array, seen: Array) -> Array:
  """For each query the sum over the keys that it sees, in at least float32."""
  return _sums(_ROWS, p, y, seen)


@rows.defjvp
def _rows_jvp(primals, tangents):
  return _moved(rows, pairs, columns, primals, tangents)


@jax.custom_jvp
def columns(p: Array, x: Array, seen: Array) -> Array:
  """For each key the sum over the queries that see it, in at least float32."""
  return _sums(_COLUMNS, p, x, seen)


@columns.defjvp
def _columns_jvp(primals, tangents):
  return _moved(columns, lambda d, x, seen: pairs(x, d, seen), rows, primals, tangents)


def _moved(product: Any, to_first: Any, to_second: Any, primals: Any, tangents: Any) -> Any:
  """A product and its tangent, transposed by the other two."""
  out = product(*primals)

  def forward(known, moves):
    (a, b, seen), (d_a, d_b) = known, moves
    return product(d_a, b, seen) + product(a, d_b, seen)

  def backward(known, d):
    a, b, seen = known
    # A cotangent takes the place of queries or keys, or that of pairs.
    d_a = to_first(d, b, seen)
    d_b = to_second(d if product is pairs else a, a if product is pairs else d, seen)
    return d_a.astype(a.dtype), d_b.astype(b.dtype)

  return out, linear_map(forward, backward, primals, tangents[:2], out)


def _product(axes: str, a: Array, b: Array) -> Array:
  kind = jnp.promote_types(a.dtype, b.dtype)
  wide = jnp.promote_types(kind, jnp.float32)
  return jnp.einsum(axes, a.astype(kind), b.astype(kind), preferred_element_type=wide)


def _sums(axes: str, p: Array, b: Array, seen: Array) -> Array:
  product = functools.partial(_product, axes)
  found = product(p, b)

  def exactly():
    kept = product(jnp.where(seen, p, 0), jnp.where(jnp.isfinite(b), b, 0))
    for end in (jnp.inf, -jnp.inf):
      reached = product(seen.astype(b.dtype), ((b == end) | jnp.isnan(b)).astype(b.dtype)) > 0
      kept = kept + jnp.where(reached, end, 0).astype(kept.dtype)
    return kept

  return jax.lax.cond(jnp.isfinite(found).all(), lambda: found, exactly)
