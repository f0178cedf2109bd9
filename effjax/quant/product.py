"""x @ q for a matrix q of small integers, of which no copy in another type is held.

XLA's CPU backend never fuses a conversion into a product, and starts the conversions of all layers
of an unrolled model before the first product. There q is gone through in blocks, and no block
before x is there.
"""

import functools
import math

import jax
import jax.numpy as jnp

from effjax.core.linear_map import linear_map
from effjax.core.numerics import vary_alike, wide
from effjax.core.typing import Array, Float, Int

FEW_ROWS = 8  # of x, for which multiplying and adding takes no longer than widening q
TERMS = 12  # products that are added in registers before they are added in memory
SUMS_BYTES = 1 << 17  # of sums in memory, and
BLOCK_BYTES = 1 << 20  # of a widened block: both should stay in a core's cache
SUMS_SHARE = 12  # of the bytes of q, which its sums have at most
LEAST_SUMS_BYTES = 1 << 13  # fewer would make a loop nothing but its overhead,
LEAST_OUTPUTS = 128  # and a product of matrices slow


def integer_product(
  x: Float[Array, "... D"], q: Int[Array, "D F"], *, turned: bool = False
) -> Float[Array, "... F"]:
  """x @ q in float32, or in the type of `x` where that is wider; backward keeps q as it is.

  Args:
    x: [..., D].
    q: [D, F].
    turned: whether q is the transpose of what lies in memory, as for the head of a token table.
  """
  lying = jnp.matrix_transpose(q) if turned else q
  return _linear(vary_alike(x, q), lying, int(turned))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _linear(x, q, axis):
  """Σ_d x[..., d] q[d, f] for axis 0, Σ_d x[..., d] q[f, d] for axis 1."""
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  if not x.size or not q.size:
    return _whole(rows, q, axis).reshape(*x.shape[:-1], q.shape[1 - axis])
  few = (_add, _put)[axis]
  on_cpu = few if len(rows) <= FEW_ROWS else functools.partial(_by_outputs, axis=axis)
  y = jax.lax.platform_dependent(
    rows,
    q,
    cpu=lambda rows, q: on_cpu(rows.astype(wide(x.dtype)), q),
    default=functools.partial(_whole, axis=axis),
  )
  return y.reshape(*x.shape[:-1], q.shape[1 - axis])


@_linear.defjvp
def _linear_jvp(axis, primals, tangents):
  (x, q), (dx, _) = primals, tangents
  y = _linear(x, q, axis)
  forward = lambda q, dx: _linear(dx, q, axis)
  backward = lambda q, dy: _linear(dy, q, 1 - axis).astype(x.dtype)
  return y, linear_map(forward, backward, q, dx, y)


def _whole(x, q, axis):
  axes = (((1,), (axis,)), ((), ()))
  return jax.lax.dot_general(x, q.astype(x.dtype), axes, preferred_element_type=wide(x.dtype))


def _by_outputs(x, q, axis):
  """Each block of q, widened, gives some of the outputs."""
  columns, outputs = q.shape[axis], q.shape[1 - axis]
  most = max(LEAST_OUTPUTS, BLOCK_BYTES // (columns * x.dtype.itemsize))
  size = _even(outputs, min(most, -(-outputs // 2)))

  def put(i, out):
    begin = _begin(i, size, outputs)
    block = jax.lax.dynamic_slice_in_dim(q, begin, size, 1 - axis).astype(x.dtype)
    found = jax.lax.dot_general(x, block, (((1,), (axis,)), ((), ())))
    return jax.lax.dynamic_update_slice_in_dim(out, found, begin, 1)

  return jax.lax.fori_loop(0, -(-outputs // size), put, _zeros(x, q, len(x), outputs))


def _add(x, q):
  """Each block of rows of q [D, F] adds to all outputs; a term is several rows, side by side."""
  rows, outputs = q.shape
  size = _even(rows, TERMS * _most(q, len(x) * outputs * x.dtype.itemsize))
  beside = -(-size // TERMS)
  parts = _parts(_parts(x, size), beside)

  def add(i, sums):
    def term(j):
      begin = _begin(i, size, rows) + _begin(j, beside, size)
      part = jax.lax.dynamic_index_in_dim(parts, i, 1, keepdims=False)[:, j, :, None]
      return part * _slice(q, (begin, 0), (beside, outputs))[None].astype(x.dtype)

    return sums + _pairwise([term(j) for j in range(parts.shape[2])])

  zeros = _zeros(x, q, len(x), beside, outputs)
  return _sum(jax.lax.fori_loop(0, parts.shape[1], add, zeros), 1)


def _put(x, q):
  """Each block of rows of q [F, D] gives some of the outputs; a term is some of its columns."""
  outputs, columns = q.shape
  width = min(columns, 16 * -(-columns // (16 * TERMS)))
  size = _even(outputs, _most(q, len(x) * width * x.dtype.itemsize))
  parts = _parts(x, width)

  def put(i, out):
    def term(j):
      begin = _begin(i, size, outputs), _begin(j, width, columns)
      return parts[:, j, None] * _slice(q, begin, (size, width))[None].astype(x.dtype)

    found = _sum(_pairwise([term(j) for j in range(parts.shape[1])]), 2)
    return jax.lax.dynamic_update_slice_in_dim(out, found, _begin(i, size, outputs), 1)

  return jax.lax.fori_loop(0, -(-outputs // size), put, _zeros(x, q, len(x), outputs))


def _most(q, step_bytes):
  """How many steps of that many bytes the sums in memory may have."""
  return max(1, min(SUMS_BYTES, max(LEAST_SUMS_BYTES, q.size // SUMS_SHARE)) // step_bytes)


def _even(length, most):
  """The size of the fewest parts of at most `most` that `length` is cut into."""
  return -(-length // -(-length // most))


def _begin(i, size, length):
  """Where part i begins; the last ends at `length`, and may overlap the one before."""
  least = min if isinstance(i, int) else jnp.minimum
  return least(i * size, length - size)


def _parts(x, size):
  """x [..., D] in those parts [..., i, size], 0 where the last overlaps the one before."""
  length = x.shape[-1]
  count = -(-length // size)
  first, last = jnp.split(x, [(count - 1) * size], -1)
  none = jnp.zeros((*x.shape[:-1], count * size - length), x.dtype)
  return jnp.concatenate([first, none, last], -1).reshape(*x.shape[:-1], count, size)


def _slice(q, begin, shape):
  return jax.lax.dynamic_slice(q, begin, shape, allow_negative_indices=False)


def _pairwise(terms):
  """Their sum, for which one loop over memory multiplies, converts and adds."""
  while len(terms) > 1:
    odd = terms[-1:] if len(terms) % 2 else []
    terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + odd
  return terms[0]


def _sum(x, axis):
  """The sum over an axis as a product: XLA would have a sum take in what makes its terms."""
  ones = jnp.ones(x.shape[axis], x.dtype)
  return jax.lax.dot_general(x, ones, (((axis,), (0,)), ((), ())))


def _zeros(x, q, *shape):
  """Zeros that need x: the compiler makes others at once for all layers, and holds them."""
  zero = jnp.minimum(jnp.abs(x[:, 0]), 0) * q[0, 0].astype(x.dtype)
  return jnp.broadcast_to(zero.reshape(-1, *(1,) * (len(shape) - 1)), shape)
