"""x @ q for a matrix q of small integers."""

import functools
import math

import jax
import jax.numpy as jnp

from effjax.core.numerics import vary_alike
from effjax.core.typing import Array, Float, Int

FEW_ROWS = 4
BLOCK_BYTES = 1 << 20  # a widened block should stay in a core's cache


@functools.partial(jax.checkpoint, prevent_cse=False)
def integer_product(x: Float[Array, "... D"], q: Int[Array, "D F"]) -> Float[Array, "... F"]:
  """x @ q in float32; backward stores q and no widened copy.

  For the few rows of decoding on a CPU, q is widened block by block. XLA's CPU backend never fuses
  the conversion into the product, and starts it for all layers of an unrolled model before the
  first product: of SmolLM2's layers in int8 it held every matrix in float32 besides.
  """
  if math.prod(x.shape[:-1]) > FEW_ROWS:
    return _whole(x, q)
  return jax.lax.platform_dependent(x, q, cpu=_in_blocks, default=_whole)


def _whole(x, q):
  axes = (((x.ndim - 1,), (0,)), ((), ()))
  return jax.lax.dot_general(x, q.astype(x.dtype), axes, preferred_element_type=jnp.float32)


def _in_blocks(x, q):
  rows, columns = q.shape
  flat = x.reshape(-1, rows).astype(jnp.float32)
  out = vary_alike(jnp.zeros((flat.shape[0], columns), jnp.float32), flat, q)
  # A wide matrix is mostly the transposed token table, whose columns are contiguous.
  step = _by_columns if columns > 4 * rows else _by_rows
  return step(flat, q, out).reshape(*x.shape[:-1], columns)


def _by_rows(x, q, out):
  count = _blocks(*q.shape)
  size = q.shape[0] // count

  def add(i, out):
    part = jax.lax.dynamic_slice_in_dim(x, i * size, size, 1)
    block = jax.lax.dynamic_slice_in_dim(q, i * size, size, 0)
    return out + part @ block.astype(jnp.float32)

  return jax.lax.fori_loop(0, count, add, out)


def _by_columns(x, q, out):
  count = _blocks(*q.shape[::-1])
  size = q.shape[1] // count

  def put(i, out):
    block = jax.lax.dynamic_slice_in_dim(q, i * size, size, 1)
    return jax.lax.dynamic_update_slice_in_dim(out, x @ block.astype(jnp.float32), i * size, 1)

  return jax.lax.fori_loop(0, count, put, out)


def _blocks(length: int, other: int) -> int:
  """The least divisor of `length` that gives blocks within BLOCK_BYTES; at most twice as many."""
  wanted = max(1, math.ceil(length * other * 4 / BLOCK_BYTES))
  divisors = (n for n in range(wanted, 2 * wanted + 1) if length % n == 0)
  return next(divisors, 1)
