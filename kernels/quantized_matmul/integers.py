"""x @ q for a matrix q of small integers, of which no copy in another type is held.

XLA's CPU backend never fuses a conversion into a product, and starts the conversions of all layers
of an unrolled model before the first product; what a scan over layers slices off for a loop, it
copies. There a single row x multiplies a few parts of q, each in one pass over memory, in which the
slices of scans and parts become one. More rows go through q in blocks. No part and no block is
begun before those it follows are done. On GPUs and TPUs Pallas kernels widen q in tiles.
"""

import functools
import math

import jax
import jax.numpy as jnp

from effjax.core.linear_map import linear_map
from effjax.core.numerics import vary_alike, wide
from effjax.core.typing import Array, Float, Int
from effjax.kernels.quantized_matmul.batches import row_by_row
from effjax.kernels.quantized_matmul.formats import Integers
from effjax.kernels.quantized_matmul.fused import branches
from effjax.kernels.quantized_matmul.steps import (
  begin,
  even,
  outputs_at_once,
  pairwise,
  parts_of,
  sum_of,
  zero_after,
  zeros_after,
)

FEW_ROWS = 8  # of x, for which multiplying and adding takes no longer than widening q
TERMS = 12  # products that are added in registers before they are added in memory
PARTS = 4  # of q, for which no loop is made: what one row needs
SUMS_BYTES = 1 << 17  # of a loop's sums in memory should stay in a core's cache
SUMS_SHARE = 9  # of the bytes of q, which its sums have at most
LEAST_SUMS_BYTES = 1 << 13  # fewer would make a loop nothing but its overhead
BLOCK = 64  # integers side by side that kernels on other devices take at once, at most


def integer_product(
  x: Float[Array, "... D"], q: Int[Array, "D F"], *, turned: bool = False
) -> Float[Array, "... F"]:
  """x @ q in float32, or in the type of `x` where that is wider; backward keeps q as it is.

  Args:
    x: [..., D].
    q: [D, F].
    turned: whether q is the transpose of what lies in memory, as for the head of a token table.

  Example:
    >>> integer_product(jnp.array([0.5, 1.0]), jnp.array([[1, 2], [3, 4]], jnp.int8)).tolist()
    [3.5, 5.0]
  """
  lying = jnp.matrix_transpose(q) if turned else q
  return _once(vary_alike(x, q), lying, int(turned))


def integer_matmul(
  x: Int[Array, "... D"], q: Int[Array, "D F"], *, turned: bool = False
) -> Int[Array, "... F"]:
  """x @ q for 8-bit integers, summed in int32; arguments as of `integer_product`.

  A CPU has no fast product of integers: there sums are of float32, exact up to 2^24, which 1040
  products of the largest cannot exceed, and otherwise rounded to 24 bits.

  Example:
    >>> integer_matmul(jnp.array([2, 3], jnp.int8), jnp.array([[1, 2], [3, 4]], jnp.int8)).tolist()
    [11, 16]
  """
  lying = jnp.matrix_transpose(q) if turned else q
  axes = (((x.ndim - 1,), (int(turned),)), ((), ()))
  return jax.lax.platform_dependent(
    *vary_alike((x, lying), x, q),
    cpu=lambda x, q: _once(x.astype(jnp.float32), q, int(turned)).astype(jnp.int32),
    default=lambda x, q: jax.lax.dot_general(x, q, axes, preferred_element_type=jnp.int32),
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _linear(x, q, axis):
  """Σ_d x[..., d] q[d, f] for axis 0, Σ_d x[..., d] q[f, d] for axis 1."""
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  if not x.size or not q.size:
    return _whole(rows, q, axis).reshape(*x.shape[:-1], q.shape[1 - axis])
  on_cpu = row_by_row(functools.partial(_on_cpu, axis=axis))
  y = jax.lax.platform_dependent(
    rows,
    q,
    cpu=lambda rows, q: on_cpu(rows.astype(wide(x.dtype)), q),
    default=functools.partial(_whole, axis=axis),
    **_fused(rows, q, axis),
  )
  return y.reshape(*x.shape[:-1], q.shape[1 - axis])


def _fused(x, q, axis):
  block = min(BLOCK, q.shape[1] & -q.shape[1])
  kernels = branches(Integers(block), bool(axis), x, (q, ()))
  return {name: lambda x, q, run=run: run(x, (q, ())) for name, run in kernels.items()}


@_linear.defjvp
def _linear_jvp(axis, primals, tangents):
  (x, q), (dx, _) = primals, tangents
  y = _once(x, q, axis)
  forward = lambda q, dx: _once(dx, q, axis)
  backward = lambda q, dy: _once(dy, q, 1 - axis).astype(x.dtype)
  return y, linear_map(forward, backward, q, dx, y)


_once = jax.jit(_linear, static_argnums=2)  # layers alike are traced and lowered once


def _whole(x, q, axis):
  axes = (((1,), (axis,)), ((), ()))
  return jax.lax.dot_general(x, q.astype(x.dtype), axes, preferred_element_type=wide(x.dtype))


def _on_cpu(x, q, axis):
  return (_add, _put)[axis](x, q) if len(x) <= FEW_ROWS else _by_outputs(x, q, axis)


def _by_outputs(x, q, axis):
  """Each block of q, widened, gives some of the outputs."""
  columns, outputs = q.shape[axis], q.shape[1 - axis]
  size = outputs_at_once(outputs, columns * x.dtype.itemsize)

  def put(i, out):
    first = begin(i, size, outputs)
    block = jax.lax.dynamic_slice_in_dim(q, first, size, 1 - axis).astype(x.dtype)
    found = jax.lax.dot_general(x, block, (((1,), (axis,)), ((), ())))
    return jax.lax.dynamic_update_slice_in_dim(out, found, first, 1)

  return jax.lax.fori_loop(0, -(-outputs // size), put, zeros_after(x, (len(x), outputs)))


def _add(x, q):
  """Each part, rows of q [D, F], adds to all outputs; a term is several rows, side by side."""
  rows, outputs = q.shape
  beside = -(-_size(q, rows, TERMS, len(x) * outputs * x.dtype.itemsize) // TERMS)
  size = beside * min(TERMS, rows // beside)
  parts = parts_of(x, size)

  def add(i, after):
    part = jax.lax.dynamic_index_in_dim(parts, i, 1, keepdims=False)
    first = begin(i, size, rows)

    def term(j):
      lying = _slice(q, (after + (first + j), 0), (beside, outputs))
      return part[:, j : j + beside, None] * lying[None].astype(x.dtype)

    return pairwise([term(j) for j in range(0, size, beside)])

  if parts.shape[1] <= PARTS:
    out = zeros_after(x, (len(x), outputs))
    for i in range(parts.shape[1]):
      out += sum_of(add(i, zero_after(out)), 1)
    return out
  sums = zeros_after(x, (len(x), beside, outputs))
  return sum_of(jax.lax.fori_loop(0, parts.shape[1], lambda i, sums: sums + add(i, 0), sums), 1)


def _put(x, q):
  """Each part, rows of q [F, D], gives some of the outputs; a term is some of its columns."""
  outputs, columns = q.shape
  width = min(columns, 16 * -(-columns // (16 * TERMS)))
  size = _size(q, outputs, 1, len(x) * width * x.dtype.itemsize)
  parts = parts_of(x, width)

  def put(i, after, out):
    first = after + begin(i, size, outputs)

    def term(j):
      part = _slice(q, (first, begin(j, width, columns)), (size, width))
      return parts[:, j, None] * part[None].astype(x.dtype)

    found = sum_of(pairwise([term(j) for j in range(parts.shape[1])]), 2)
    return jax.lax.dynamic_update_slice_in_dim(out, found, first, 1)

  count, out = -(-outputs // size), zeros_after(x, (len(x), outputs))
  if count > PARTS:
    return jax.lax.fori_loop(0, count, lambda i, out: put(i, 0, out), out)
  for i in range(count):
    out = put(i, zero_after(out), out)
  return out


def _size(q, length, times, step_bytes):
  """Rows of a part, of which `times` have one sum of `step_bytes`."""
  share = max(LEAST_SUMS_BYTES, q.size // SUMS_SHARE)
  at_most = lambda held: even(length, times * max(1, held // step_bytes))
  size = at_most(share)
  return size if -(-length // size) <= PARTS else at_most(min(SUMS_BYTES, share))


def _slice(q, first, shape):
  first = [jnp.asarray(i, jnp.int32) for i in first]
  return jax.lax.dynamic_slice(q, first, shape, allow_negative_indices=False)
