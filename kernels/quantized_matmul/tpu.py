"""x Mᵀ and x M for a packed matrix on TPUs: codes become numbers in VMEM (Mosaic).

A program has a tile of rows of x and a tile of outputs with all their codes. What a block has one
of is spread over its codes by a product with zeros and ones, which is exact in float32.
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
LANES = 128  # outputs of a tile are a multiple of it
CODES = 1 << 18  # of a tile, unless its least outputs have more
VMEM = 96 << 20  # bytes that a kernel may have
TYPES = (jnp.float32, jnp.bfloat16)


def fits(x: Array, format: Format, codes: Array, constants: Sequence[Any]) -> bool:
  """Whether `outputs` and `inputs` can."""
  return known(format, constants) and x.dtype in TYPES and codes.shape[1] >= LANES


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
  tile = _tile(codes)
  blocks = x.reshape(len(x), -1, format.block)
  strands = tuple(s.reshape(len(x), -1) for s in format.strands(blocks))

  def kernel(strands, codes, constants, out):
    planes = _planes(format, codes, constants)
    pairs = zip(strands, planes, strict=True)
    out[...] = sum(dot(strand[...], plane.astype(strand.dtype), (1, 1)) for strand, plane in pairs)

  return pl.pallas_call(
    kernel,
    grid=(pl.cdiv(len(x), rows), pl.cdiv(count, tile)),
    in_specs=[
      tuple(pl.BlockSpec((rows, length), lambda i, j: (i, 0)) for _ in strands),
      pl.BlockSpec((tile, length), lambda i, j: (j, 0)),
      tuple(pl.BlockSpec((tile, c.shape[1]), lambda i, j: (j, 0)) for c in constants),
    ],
    out_specs=pl.BlockSpec((rows, tile), lambda i, j: (i, j)),
    out_shape=like(x, (len(x), count), interpret),
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
  tile = _tile(codes)
  x = jnp.pad(x, ((0, 0), (0, -count % tile)))
  parts = len(format.strands(jnp.zeros(format.block)))

  def kernel(x, codes, constants, *out):
    j = pl.program_id(1)
    there = j * tile + lax.broadcasted_iota(jnp.int32, (tile, length), 0) < count
    for ref, plane in zip(out, _planes(format, codes, constants), strict=True):
      found = dot(x[...], jnp.where(there, plane, 0.0).astype(x.dtype), (1, 0))
      ref[...] = found + jnp.where(j == 0, 0.0, ref[...])

  found = pl.pallas_call(
    kernel,
    grid=(pl.cdiv(len(x), rows), pl.cdiv(count, tile)),
    in_specs=[
      pl.BlockSpec((rows, tile), lambda i, j: (i, j)),
      pl.BlockSpec((tile, length), lambda i, j: (j, 0)),
      tuple(pl.BlockSpec((tile, c.shape[1]), lambda i, j: (j, 0)) for c in constants),
    ],
    out_specs=[pl.BlockSpec((rows, length), lambda i, j: (i, 0))] * parts,
    out_shape=[like(x, (len(x), length), interpret)] * parts,
    name="quantized_inputs",
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
    interpret=interpret,
  )(x, codes, tuple(constants))
  blocks = [f.reshape(len(x), length // format.size, format.size) for f in found]
  return format.join(blocks).reshape(len(x), -1)


def _planes(format, codes, constants):
  """Numbers [tile, N] of a tile of codes."""
  length = codes.shape[1]

  def spread(c):
    shape = c.shape[1], length
    block = lax.broadcasted_iota(jnp.int32, shape, 0)
    of = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), jnp.int32(format.size)) == block
    return dot(c[...].astype(jnp.float32), of.astype(jnp.float32), (1, 0))

  return format.planes(codes[...], *map(spread, constants))


def _height(x: Array) -> int:
  """Rows of a tile: a multiple of 16, or all of them."""
  return min(ROWS, len(x))


def _tile(codes: Array) -> int:
  """Outputs of a tile."""
  most = max(LANES, CODES // codes.shape[1] // LANES * LANES)
  return min(most, -(-len(codes) // LANES) * LANES)
