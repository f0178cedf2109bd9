"""The arithmetic of one tile, for kernels that hold it in registers or VMEM.

A tile of scores is [queries, keys], or [keys, queries] where that spares a transposition; all that
goes with its rows is [rows, 1]. Scores are in units of log 2, so that 2^x takes the place of e^x.
"""

import math

import jax.numpy as jnp
from jax import lax

from effjax.core.typing import Array, Float

LOG2E = math.log2(math.e)
FLOOR = -1e30  # least running maximum: finite, so that a row of −inf scores gives 2^(−inf) = 0


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


def scores(
  a: Float[Array, "I H"],
  b: Float[Array, "J H"],
  bias: Float[Array, "I J"] | None,
  seen: Array | None,
  scale: float,
  softcap: float | None,
) -> tuple[Array, Array | None]:
  """log₂e · (softcap(scale · a bᵀ) + bias), −inf where not seen, and the soft cap's derivative."""
  products = dot(a, b, (1, 1))
  slope = None
  if softcap is None:
    logits = products * (scale * LOG2E)
  else:
    capped = jnp.tanh(products * (scale / softcap))
    slope = 1 - capped * capped
    logits = capped * (softcap * LOG2E)
  if bias is not None:
    logits = logits + bias.astype(jnp.float32) * LOG2E
  return logits if seen is None else jnp.where(seen, logits, -jnp.inf), slope


def start(rows: int, width: int) -> tuple[Array, Array, Array]:
  """Running sum, running maximum and weighted values of rows that have seen nothing."""
  zeros = lambda n: jnp.zeros((rows, n), jnp.float32)
  return zeros(1), zeros(1) + FLOOR, zeros(width)


def accumulate(carry: tuple[Array, Array, Array], logits: Array, v: Array):
  """The running values with a tile of scores and its values taken in."""
  total, top, out = carry
  new = jnp.maximum(top, logits.max(-1, keepdims=True))
  weights = jnp.exp2(logits - new)
  fade = jnp.exp2(top - new)
  return total * fade + weights.sum(-1, keepdims=True), new, out * fade + dot(weights, v)


def finish(total: Array, top: Array, out: Array) -> tuple[Array, Array]:
  """Output and log-sum-exp (natural); zeros and −inf for rows that have seen nothing."""
  some = total > 0
  safe = jnp.where(some, total, 1.0)
  lse = jnp.where(some, top * math.log(2) + jnp.log(safe), -jnp.inf)
  return out / safe, lse


def score_gradient(weights: Array, d_weights: Array, delta: Array) -> Array:
  """Gradient of the scores: P ∘ (dP − D) with D = rowsum(dO ∘ O) − dLSE."""
  return weights * (d_weights - delta)


def times(gradient: Array, slope: Array | None) -> Array:
  """The gradient before the soft cap, if there is one."""
  return gradient if slope is None else gradient * slope
