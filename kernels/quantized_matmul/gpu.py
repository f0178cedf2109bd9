"""x Mᵀ and x M for a packed matrix on NVIDIA GPUs: codes become numbers in registers (Triton).

A program has a tile of rows of x, and a tile of outputs or one block of inputs. It goes through the
other one: loads codes, makes planes of them in the type of x, and multiplies; sums are float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from effjax.core.typing import Array, Float, Integer
from effjax.kernels.quantized_matmul.formats import Format
from effjax.kernels.quantized_matmul.tiles import dot, known, like

ROWS, OUTPUTS = 64, 64  # of a tile, at most
LEAST = 16  # side of a product
TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def fits(x: Array, format: Format, codes: Array, constants: Sequence[Any]) -> bool:
  """Whether `outputs` and `inputs` can: codes of a block, as long as a power of two, in one run."""
  size = format.size
  runs = size >= LEAST and size & (size - 1) == 0
  return known(format, constants) and runs and x.dtype in TYPES and len(codes) >= LEAST


def outputs(
  x: Float[Array, "M I"],
  format: Format,
  codes: Integer[Array, "O N"],
  constants: Sequence[Array],
  *,
  interpret: bool = False,
) -> Float[Array, "M O"]:
  """x Mᵀ in float32; `interpret` runs on any device, to check the kernel."""
  n = codes.shape[1] // format.size
  strands, rows = _strands(x, format, n), len(x)
  tile = min(OUTPUTS, _power(len(codes)))

  def kernel(strands, codes, constants, out):
    first = jnp.minimum(pl.program_id(1) * tile, out.shape[1] - tile)
    here = pl.ds(first, tile)

    def block(b, total):
      planes = _planes(format, codes, constants, here, b)
      for strand, plane in zip(strands, planes, strict=True):
        width = plane.shape[1]
        part = plgpu.load(strand.at[:, pl.ds(b * width, width)])
        total += dot(part, plane.astype(part.dtype), (1, 1))
      return total

    zeros = jnp.zeros((strands[0].shape[0], tile), jnp.float32)
    plgpu.store(out.at[:, here], lax.fori_loop(0, n, block, zeros))

  shape = like(x, (len(strands[0]), len(codes)), interpret)
  grid = len(strands[0]) // _height(rows), pl.cdiv(len(codes), tile)
  run = _call(kernel, "quantized_outputs", grid, _height(rows), shape, interpret)
  return run(strands, codes, tuple(constants))[:rows]


def inputs(
  x: Float[Array, "M O"],
  format: Format,
  codes: Integer[Array, "O N"],
  constants: Sequence[Array],
  *,
  interpret: bool = False,
) -> Float[Array, "M I"]:
  """x M in float32; `interpret` as for `outputs`."""
  n = codes.shape[1] // format.size
  rows, tile = len(x), min(OUTPUTS, _power(len(codes)))
  x = _padded(x)
  widths = [s.shape[0] for s in format.strands(jnp.zeros(format.block))]

  def kernel(x, codes, constants, *out):
    b, last = pl.program_id(1), len(codes) - tile

    def some(i, totals):
      first = jnp.minimum(i * tile, last)
      part = plgpu.load(x.at[:, pl.ds(first, tile)])
      new = first + lax.broadcasted_iota(jnp.int32, part.shape, 1) >= i * tile
      part = jnp.where(new, part, jnp.zeros_like(part))
      planes = _planes(format, codes, constants, pl.ds(first, tile), b)
      pairs = zip(totals, planes, strict=True)
      return [total + dot(part, plane.astype(part.dtype), (1, 0)) for total, plane in pairs]

    zeros = [jnp.zeros((x.shape[0], width), jnp.float32) for width in widths]
    found = lax.fori_loop(0, pl.cdiv(len(codes), tile), some, zeros)
    for ref, value in zip(out, found, strict=True):
      plgpu.store(ref.at[:, pl.ds(b * value.shape[1], value.shape[1])], value)

  shapes = [like(x, (len(x), n * width), interpret) for width in widths]
  run = _call(
    kernel, "quantized_inputs", (len(x) // _height(rows), n), _height(rows), shapes, interpret
  )
  found = run(x, codes, tuple(constants))
  blocks = [f.reshape(len(x), n, -1) for f in found]
  return format.join(blocks).reshape(len(x), -1)[:rows]


def _planes(format, codes, constants, here, b):
  """Those of some outputs and block b."""
  tile = plgpu.load(codes.at[here, pl.ds(b * format.size, format.size)])
  return format.planes(tile, *(plgpu.load(c.at[here, b])[:, None] for c in constants))


def _strands(x, format, n):
  blocks = _padded(x).reshape(-1, n, format.block)
  return tuple(s.reshape(len(s), -1) for s in format.strands(blocks))


def _padded(x):
  return jnp.pad(x, ((0, -len(x) % _height(len(x))), (0, 0)))


def _height(rows: int) -> int:
  return min(ROWS, max(LEAST, pl.next_power_of_2(rows)))


def _power(length: int) -> int:
  """The largest power of two of at most `length`."""
  return 1 << (length.bit_length() - 1)


def _call(kernel, name, grid, height, out, interpret):
  """Of each operand with rows of x a program has `height` rows, of the others all."""

  def run(x, codes, constants):
    rows = lambda like: pl.BlockSpec((height, like.shape[1]), lambda i, j: (i, 0))
    whole = lambda like: pl.BlockSpec(like.shape, lambda i, j: (0, 0))
    specs = jax.tree.map(rows, x), whole(codes), jax.tree.map(whole, constants)
    return pl.pallas_call(
      kernel,
      grid=grid,
      in_specs=list(specs),
      out_specs=jax.tree.map(rows, out),
      out_shape=out,
      name=name,
      compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
      interpret=interpret,
    )(x, codes, constants)

  return run
