"""What is kept of activations that pass by: statistics that run over tokens, calls and batches.

All but the last axis of a value x [..., D] count as tokens (the heads of a query [B, T, N, H] too);
Σ runs over them. Where the mask is False a token is not there: NaN and inf in it have no influence.
Statistics are in float32 whatever the type of x.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from effjax.core.numerics import zero_unless
from effjax.core.typing import Array, Float, PyTree


class Reduction(NamedTuple):
  """How values become a statistic.

  Attributes:
    measure: (x [..., D], mask) → the statistic of one value; the mask has leading axes of x, [B, T]
      or rows [M], and is None when every token counts.
    combine: (statistic, statistic) → that of both, whatever axis of layers leads their arrays.
    finish: statistic → what `capture` gives.
  """

  measure: Callable[[Array, Array | None], PyTree]
  combine: Callable[[PyTree, PyTree], PyTree]
  finish: Callable[[PyTree], PyTree] = lambda statistic: statistic


@struct.dataclass
class _Kept:
  values: Array
  axis: int = struct.field(pytree_node=False)  # of the batch, from the end: layers may lead

  def joined(self, other: "_Kept") -> "_Kept":
    return _Kept(jnp.concatenate([self.values, other.values], self.axis), self.axis)


def _rows(x: Array, mask: Array | None) -> Float[Array, "M D"]:
  return zero_unless(mask, x).astype(jnp.float32).reshape(-1, x.shape[-1])


def _gram(x: Array, mask: Array | None) -> Float[Array, "D D"]:
  rows = _rows(x, mask)
  return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


def _tokens(x: Array, mask: Array | None):
  tokens = x.size // x.shape[-1]
  return jnp.int32(tokens) if mask is None else mask.sum() * (tokens // mask.size)


def _count(x: Array, mask: Array | None) -> Float[Array, ""]:
  return _tokens(x, mask).astype(jnp.float32)


def _sum(x: Array, mask: Array | None) -> Float[Array, "D"]:
  return _rows(x, mask).sum(axis=0)


sum_of_squares = Reduction(lambda x, mask: jnp.square(_rows(x, mask)).sum(axis=0), jnp.add)
"""Σ x² by channel, [D]."""

gram = Reduction(_gram, jnp.add)
"""Σ xᵀ x, [D, D]."""

absmax = Reduction(lambda x, mask: jnp.abs(_rows(x, mask)).max(axis=0), jnp.maximum)
"""max |x| by channel, [D]; 0 without tokens."""

total = Reduction(_sum, jnp.add)
"""Σ x by channel, [D]."""

count = Reduction(_count, jnp.add)
"""Tokens Σ 1, [], exact to 2²⁴."""

mean = Reduction(
  lambda x, mask: (_sum(x, mask), _count(x, mask)),
  lambda a, b: (a[0] + b[0], a[1] + b[1]),
  lambda sums: sums[0] / sums[1][..., None],
)
"""Σ x / Σ 1 by channel, [D]; NaN without tokens."""

mean_magnitude = Reduction(
  lambda x, mask: (jnp.abs(_rows(x, mask)).sum(axis=0), _count(x, mask)), mean.combine, mean.finish
)
"""Σ |x| / Σ 1 by channel, [D]; NaN without tokens."""

keep = Reduction(
  lambda x, mask: _Kept(zero_unless(mask, x), -x.ndim), _Kept.joined, lambda kept: kept.values
)
"""The values in their own type, batches one after the other on the batch axis; padding is zero."""


@dataclasses.dataclass(frozen=True)
class _Histogram:
  edges: tuple[float, ...]

  def __call__(self, x: Array, mask: Array | None) -> Float[Array, "bins"]:
    size = jnp.abs(_rows(x, mask))
    from_edge = [(~(size < edge)).sum() for edge in self.edges]
    counts = jnp.stack([_tokens(x, mask) * x.shape[-1], *from_edge, jnp.int32(0)])
    return -jnp.diff(counts).astype(jnp.float32)


def histogram(edges: Sequence[float]) -> Reduction:
  """How many |x|, over all channels, lie below the first edge, between two, from the last up.

  c_i = #{e_i ≤ |x| < e_{i+1}} with e_0 = 0 and e_{n+1} = ∞, so that every number counts once, inf
  and NaN in the last bin: counts [n + 1] in float32, exact to 2²⁴.

  Args:
    edges: n positive numbers, increasing.

  Raises:
    ValueError: for other edges.

  Example:
    >>> histogram([1.0, 6.0]).measure(jnp.array([[0.0, -0.5, 2.0, -6.0]]), None).tolist()
    [2.0, 1.0, 1.0]
  """
  edges = tuple(float(edge) for edge in edges)
  if not edges or not all(a < b for a, b in zip((0.0, *edges), edges, strict=False)):
    raise ValueError(f"histogram: edges {edges}; allowed: positive numbers that increase")
  return Reduction(_Histogram(edges), jnp.add)
