"""Products of groups of rows with a matrix each on TPUs (Mosaic).

Tiles of rows are visited in turn by each group that has rows in them, with a tile of outputs, whose
part of the group's matrix stays in VMEM from visit to visit; what is packed is unpacked once for
all of them. A visit multiplies the part of the tile that holds rows of the group, and stores those
rows. Where rows are summed, those of other groups count as zeros.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.core.typing import Array, Bool, DTypeLike, Float, Int
from effjax.kernels.grouped_matmul import visits
from effjax.kernels.grouped_matmul.sizes import Size, choose
from effjax.kernels.grouped_matmul.steps import dot
from effjax.kernels.grouped_matmul.visits import Visits
from effjax.kernels.quantized_matmul.lying import Lying
from effjax.kernels.quantized_matmul.tiles import known, like
from effjax.kernels.quantized_matmul.tpu import TYPES, VMEM, spread

LANES = 128
MOST = VMEM * 3 // 4  # bytes for what is known of a tile
FEW = (32, LANES)  # lines and codes of a matrix whose numbers are made at once
LINES, CODES = (128, 64, 32, 16, 8), (256, LANES)  # whose constants are spread at once


def fits(x: Array, w: Lying) -> bool:
  """Whether `products` can."""
  known_to_it = known(w.format, w.constants) and x.dtype in TYPES
  size = choose("tpu", x.dtype, 1, 1).products
  return known_to_it and _held(x, w, size, _columns(x, w, size)) <= MOST


def products(
  x: Float[Array, "M K"],
  w: Lying,
  group_sizes: Int[Array, "E"],
  *,
  size: Size | None = None,
  interpret: bool = False,
) -> Float[Array, "M N"]:
  """x[m] w[e] for the rows of each group e, in the type of x; 0 for rows past the last group.

  Args:
    size: of a tile; the table's when None.
    interpret: run on any device, to check the kernel.
  """
  (groups, lines, length), rows = w.codes.shape, len(x)
  size = size or choose("tpu", x.dtype, rows, groups).products
  height, step = _heights(rows, size)
  parts = (x,) if w.table else w.strands(x)
  outputs = length if w.table else lines
  columns = _columns(x, w, size)
  where = visits.of_rows(group_sizes, rows, height, True)
  shapes = (lines, columns) if w.table else (columns, length)
  as_it_is = not w.constants and w.codes.dtype == x.dtype

  def kernel(where, parts, codes, constants, out, *scratch):
    j, v = pl.program_id(0), pl.program_id(1)
    first, last, of = where.begin[v], where.end[v], where.group[v]
    before = where.group[jnp.maximum(v - 1, 0)]
    matrices = [codes]
    if not as_it_is:
      matrices = scratch[0]

      @pl.when((of < groups) & ((v == 0) | (before != of)))
      def _():
        _unpack(w, codes, constants, *scratch, j * columns if w.table else 0)

    top = where.tile[v] * height
    begin = lax.div(jnp.maximum(first - top, 0), step)
    end = pl.cdiv(jnp.minimum(last - top, height), step)

    def put(i, totals):
      here = pl.ds(pl.multiple_of(i * step, step), step)
      own = _between(top + i * step, step, first, last)
      for ref, total in zip(out, totals, strict=True):
        ref[here, :] = jnp.where(own, total.astype(ref.dtype), ref[here, :])

    @pl.when(of < groups)
    def _():
      @pl.loop(begin, end)
      def _(i):
        here = pl.ds(pl.multiple_of(i * step, step), step)
        if w.table:
          put(i, [dot(parts[0][here, :], m[...], (1, 0)) for m in matrices])
        else:
          pairs = zip(parts, matrices, strict=True)
          put(i, [sum(dot(part[here, :], m[...], (1, 1)) for part, m in pairs)])

    @pl.when(of == groups)
    def _():
      @pl.loop(begin, end)
      def _(i):
        put(i, [jnp.zeros((step, columns), jnp.float32)] * len(out))

  group = lambda v, where: jnp.minimum(where.group[v], groups - 1)
  at = lambda j: (0, j) if w.table else (j, 0)
  matrix = pl.BlockSpec((None, *shapes), lambda j, v, *s: (group(v, Visits(*s)), *at(j)))

  def constant(c):
    whole = (c.shape[1] == 1, c.shape[2] < length)
    shape = tuple(n if all_ else m for n, m, all_ in zip(c.shape[1:], shapes, whole, strict=True))
    place = lambda j: tuple(0 if all_ else n for n, all_ in zip(at(j), whole, strict=True))
    return pl.BlockSpec((None, *shape), lambda j, v, *s: (group(v, Visits(*s)), *place(j)))

  count = w.planes if w.table else 1
  result = pl.BlockSpec((height, columns), lambda j, v, *s: (Visits(*s).tile[v], j))
  found = _call(
    kernel,
    "grouped_products",
    (pl.cdiv(outputs, columns), where.visited[0]),
    [
      [pl.BlockSpec((height, p.shape[1]), lambda j, v, *s: (Visits(*s).tile[v], 0)) for p in parts],
      matrix,
      [constant(c) for c in w.constants],
    ],
    [[result] * count],
    [[like(x, (rows, outputs), interpret, x.dtype)] * count],
    [] if as_it_is else _room(w, x.dtype, shapes),
    interpret,
  )(where, list(parts), w.codes, list(w.constants))[0]
  return w.joined(found) if w.table else found[0]


def sums(
  x: Float[Array, "M A"],
  y: Float[Array, "M B"],
  group_sizes: Int[Array, "E"],
  dtype: DTypeLike,
  *,
  size: Size | None = None,
  interpret: bool = False,
) -> Float[Array, "E A B"]:
  """Σ x[m] y[m]ᵀ over the rows m of each group; arguments as of `products`."""
  (rows, lines), outputs = x.shape, y.shape[1]
  size = size or choose("tpu", x.dtype, rows, len(group_sizes)).sums
  height, _ = _heights(rows, size)
  a, b = _side(lines, size.rows), _side(outputs, size.columns)
  where = visits.of_groups(group_sizes, rows, height)

  def kernel(where, x, y, out, total):
    v = pl.program_id(2)
    first, last, of = where.begin[v], where.end[v], where.group[v]
    top, end = where.tile[v] * height, pl.num_programs(2) - 1

    @pl.when((v == 0) | (where.group[jnp.maximum(v - 1, 0)] != of))
    def _():
      total[...] = jnp.zeros(total.shape, total.dtype)

    whole = (first <= top) & (top + height <= last)

    @pl.when(whole)
    def _():
      total[...] += dot(x[...], y[...], (0, 0))

    @pl.when(~whole & (first < last))
    def _():
      own = _between(top, height, first, last)
      mine = lambda ref: jnp.where(own, ref[...], jnp.zeros((), ref.dtype))
      total[...] += dot(mine(x), mine(y), (0, 0))

    @pl.when((v == end) | (where.group[jnp.minimum(v + 1, end)] != of))
    def _():
      out[...] = total[...].astype(out.dtype)

  return _call(
    kernel,
    "grouped_sums",
    (pl.cdiv(lines, a), pl.cdiv(outputs, b), where.visited[0]),
    [
      pl.BlockSpec((height, a), lambda i, j, v, *s: (Visits(*s).tile[v], i)),
      pl.BlockSpec((height, b), lambda i, j, v, *s: (Visits(*s).tile[v], j)),
    ],
    pl.BlockSpec((None, a, b), lambda i, j, v, *s: (Visits(*s).group[v], i, j)),
    like(x, (len(group_sizes), lines, outputs), interpret, dtype),
    [pltpu.VMEM((a, b), jnp.float32)],
    interpret,
  )(where, x, y)


def _call(kernel, name, grid, in_specs, out_specs, out_shape, scratch, interpret):
  """Runs `kernel(visits, *operands, out, *scratch)`."""
  count = len(Visits._fields)
  spec = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=count,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    scratch_shapes=scratch,
  )
  call = pl.pallas_call(
    lambda *refs: kernel(Visits(*refs[:count]), *refs[count:]),
    grid_spec=spec,
    out_shape=out_shape,
    name=name,
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
    interpret=interpret,
  )
  return lambda where, *operands: call(*where, *operands)


def _between(top: Any, height: int, first: Any, last: Any) -> Bool[Array, "n 1"]:
  rows = top + lax.broadcasted_iota(jnp.int32, (height, 1), 0)
  return (rows >= first) & (rows < last)


def _heights(rows: int, size: Size) -> tuple[int, int]:
  """Rows of a tile, and how many of them are multiplied at once."""
  if rows <= size.step:
    return rows, rows
  return min(size.rows, pl.cdiv(rows, size.step) * size.step), size.step


def _side(length: int, most: int) -> int:
  """Of a tile: a multiple of lanes, or all of it."""
  return length if length <= LANES else min(most, pl.cdiv(length, LANES) * LANES)


def _columns(x: Array, w: Lying, size: Size) -> int:
  """Outputs of a tile, as many as there is room for."""
  columns = _side(w.codes.shape[2 if w.table else 1], size.columns)
  while _held(x, w, size, columns) > MOST and columns > LANES:
    columns = max(LANES, columns // 2 // LANES * LANES)
  return columns


def _held(x: Array, w: Lying, size: Size, columns: int) -> int:
  """Bytes of VMEM for operands, which are fetched ahead, numbers and results of tiles."""
  summed, width = w.codes.shape[1 if w.table else 2], x.dtype.itemsize
  unpacked = width * w.planes if w.constants or w.codes.dtype != x.dtype else 0
  matrix = (2 * w.codes.dtype.itemsize + unpacked) * summed * columns
  results = (2 * width + 4) * size.rows * columns * w.planes
  return 2 * width * summed * size.rows * w.planes + matrix + results


def _room(w: Lying, dtype: Any, shape: tuple[int, ...]) -> list[Any]:
  """Where numbers of a tile lie, and constants that are spread over its codes."""
  part = tuple(_part(n, sizes) for n, sizes in zip(shape, (LINES, CODES), strict=True))
  return [
    [pltpu.VMEM(shape, dtype)] * w.planes,
    [pltpu.VMEM(part, jnp.float32) for c in w.constants],
  ]


def _part(length: int, sizes: tuple[int, ...]) -> int:
  """The largest of the sizes that divides a length, or all of it."""
  return next((size for size in sizes if length % size == 0), length)


def _unpack(w: Lying, codes: Any, constants: Any, numbers: Any, room: Any, first: Any) -> None:
  """Numbers of a tile, whose codes are those from `first` on in their lines."""
  lines, length = (_part(n, sizes) for n, sizes in zip(codes.shape, (LINES, CODES), strict=True))
  few, lanes = _part(lines, FEW[:1]), _part(length, FEW[1:])

  @pl.loop(0, codes.shape[0] // lines)
  def _(i):
    @pl.loop(0, codes.shape[1] // length)
    def _(j):
      line, code = pl.multiple_of(i * lines, lines), pl.multiple_of(j * length, length)
      some = pl.ds(line, lines)
      for c, ref in zip(constants, room, strict=True):
        if _is_spread(w, c):
          run = w.codes.shape[2] // c.shape[1]
          ref[...] = spread(c[some, :].astype(jnp.float32), run, first + code, length)

      @pl.loop(0, lines // few)
      def _(n):
        for at in range(0, length, lanes):
          here = pl.ds(line + n * few, few), pl.ds(code + at, lanes)
          near = pl.ds(n * few, few), pl.ds(at, lanes)
          each = [_constant(w, *both, here, near) for both in zip(constants, room, strict=True)]
          for ref, plane in zip(numbers, w.format.planes(codes[here], *each), strict=True):
            ref[here] = plane.astype(ref.dtype)


def _is_spread(w: Lying, c: Any) -> bool:
  """Whether a line's block of codes has one of a constant."""
  return c.shape[1] > 1 and w.codes.shape[2] > c.shape[1] and c.shape[0] > 1


def _constant(w: Lying, c: Any, room: Any, here: Any, near: Any) -> Array:
  if _is_spread(w, c):
    return room[near]
  return c[here[0] if c.shape[0] > 1 else slice(None), here[1] if c.shape[1] > 1 else slice(None)]
