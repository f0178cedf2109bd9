"""The grouped product by tiles of rows, for processors without a ragged matrix unit.

Rows are sorted by group, so a group is a range of rows. The loop runs over groups that have rows,
fetches the group's weight once, and walks its range in tiles: large ones while they fit, then
smaller ones, so that little is computed beyond the range. Trip counts are values on the device:
neither the program nor its compile time grows with the number of groups. The weight may be any
pytree that `linear` accepts once its leading axis is indexed.

Forward multiplies M + O(E · smallest tile) rows, backward twice that, against E · M rows of a
masked dense product. Loops with traced trip counts have no automatic reverse derivative, so
`backward` is written out: each tile pulls its cotangent back through `linear`, and the group's
weight gradient is summed in float32 and written once. A group without rows is never visited: its
gradient is exactly zero. Gradients that nobody asks for are dead code to the compiler.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core import numerics, trees
from effjax.core.known import more
from effjax.core.typing import Array, Dim, Float, Int, PyTree, Size
from effjax.core.weights import from_row, linear
from effjax.kernels.grouped_matmul.groups import spans

HIGHEST = 256  # of the heights of tiles
FORWARD = {"allow_negative_indices": False}  # nothing counts from the end: a shorter program


def tile_rows(rows: Dim, groups: int) -> tuple[int, ...]:
  """Tile heights, descending: the last one bounds what a group computes in vain.

  Example:
    >>> tile_rows(4096, 8), tile_rows(40, 8), tile_rows(2, 8)
    ((256, 64, 16), (16, 4), (2,))
  """
  heights = (16, 4) if more(8 * groups, rows) else (HIGHEST, 64, 16)
  return tuple(height for height in heights if not more(height, rows)) or (rows,)


def forward(
  capacity: Size | None,
  x: Float[Array, "M D"],
  floats: PyTree,
  others: PyTree,
  group_sizes: Int[Array, "E"],
) -> Float[Array, "M F"]:
  """x[m] w[e] + bias[e] for the rows of each group e, zero for rows past the last group.

  Args:
    capacity: None, or how many rows apart groups begin, as in `Groups`.
    x: rows sorted by group.
    floats, others: what `trees.merge` makes (w, bias) of, every array with a leading axis E:
      those that take gradients, and the rest. The bias may be None.
    group_sizes: rows of each group.
  """
  params = trees.merge(floats, others)

  def on_group(group: Array, span: "_Span", out: Array) -> Array:
    weight, bias = _at(params, group)

    def on_tile(tile: "_Tile", out: Array) -> Array:
      return tile.write(out, linear(tile.read(x), from_row(weight, tile.first), bias))

    return span.each_tile(on_tile, out)

  out = numerics.vary_alike(
    jnp.zeros((x.shape[0], params[0].shape[-1]), x.dtype), x, params, group_sizes
  )
  return _each_group(group_sizes, x.shape[0], capacity, on_group, out)


def backward(
  capacity: Size | None,
  x: Float[Array, "M D"],
  floats: PyTree,
  others: PyTree,
  group_sizes: Int[Array, "E"],
  dy: Float[Array, "M F"],
) -> tuple[Float[Array, "M D"], PyTree]:
  """Cotangents of `x` and of `floats`, where `trees.merge(floats, others)` is (w, bias)."""

  def on_group(group: Array, span: "_Span", carry: tuple) -> tuple:
    dx, grads = carry
    weights, rest = _at((floats, others), group)

    def on_tile(tile: "_Tile", carry: tuple) -> tuple:
      dx, sums = carry

      def apply(rows: Array, weights: PyTree) -> Array:
        weight, bias = trees.merge(weights, rest)
        return linear(rows, from_row(weight, tile.first), bias)

      _, pull = jax.vjp(apply, tile.mask(tile.read(x)), weights)
      d_rows, d_weights = pull(tile.mask(tile.read(dy)))
      return tile.write(dx, d_rows), jax.tree.map(_add, sums, d_weights)

    sums = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, _sum_dtype(leaf.dtype)), weights)
    dx, sums = span.each_tile(on_tile, (dx, numerics.vary_alike(sums, x, dy)))
    put = lambda grad, total: lax.dynamic_update_index_in_dim(
      grad, total.astype(grad.dtype), group, 0, **FORWARD
    )
    return dx, jax.tree.map(put, grads, sums)

  zeros = jax.tree.map(jnp.zeros_like, (x, floats))
  carry = numerics.vary_alike(zeros, x, floats, group_sizes, dy)
  return _each_group(group_sizes, x.shape[0], capacity, on_group, carry)


class _Tile:
  """`height` consecutive rows from `start`, of which those before `end` belong to the group.

  Near the last row the window moves up to stay inside; `exact` promises that it need not, and that
  all its rows belong.
  """

  def __init__(self, start: Array, end: Array, height: int, rows: Dim, exact: bool):
    self.first = start if exact else jnp.minimum(start, rows - height)
    self.height = height
    row = self.first + jnp.arange(height)
    self.belongs = None if exact else ((row >= start) & (row < end))[:, None]

  def read(self, array: Array) -> Array:
    return lax.dynamic_slice_in_dim(array, self.first, self.height, **FORWARD)

  def mask(self, rows: Array) -> Array:
    return rows if self.belongs is None else jnp.where(self.belongs, rows, jnp.zeros_like(rows))

  def write(self, array: Array, rows: Array) -> Array:
    if self.belongs is not None:
      rows = jnp.where(self.belongs, rows, self.read(array))
    return lax.dynamic_update_slice_in_dim(array, rows, self.first, 0, **FORWARD)


class _Span:
  """The rows `start` … `end` of one group."""

  def __init__(self, start: Array, end: Array, rows: Dim, heights: tuple[int, ...]):
    self.start, self.end, self.rows, self.heights = start, end, rows, heights

  def each_tile(self, step: Callable[[_Tile, PyTree], PyTree], carry: PyTree) -> PyTree:
    """`carry` after `step(tile, carry)` for tiles that cover the span."""
    start = self.start
    for height in self.heights:
      exact = height != self.heights[-1]
      left = self.end - start + (0 if exact else height - 1)
      count = lax.div(left, jnp.full_like(left, height))

      def body(i, carry, start=start, height=height, exact=exact):
        return step(_Tile(start + i * height, self.end, height, self.rows, exact), carry)

      carry = lax.fori_loop(0, count, body, carry)
      start = start + count * height
    return carry


def _each_group(
  group_sizes: Array,
  rows: Dim,
  capacity: Size | None,
  step: Callable[[Array, _Span, PyTree], PyTree],
  carry: PyTree,
) -> PyTree:
  """`carry` after `step(group, span, carry)` for every group that has rows."""
  groups = group_sizes.shape[0]
  heights = tile_rows(rows, groups)
  starts, ends = spans(group_sizes, rows, capacity)
  most = rows if more(groups, rows) else groups
  busy = jnp.nonzero(ends > starts, size=most, fill_value=0)[0]

  def body(i, carry):
    group = _at(busy, i)
    return step(group, _Span(*_at((starts, ends), group), rows, heights), carry)

  return lax.fori_loop(0, jnp.count_nonzero(ends > starts), body, carry)


def _at(tree: PyTree, index: Array) -> PyTree:
  return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, False, **FORWARD), tree)


def _add(total: Array, part: Array) -> Array:
  return total + part.astype(total.dtype)


def _sum_dtype(dtype) -> jnp.dtype:
  return numerics.wide(dtype)
