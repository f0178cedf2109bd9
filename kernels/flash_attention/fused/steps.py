"""The arithmetic of one tile, for kernels that hold it in registers or VMEM.

A tile of scores is [queries, keys], or [keys, queries] where that spares a transposition; all that
goes with its rows is [rows, 1]. Scores are in units of their own (`unit`), which spares a factor;
2^x takes the place of e^x.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core.typing import Array, Float

LOG2E = math.log2(math.e)
# Least running maximum: finite, so that a row of −inf scores gives 2^(−inf) = 0, and no score that
# is finite lies below it.
FLOOR = float(np.finfo(np.float32).min)

_DIGIT = 4096  # more than the pairs of a row of a tile, a power of two, exact in all types


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
  """Product of matrices over the given axes, in float32; float32 factors are not rounded."""
  exact = jnp.dtype(b.dtype).itemsize >= 4
  return lax.dot_general(
    a.astype(b.dtype),
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


@dataclasses.dataclass(frozen=True)
class Shown:
  """Which pairs of a tile see each other, and whether numbers that are not finite are about.

  Attributes:
    seen: booleans shaped like the scores, or None for all.
    exact: whether what is hidden may be NaN or infinite, and must not meet a weight of zero.
  """

  seen: Array | None = None
  exact: bool = False

  def hide(self, x: Array, value: float) -> Array:
    """`x`, with `value` where nothing is seen."""
    return x if self.seen is None else jnp.where(self.seen, x, value)

  def without(self, hidden: Array) -> "Shown":
    """Less these pairs."""
    seen = ~hidden if self.seen is None else self.seen & ~hidden
    return dataclasses.replace(self, seen=seen)

  def dot(self, weights: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """weights · b over the pairs that are seen; what of b is not finite counts as infinite."""
    if not self.exact or self.seen is None:
      return dot(weights, b, contract)
    wide = b.astype(jnp.float32)
    kept = jnp.where(jnp.abs(wide) < jnp.inf, wide, 0.0).astype(b.dtype)
    # How many are seen of ∞ and of −∞, NaN being both, as the digits of one number.
    flags = jnp.where(wide < jnp.inf, 0.0, 1.0) + jnp.where(wide > -jnp.inf, 0.0, float(_DIGIT))
    seen = jnp.broadcast_to(jnp.where(self.seen, 1.0, 0.0), weights.shape)
    ends = dot(seen, flags.astype(b.dtype), contract).astype(jnp.int32)
    up = jnp.where(ends % _DIGIT > 0, jnp.inf, 0.0)
    down = jnp.where(ends >= _DIGIT, -jnp.inf, 0.0)
    return dot(self.hide(weights, 0.0), kept, contract) + (up + down)


def finite(*arrays: Array) -> Array:
  """Whether all of them are, up to sums that overflow."""
  return jnp.abs(sum(jnp.sum(x) for x in arrays)) < jnp.inf


def unit(scale: float, softcap: float | None, extra: bool) -> float:
  """What a unit of `scores` is worth; `extra` says whether something is added to them."""
  factor = scale if softcap is None else softcap
  return factor if not extra and factor > 0 else 1.0


def scores(
  a: Float[Array, "I H"],
  b: Float[Array, "J H"],
  extra: Float[Array, "I J"] | None,
  shown: Shown,
  scale: float,
  softcap: Any,
) -> tuple[Array, Array | None]:
  """softcap(scale · a bᵀ) + extra in their `unit`, −inf where not seen; the cap's derivative."""
  factor: Any = scale
  logits, slope = dot(a, b, (1, 1)), None
  if softcap is not None:
    logits, factor = jnp.tanh(logits * (scale / softcap)), softcap
    slope = 1 - logits * logits
  if not isinstance(factor, float) or unit(scale, softcap, extra is not None) == 1.0:
    logits = logits * factor
  if extra is not None:
    logits = logits + extra.astype(jnp.float32)
  return shown.hide(logits, -jnp.inf), slope


def power(x: Array, factor: float, y: Any) -> Array:
  """2^(factor · x − y)."""
  return jnp.exp2(x * factor - y)


@dataclasses.dataclass(frozen=True)
class Powers:
  """2^(score − top), where scores and tops have units of their own.

  A score counts `inner` times its number in the unit of the tops, of which one is `outer` log 2.
  One of the two is 1: the outer one, so that scores are scaled and shifted in one instruction; the
  inner one where a device has none, which would scale scores while it waits for the maximum and
  keep both, and where scores could overflow in units of log 2.

  Attributes:
    power: 2^(factor · x − y) of x, factor and y.
  """

  inner: float
  outer: float
  power: Callable[[Array, float, Any], Array]

  @classmethod
  def of(
    cls,
    scale: float,
    softcap: float | None,
    extra: bool,
    power: Callable[..., Array],
    fused: bool = True,
  ) -> "Powers":
    """For `scores` of these arguments; `fused` says whether `power` is one instruction."""
    log2 = unit(scale, softcap, extra) * LOG2E
    bounded = softcap is not None and not extra
    inner = fused and (log2 <= 1 or bounded)
    return cls(log2, 1.0, power) if inner else cls(1.0, log2, power)

  def __call__(self, logits: Array, top: Array) -> Array:
    if self.outer == 1.0:
      return self.power(logits, self.inner, top)
    return self.between(logits, top)

  def between(self, top: Array, new: Array) -> Array:
    """2^(top − new)."""
    return self.power(top - new, self.outer, 0.0)


def start(rows: int, width: int, lanes: int = 1) -> tuple[Array, Array, Array]:
  """Running sum, running maximum and weighted values of rows that have seen nothing."""
  zeros = lambda n: jnp.zeros((rows, n), jnp.float32)
  return zeros(lanes), zeros(lanes) + FLOOR, zeros(width)


def accumulate(
  carry: tuple[Array, Array, Array],
  logits: Array,
  v: Array,
  shown: Shown,
  powers: Powers,
  wide: Callable[[Array, int], Array] = lambda x, columns: x,
) -> tuple[Array, Array, Array]:
  """The running values with a tile of scores and its values taken in.

  Args:
    wide: spreads what goes with rows over so many columns, where that is not left to JAX.
  """
  total, top, out = carry
  new = jnp.maximum(top, logits.max(-1, keepdims=True) * powers.inner)
  weights, fade = powers(logits, wide(new, logits.shape[1])), powers.between(top, new)
  total = total * fade + weights.sum(-1, keepdims=True)
  return total, new, out * wide(fade, out.shape[1]) + shown.dot(weights, v)


def finish(total: Array, top: Array, out: Array) -> tuple[Array, Array, Array]:
  """Output, maximum and log₂ of the sum; zeros, −inf and 0 for rows that have seen nothing."""
  return out / some(total), *ends(total, top)


def ends(total: Array, top: Array) -> tuple[Array, Array]:
  """Maximum and log₂ of the sum; −inf and 0 for rows that have seen nothing."""
  return jnp.where(total == 0, -jnp.inf, top), jnp.log2(some(total))


def some(total: Array) -> Array:
  """Sums, with 1 for those of nothing."""
  return jnp.where(total == 0, 1.0, total)


def weights(logits: Array, powers: Powers, *ends: Array) -> Array:
  """P = 2^(S − lse), or from (top, log_sum) 2^(S − top − log_sum).

  LSE in units of log 2 takes fewer registers; of a great maximum it has no digits left for a sum.
  """
  if len(ends) == 1:
    return powers.power(logits, powers.inner * powers.outer, ends[0])
  top, log_sum = ends
  return powers.power(logits * powers.inner - top, powers.outer, log_sum)


def score_gradient(weights: Array, d_weights: Array, delta: Array, slope: Array | None) -> Array:
  """Gradient of the products: P ∘ (dP − D), D = rowsum(dO ∘ O) − dLSE, through the soft cap."""
  gradient = weights * (d_weights - delta)
  return gradient if slope is None else gradient * slope
