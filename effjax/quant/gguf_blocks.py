"""Matrices in the blocks of GGUF files, as they are in the file."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.register import register
from effjax.core.typing import Array, Float, Integer, Num, Size
from effjax.kernels.quantized_matmul.gguf_blocks import SIZES, Blocks
from effjax.quant.basics import check_scales
from effjax.quant.packed import Packed, lying

MADE = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # whose numbers are not searched for


@register(static=("type",), kind="quantised")
class GGUF(Packed):
  """M in blocks of 32 or 256 inputs that hold their codes and constants; bytes are the file's.

  Invariants:
    codes: uint8 [..., O, n · bytes of a block].
    type: "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K" or "Q6_K", which
      `kernels.quantized_matmul.gguf_blocks` defines.
  """

  type: str = dataclasses.field(default="Q8_0", kw_only=True)

  @property
  def format(self) -> Blocks:
    if self.type not in SIZES:
      raise ValueError(f"GGUF: type {self.type!r}; allowed: {', '.join(SIZES)}")
    return Blocks(self.type)

  @classmethod
  def quantize(
    cls, w: Num[Array | np.ndarray, "... D F"], *, type: str = "Q8_0", table: bool = False
  ) -> "GGUF":
    """The one of `w` that the gguf package makes.

    Args:
      w: matrices [..., D, F], inputs by outputs.
      type: "Q8_0", "Q4_0", "Q4_1", "Q5_0" or "Q5_1"; the others come from files alone.
      table: whether w is a table of rows [..., V, D], whose blocks run along D.

    Raises:
      ValueError: for another type, and when 32 does not divide the inputs; when `w` is not a
        floating-point matrix, or holds NaN, infinity, or what float16 has no scale for, where
        values are known.

    Example:
      >>> w = GGUF.quantize(jnp.ones((64, 8)))
      >>> w.codes.shape, float(w.materialize()[0, 0].round(3))
      ((8, 68), 1.0)
    """
    if type not in MADE:
      raise ValueError(f"type {type!r}; allowed: {', '.join(MADE)}")
    codes, scale = _encode(lying(w, table, "block", SIZES[type][0]), type=type)
    check_scales(scale)
    return cls(codes, type=type, dtype=jax.typeof(w).dtype, table=table)


@functools.partial(jax.jit, static_argnames="type")
def _encode(
  m: Float[Array, "... O I"], *, type: str
) -> tuple[Integer[Array, "... O N"], Float[Array, "... O n"]]:
  """Bytes of the blocks, and their scales."""
  block, size = SIZES[type]
  blocks = m.astype(jnp.float32).reshape(*m.shape[:-1], m.shape[-1] // block, block)
  parts = (_q8_0 if type == "Q8_0" else _q45)(blocks, bits=int(type[1]), moved=type[3] == "1")
  held = jnp.concatenate([_bytes(part) for part in parts], -1)
  return held.reshape(*m.shape[:-1], m.shape[-1] // block * size), parts[0][..., 0]


def _q8_0(blocks: Array, bits: Size, moved: bool) -> list[Array]:
  d = jnp.abs(blocks).max(-1, keepdims=True) / 127
  steps = blocks * _inverse(d)
  away = jnp.sign(steps) * jnp.floor(jnp.abs(steps) + 0.5)
  return [d.astype(jnp.float16), away.astype(jnp.int8)]


def _q45(blocks: Array, bits: Size, moved: bool) -> list[Array]:
  """Q4_0, Q4_1, Q5_0 and Q5_1: the largest magnitude, or both ends, are numbers of the block."""
  least, top = blocks.min(-1, keepdims=True), 2**bits - 1
  if moved:
    d, constants = (blocks.max(-1, keepdims=True) - least) / top, [least]
    steps = (blocks - least) * _inverse(d) + 0.5
  else:
    at = jnp.abs(blocks).argmax(-1, keepdims=True)
    d, constants = jnp.take_along_axis(blocks, at, -1) / -(2 ** (bits - 1)), []
    steps = blocks * _inverse(d) + (2 ** (bits - 1) + 0.5)
  codes = jnp.clip(jnp.trunc(steps), 0, top).astype(jnp.uint8)
  low, high = jnp.split(codes & 15, 2, -1)
  fifths = [jnp.packbits(codes >> 4, -1, bitorder="little")] if bits == 5 else []
  return [*(c.astype(jnp.float16) for c in (d, *constants)), *fifths, low | high << 4]


def _inverse(d: Array) -> Array:
  return jnp.where(d == 0, 0, 1 / jnp.where(d == 0, 1, d))


def _bytes(x: Array) -> Array:
  if x.dtype == jnp.float16:
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], 2 * x.shape[-1])
  return jax.lax.bitcast_convert_type(x, jnp.uint8)
