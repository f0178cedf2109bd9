"""A bias shared along the keys, which needs no kernel.

Added to all scores of a query it changes no weight and shifts the log-sum-exp: softmax(S + b) is
softmax(S) and LSE(S + b) is LSE(S) + b. Its gradient is the log-sum-exp's; summed over the keys,
dS would give it as a difference of greater numbers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from effjax.core.known import more
from effjax.core.typing import Array, Dim


def outside(attention: Callable) -> Callable:
  """`attention`, with a bias [#B, #N, #T, 1] added to its log-sum-exp and not to its scores."""

  @functools.wraps(attention)
  def shifted(*arrays: Array, bias: Array | None = None, **options: Any) -> tuple[Array, Array]:
    if bias is None or bias.shape[3] > 1:
      return attention(*arrays, bias=bias, **options)
    out, lse = attention(*arrays, **options)
    shift = _repeat(jnp.swapaxes(bias[..., 0], 1, 2).astype(lse.dtype), lse.shape)
    hidden = shift == -jnp.inf
    lse = jnp.where(hidden | (lse == -jnp.inf), -jnp.inf, lse + shift)
    return jnp.where(hidden[..., None], 0, out), lse

  return shifted


def _repeat(x: Array, shape: tuple[Dim, ...]) -> Array:
  """Axes of one up to `shape` by doubling, whose transpose, the gradient, is a sum in pairs.

  Cotangents of either sign cancel in it, and one running sum would keep the rounding of them all.
  """
  for axis, length in enumerate(shape):
    while more(length, x.shape[axis]):
      x = jnp.concatenate([x, x], axis)
    if more(x.shape[axis], length):
      x = lax.slice_in_dim(x, 0, length, axis=axis)
  return jnp.broadcast_to(x, shape)
