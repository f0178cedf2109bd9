"""Products of groups of rows with a matrix each on NVIDIA GPUs (Triton).

A program has a tile of rows of one group and a tile of outputs. It goes through what is summed in
steps: makes planes of the tile of the group's matrix, in the type of x, and multiplies; sums are
float32. Tiles begin where groups do, and one at the end of all rows is moved up into them: what is
read of another group's rows reaches results that are not stored. Where rows are summed, those of
other groups are not read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effjax.core.typing import Array, Bool, DTypeLike, Float, Int
from effjax.kernels.grouped_matmul import visits
from effjax.kernels.grouped_matmul.groups import spans
from effjax.kernels.grouped_matmul.sizes import Size, choose
from effjax.kernels.grouped_matmul.steps import dot
from effjax.kernels.quantized_matmul.lying import Lying
from effjax.kernels.quantized_matmul.tiles import known, like

LEAST = 16  # side of a product
BAND = 8  # tiles of rows that are worked on for the same outputs, one after another
TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class _Cut:
  """`size` places from `first` on, of which those before `limit` are there; None is all."""

  first: Any
  size: int
  limit: Any = None

  @classmethod
  def of(cls, number: Any, size: int, length: int) -> "_Cut":
    """That of a number among cuts of all the length."""
    return cls(number * size, size, length if length % size else None)

  @property
  def here(self) -> Any:
    """The slice."""
    return pl.ds(self.first, self.size)

  @property
  def places(self) -> Int[Array, "n"]:
    """Their numbers."""
    return self.first + lax.iota(jnp.int32, self.size)

  @property
  def there(self) -> Bool[Array, "n"] | None:
    """Which are there."""
    return None if self.limit is None else self.places < self.limit


def fits(x: Array, w: Lying) -> bool:
  """Whether `products` can: steps that are a power of two go into what constants are for."""
  length = w.codes.shape[2]
  runs = (length // c.shape[2] for c in w.constants if 1 < c.shape[2] < length)
  even = all(run % LEAST == 0 for run in runs)
  return known(w.format, w.constants) and x.dtype in TYPES and even and not length % w.format.size


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
  size = size or choose("gpu", x.dtype, rows, groups).products
  x = jnp.pad(x, ((0, max(0, size.rows - rows)), (0, 0)))
  parts = (x,) if w.table else w.strands(x)
  summed, outputs = (lines, length) if w.table else (length, lines)
  step, columns = _steps(w, size)
  where = visits.of_rows(group_sizes, rows, size.rows, False)
  bands = pl.cdiv(len(where.group), BAND)
  where = where.padded(bands * BAND)

  def kernel(parts, codes, constants, group, begin, end, *out):
    n = pl.program_id(2) * BAND + pl.program_id(0)
    first, last, of = begin[n], end[n], group[n]
    here = _Cut(jnp.minimum(first, len(x) - size.rows), size.rows)
    tile = _Cut.of(pl.program_id(1), columns, outputs)
    inside = (of < groups).astype(jnp.int32)

    def add(i, totals, limit=None):
      some = _Cut(i * step, step, limit)
      at = (some, tile) if w.table else (tile, some)
      planes = _planes(w, codes, constants, jnp.minimum(of, groups - 1), *at)
      given = [_load(part, (), here, some) for part in parts]
      if w.table:
        pairs = zip(totals, planes, strict=True)
        return [total + dot(given[0], plane.astype(x.dtype), (1, 0)) for total, plane in pairs]
      for part, plane in zip(given, planes, strict=True):
        totals = [totals[0] + dot(part, plane.astype(x.dtype), (1, 1))]
      return totals

    @pl.when(first < last)
    def _():
      totals = [jnp.zeros((size.rows, columns), jnp.float32) for _ in out]
      whole = summed // step
      totals = lax.fori_loop(0, whole * inside, add, totals)
      if summed % step:
        rest = lambda i, totals: add(i, totals, summed * inside)
        totals = lax.fori_loop(whole, whole + 1, rest, totals)
      own = (here.places >= first) & (here.places < last)
      for ref, total in zip(out, totals, strict=True):
        _store(ref.at[here.here, tile.here], total, own, tile.there)

  count = w.planes if w.table else 1
  found = _call(
    kernel,
    "grouped_products",
    (BAND, pl.cdiv(outputs, columns), bands),
    size,
    [like(x, (len(x), outputs), interpret, x.dtype)] * count,
    interpret,
  )(parts, w.codes, w.constants, where.group, where.begin, where.end)
  return w.joined(found)[:rows] if w.table else found[0][:rows]


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
  size = size or choose("gpu", x.dtype, rows, len(group_sizes)).sums
  spare = ((0, max(0, size.step - rows)), (0, 0))
  x, y = jnp.pad(x, spare), jnp.pad(y, spare)

  def kernel(x, y, begins, ends, out):
    e = pl.program_id(2)
    begin, end = begins[e], ends[e]
    a = _Cut.of(pl.program_id(0), size.rows, lines)
    b = _Cut.of(pl.program_id(1), size.columns, outputs)

    def add(i, total, masked=False):
      first = begin + i * size.step
      here = _Cut(first, size.step)
      own = None
      if masked:
        here = _Cut(jnp.minimum(first, x.shape[0] - size.step), size.step)
        own = (here.places >= first) & (here.places < end)
      return total + dot(_load(x, (), here, a, own), _load(y, (), here, b, own), (0, 0))

    whole = lax.div(end - begin, size.step)
    total = jnp.zeros((size.rows, size.columns), jnp.float32)
    total = lax.fori_loop(0, whole, add, total)
    rest = pl.cdiv(end - begin, size.step)
    total = lax.fori_loop(whole, rest, lambda i, total: add(i, total, True), total)
    _store(out.at[e, a.here, b.here], total, a.there, b.there)

  shape = like(x, (len(group_sizes), lines, outputs), interpret, dtype)
  grid = pl.cdiv(lines, size.rows), pl.cdiv(outputs, size.columns), len(group_sizes)
  run = _call(kernel, "grouped_sums", grid, size, shape, interpret)
  return run(x, y, *spans(group_sizes.astype(jnp.int32), rows))


def _steps(w: Lying, size: Size) -> tuple[int, int]:
  """What is summed at once and outputs of a tile, in each plane: within a constant's codes."""
  runs = [w.codes.shape[2] // c.shape[2] for c in w.constants if c.shape[2] > 1]
  most = min((run & -run for run in runs if run > 1), default=size.columns)
  columns = max(LEAST, size.columns // w.planes)
  return (size.step, min(columns, most)) if w.table else (min(size.step, most), columns)


def _planes(w: Lying, codes: Any, constants: Any, e: Any, a: _Cut, b: _Cut) -> Any:
  """Those of lines `a` and codes `b` of matrix e."""
  length = codes.shape[2]

  def constant(c):
    lines = a if c.shape[1] > 1 else _Cut(0, 1)
    run = length // c.shape[2]
    return _load(c, (e,), lines, b if run == 1 else _Cut(lax.div(b.first, run), 1))

  tile = _load(codes, (e,), a, b)
  return w.format.planes(tile, *map(constant, constants))


def _load(ref: Any, at: tuple, a: _Cut, b: _Cut, own: Array | None = None) -> Array:
  """Of lines and columns those that are there, 0 elsewhere; `own` says which lines besides."""
  there = _both(a.there if own is None else own, b.there)
  other = None if there is None else 0
  return plgpu.load(ref.at[*at, a.here, b.here], mask=there, other=other)


def _store(ref: Any, value: Array, a: Array | None, b: Array | None) -> None:
  plgpu.store(ref, value.astype(ref.dtype), mask=_both(a, b))


def _both(a: Array | None, b: Array | None) -> Array | None:
  if a is None or b is None:
    return a[:, None] if a is not None else b if b is None else b[None]
  return a[:, None] & b[None]


def _call(
  kernel: Any, name: str, grid: tuple[int, ...], size: Size, out: Any, interpret: bool
) -> Callable[..., Any]:
  whole = lambda like: pl.BlockSpec(like.shape, lambda *_: (0,) * len(like.shape))

  def run(*operands):
    return pl.pallas_call(
      kernel,
      grid=grid,
      in_specs=list(jax.tree.map(whole, operands)),
      out_specs=jax.tree.map(whole, out),
      out_shape=out,
      name=name,
      compiler_params=plgpu.CompilerParams(num_warps=size.warps, num_stages=size.stages),
      interpret=interpret,
    )(*operands)

  return run
