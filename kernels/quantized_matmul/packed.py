"""x Mᵀ and x M for a packed matrix M, whose numbers are made tile by tile as they are multiplied.

A tile of M lies in planes (`Format.planes`), and inputs are cut to fit (`Format.strands`), so that
nothing is put in order on the way. On a CPU the tiles are some outputs each: one row x multiplies
what is unpacked in registers, more rows a tile that is unpacked in cache. On GPUs and TPUs Pallas
kernels unpack them, where they know the format and no mesh axis is explicit; elsewhere M is
unpacked whole.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import weights
from effjax.core.linear_map import linear_map
from effjax.core.numerics import vary_alike, wide
from effjax.core.typing import Array, Float, Integer
from effjax.kernels.quantized_matmul.batches import row_by_row
from effjax.kernels.quantized_matmul.formats import Format
from effjax.kernels.quantized_matmul.fused import branches
from effjax.kernels.quantized_matmul.steps import (
  begin,
  even,
  outputs_at_once,
  pairwise,
  parts_of,
  sum_of,
  zeros_after,
)

TERMS = 3  # runs of blocks that are added in registers before they are added in memory
SUMS_BYTES = 1 << 17  # which should stay in a core's cache, as
TILE_BYTES = 1 << 19  # of an expanded tile, which are many for its packed ones


def packed_product(
  x: Float[Array, "... D"],
  format: Format,
  codes: Integer[Array, "O N"],
  *constants: Any,
  inputs: bool = True,
) -> Float[Array, "... F"]:
  """x Mᵀ, or x M where `inputs` is False, in float32 or in the type of x where that is wider.

  Backward keeps the codes and nothing wider. Where the constants are differentiated, M is unpacked
  whole.

  Args:
    x: [..., I], or [..., O] for x M.
    format: what the codes stand for.
    codes: uint8 [O, n · format.size].
    constants: as `format.unpack` takes them, arrays or weights.
    inputs: whether x holds inputs of M, and the product its outputs.

  Example:
    >>> from effjax.kernels.quantized_matmul import Nibbles
    >>> halves, codes, scale = Nibbles(tuple(range(16)), 2), jnp.uint8([[0x12]]), jnp.ones((1, 1))
    >>> packed_product(jnp.array([1.0, 10.0]), halves, codes, scale).tolist()
    [21.0]
    >>> packed_product(jnp.array([3.0]), halves, codes, scale, inputs=False).tolist()
    [3.0, 6.0]
  """
  matrix = codes, constants
  return _once(vary_alike(x, matrix), matrix, format, inputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _product(x, matrix, format, inputs):
  outputs, size = matrix[0].shape
  length = outputs if not inputs else size // format.size * format.block
  rows = x.reshape(math.prod(x.shape[:-1]), length)
  width = outputs if inputs else size // format.size * format.block
  if not rows.size or not width:
    return jnp.zeros((*x.shape[:-1], width), wide(x.dtype))
  on_cpu = row_by_row(functools.partial(_outputs if inputs else _inputs, format))
  y = jax.lax.platform_dependent(
    rows,
    matrix,
    cpu=lambda rows, matrix: on_cpu(rows.astype(wide(x.dtype)), *matrix),
    default=functools.partial(_whole, format, inputs),
    **branches(format, inputs, rows, matrix),
  )
  return y.reshape(*x.shape[:-1], width)


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(format, inputs, primals, tangents):
  (x, matrix), (dx, (_, d_constants)) = primals, tangents
  y = _once(x, matrix, format, inputs)
  forward = lambda matrix, dx: _once(dx, matrix, format, inputs)
  backward = lambda matrix, dy: _once(dy, matrix, format, not inputs).astype(x.dtype)
  zero = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)
  none = lambda x: np.zeros if x.dtype == jax.dtypes.float0 else jnp.zeros
  dense = lambda x: none(x)(x.shape, x.dtype) if zero(x) else x
  dy = linear_map(forward, backward, matrix, dense(dx), y)
  if not all(map(zero, jax.tree.leaves(d_constants, is_leaf=zero))):
    codes, constants = matrix
    of_constants = lambda constants: _whole(format, inputs, x, (codes, constants))
    moved = jax.tree.map(dense, d_constants, is_leaf=zero)
    dy = dy + jax.jvp(of_constants, (constants,), (moved,))[1]
  return y, dy


_once = jax.jit(_product, static_argnums=(2, 3))  # layers alike are traced and lowered once


def _whole(format, inputs, x, matrix):
  codes, constants = matrix
  m = format.unpack(codes, *map(weights.materialize, constants)).astype(x.dtype)
  axes = (((1,), (int(inputs),)), ((), ()))
  return jax.lax.dot_general(x, m, axes, preferred_element_type=wide(x.dtype))


def _outputs(format, x, codes, constants):
  """x Mᵀ by tiles of outputs."""
  outputs, n = len(codes), codes.shape[1] // format.size
  strands = format.strands(x.reshape(len(x), n, format.block))
  few = len(x) == 1
  held = _lanes(strands, n) * 4 if few else n * format.block * x.dtype.itemsize
  at_once = max(1, min(SUMS_BYTES // held, -(-outputs // 2)))  # XLA spoils a loop of one turn
  size = even(outputs, at_once) if few else outputs_at_once(outputs, held, TILE_BYTES)

  def put(i, out):
    first = begin(i, size, outputs)
    tile = functools.partial(_tile, format, codes, constants, first, size)
    found = (_in_registers if few else _in_cache)(format, strands, tile, n)
    return jax.lax.dynamic_update_slice_in_dim(out, found, first, 1)

  return jax.lax.fori_loop(0, -(-outputs // size), put, zeros_after(x, (len(x), outputs)))


def _inputs(format, x, codes, constants):
  """x M by tiles of outputs, over which it is summed."""
  outputs, n = len(codes), codes.shape[1] // format.size
  size = outputs_at_once(outputs, n * format.block * x.dtype.itemsize, TILE_BYTES)
  parts = parts_of(x, size)

  def add(i, sums):
    tile = _tile(format, codes, constants, begin(i, size, outputs), size, 0, n)
    part = jax.lax.dynamic_index_in_dim(parts, i, 1, keepdims=False)
    by_rows = lambda plane: jnp.tensordot(part, plane.astype(x.dtype), 1)
    return [s + by_rows(plane) for s, plane in zip(sums, _planes(format, *tile), strict=True)]

  shapes = (strand.shape for strand in format.strands(jnp.zeros((len(x), n, format.block))))
  sums = [zeros_after(x, shape) for shape in shapes]
  return format.join(jax.lax.fori_loop(0, -(-outputs // size), add, sums)).reshape(len(x), -1)


def _in_cache(format, strands, tile, n):
  def of_plane(strand, plane):
    flat = lambda x: x.reshape(len(x), -1).astype(strand.dtype)
    return jax.lax.dot_general(flat(strand), flat(plane), (((1,), (1,)), ((), ())))

  planes = _planes(format, *tile(0, n))
  return pairwise([of_plane(*pair) for pair in zip(strands, planes, strict=True)])


def _in_registers(format, strands, tile, n):
  """For x of one row; a term is a run of blocks."""
  run = -(-n // TERMS)
  wide = [(strand.reshape(1, -1), strand.shape[-1]) for strand in strands]
  parts = [parts_of(flat, run * w).reshape(-1, 1, run, w) for flat, w in wide]

  def term(j):
    planes = _planes(format, *tile(begin(j, run, n), run))
    return pairwise(
      [part[j] * plane.astype(part.dtype) for part, plane in zip(parts, planes, strict=True)]
    )

  sums = pairwise([term(j) for j in range(-(-n // run))])
  return sum_of(sums.reshape(1, len(sums), -1), 2)


def _lanes(strands, n):
  return strands[0].shape[-1] * -(-n // TERMS)


def _planes(format, codes, constants):
  """[O, n, w] each, in float32."""
  blocks = codes.reshape(len(codes), -1, format.size)
  each = constants if format.shares else [c[..., None] for c in constants]
  return format.planes(blocks, *each)


def _tile(format, codes, constants, first, size, block, run):
  """Codes and constants of `size` outputs and `run` blocks; some constants are expanded for it."""
  at = lambda x, each: jax.lax.dynamic_slice(
    x, (jnp.asarray(first, jnp.int32), jnp.int32(block * each)), (size, run * each)
  )
  if format.shares:
    return at(codes, format.size), list(map(weights.materialize, constants))

  def of(c):
    if not isinstance(c, weights.Weight):
      return at(c, 1)
    rows = lambda: weights.lookup(c, first + jnp.arange(size, dtype=jnp.int32))
    none = lambda: vary_alike(jnp.zeros((size, c.shape[-1]), c.dtype), c)
    # A branch is computed once; by itself XLA would make each anew for all numbers that it scales.
    found = jax.lax.cond(first >= 0, rows, none)
    return found[:, block : block + run]

  return at(codes, format.size), list(map(of, constants))
