"""x Mᵀ and x M for a packed matrix on TPUs: codes become numbers in VMEM (Mosaic).

A program has a tile of rows of x and one of outputs, whose codes it goes through in steps. What a
block has one of is spread over its codes by a product with zeros and ones, which is exact. The
numbers of a step are made a few outputs at a time, so that what comes about on the way stays in
registers, and are multiplied together.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.core.typing import Array, Float, Integer
from effjax.kernels.quantized_matmul.formats import Format
from effjax.kernels.quantized_matmul.tiles import dot, known, like

ROWS = 256  # of a tile, at most
OUTPUTS = 128  # of a tile, and the least codes of a row
STEP = 256  # codes of a row that are multiplied at once
FEW = (32, 128)  # outputs and codes of a row whose numbers are made at once
VMEM = 96 << 20  # bytes that a kernel may have
TYPES = (jnp.float32, jnp.bfloat16)


def fits(x: Array, format: Format, codes: Array, constants: Sequence[Any]) -> bool:
  """Whether `outputs` and `inputs` can."""
  return known(format, constants) and x.dtype in TYPES and codes.shape[1] >= OUTPUTS


def outputs(
  x: Float[Array, "M I"],
  format: Format,
  codes: Integer[Array, "O N"],
  constants: Sequence[Array],
  *,
  interpret: bool = False,
) -> Float[Array, "M O"]:
  """x Mᵀ in float32; `interpret` runs on any device, to check the kernel."""
  (count, length), rows = codes.shape, _height(x)
  blocks = x.reshape(len(x), -1, format.block)
  strands = tuple(s.reshape(len(x), -1) for s in format.strands(blocks))

  def kernel(strands, codes, constants, out, numbers, room):
    out[...] = jnp.zeros(out.shape, out.dtype)
    for here in _parts(0, length, STEP):
      planes = _planes(format, codes, constants, here, numbers, room)
      for strand, plane in zip(strands, planes, strict=True):
        out[...] += dot(strand[:, here], plane, (1, 1))

  return pl.pallas_call(
    kernel,
    grid=(pl.cdiv(len(x), rows), pl.cdiv(count, OUTPUTS)),
    in_specs=[
      tuple(pl.BlockSpec((rows, length), lambda i, j: (i, 0)) for _ in strands),
      pl.BlockSpec((OUTPUTS, length), lambda i, j: (j, 0)),
      tuple(pl.BlockSpec((OUTPUTS, c.shape[1]), lambda i, j: (j, 0)) for c in constants),
    ],
    out_specs=pl.BlockSpec((rows, OUTPUTS), lambda i, j: (i, j)),
    out_shape=like(x, (len(x), count), interpret),
    scratch_shapes=_scratch(x, len(strands), constants),
    name="quantized_outputs",
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
    interpret=interpret,
  )(strands, codes, tuple(constants))


def inputs(
  x: Float[Array, "M O"],
  format: Format,
  codes: Integer[Array, "O N"],
  constants: Sequence[Array],
  *,
  interpret: bool = False,
) -> Float[Array, "M I"]:
  """x M in float32; `interpret` as for `outputs`."""
  (count, length), rows = codes.shape, _height(x)
  x = jnp.pad(x, ((0, 0), (0, -count % OUTPUTS)))
  parts = len(format.strands(jnp.zeros(format.block)))

  def kernel(x, codes, constants, out, numbers, room):
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
      for ref in out:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)

    for here in _parts(0, length, STEP):
      planes = _planes(format, codes, constants, here, numbers, room, count - j * OUTPUTS)
      for ref, plane in zip(out, planes, strict=True):
        ref[:, here] += dot(x[...], plane, (1, 0))

  found = pl.pallas_call(
    kernel,
    grid=(pl.cdiv(len(x), rows), pl.cdiv(count, OUTPUTS)),
    in_specs=[
      pl.BlockSpec((rows, OUTPUTS), lambda i, j: (i, j)),
      pl.BlockSpec((OUTPUTS, length), lambda i, j: (j, 0)),
      tuple(pl.BlockSpec((OUTPUTS, c.shape[1]), lambda i, j: (j, 0)) for c in constants),
    ],
    out_specs=[[pl.BlockSpec((rows, length), lambda i, j: (i, 0))] * parts],
    out_shape=[[like(x, (len(x), length), interpret)] * parts],
    scratch_shapes=_scratch(x, parts, constants),
    name="quantized_inputs",
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
    interpret=interpret,
  )(x, codes, tuple(constants))[0]
  blocks = [f.reshape(len(x), length // format.size, format.size) for f in found]
  return format.join(blocks).reshape(len(x), -1)


def _parts(start: int, stop: int, size: int) -> list[slice]:
  """start … stop in parts of at most `size`."""
  return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _scratch(x: Array, parts: int, constants: Sequence[Array]) -> list[list[Any]]:
  """Where the numbers of a step and its spread constants lie."""
  room = lambda count, dtype: [pltpu.VMEM((OUTPUTS, STEP), dtype)] * count
  return [room(parts, x.dtype), room(len(constants), jnp.float32)]


def _planes(format, codes, constants, here, numbers, room, outputs=None):
  """Numbers of those codes of a tile, 0 from some output on; most come about in `numbers`."""
  if not constants:
    planes = format.planes(codes[:, here])
    return [
      _until(outputs, 0, plane).astype(ref.dtype)
      for ref, plane in zip(numbers, planes, strict=True)
    ]
  width = here.stop - here.start
  for ref, c in zip(room, constants, strict=True):
    ref[:, :width] = spread(c[...].astype(jnp.float32), format.size, here.start, width)
  for part in _parts(here.start, here.stop, FEW[1]):
    place = slice(part.start - here.start, part.stop - here.start)

    @pl.loop(0, OUTPUTS, step=FEW[0])
    def _(first, part=part, place=place):
      some = pl.ds(first, FEW[0])
      planes = format.planes(codes[some, part], *(ref[some, place] for ref in room))
      for ref, plane in zip(numbers, planes, strict=True):
        ref[some, place] = _until(outputs, first, plane).astype(ref.dtype)

  return [ref[:, :width] for ref in numbers]


def _until(outputs: Any, first: Any, plane: Float[Array, "O n"]) -> Float[Array, "O n"]:
  """Zeros from output `outputs` on, `first` being that of the first row; None is none."""
  if outputs is None:
    return plane
  output = first + lax.broadcasted_iota(jnp.int32, (len(plane), 1), 0)
  return jnp.where(output < outputs, plane, 0.0)


def spread(c: Float[Array, "O n"], size: int, first: Any, width: int) -> Float[Array, "O {width}"]:
  """What each code of a line from `first` on has of what a block of `size` has one of.

  Three numbers of 8 bits sum to one of c: one pass of the matrix unit multiplies them with ones.
  """
  thirds, rest = [], c
  for _ in range(3):
    thirds.append(rest.astype(jnp.bfloat16))
    rest -= thirds[-1].astype(jnp.float32)
  block = lax.broadcasted_iota(jnp.int32, (3 * c.shape[1], width), 0)
  code = first + lax.broadcasted_iota(jnp.int32, block.shape, 1)
  of = lax.div(code, jnp.int32(size)) == lax.rem(block, jnp.int32(c.shape[1]))
  return dot(jnp.concatenate(thirds, 1), of.astype(jnp.bfloat16), (1, 0))


def _height(x: Array) -> int:
  """Rows of a tile: a multiple of 16, or all of them."""
  return min(ROWS, len(x))
