"""NF4 and FP4: blocks of weights as the nearest of 16 numbers, times the block's largest magnitude.

NF4's are quantiles of a normal distribution (Dettmers et al., "QLoRA", arXiv 2305.14314, section
3); FP4's have one sign, two exponent and one mantissa bit. Both are bitsandbytes' to the bit, and
lie as its own do: W[out, in] row by row, two codes to a byte, the first in the high half.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.register import register
from effjax.core.typing import Array, Float, Integer, Num, PyTree, Size
from effjax.kernels.quantized_matmul import FLOATS, NORMAL, Nibbles
from effjax.quant.basics import check_scales
from effjax.quant.dynamic8 import Dynamic8
from effjax.quant.nearest import nearest
from effjax.quant.packed import Packed, lying


@dataclasses.dataclass(frozen=True, repr=False)
class FourBit(Packed):
  """M[o, i] = table[code[o, i]] · scale[o, i // block], scale = max |M| of the block.

  Half a byte a weight, and a scale for each block: 0.5 bit a weight in float32 at blocks of 64, or
  0.127 as a `Dynamic8`, which is double quantisation (arXiv 2305.14314, section 3).

  Invariants:
    codes: uint8 [..., O, I / 2].
    scale: [..., O, I / block], an array or a `Weight`.
    block: an even number of consecutive inputs.
  """

  codebook: ClassVar[tuple[float, ...]]
  scale: PyTree
  block: int = dataclasses.field(default=64, kw_only=True)

  @property
  def format(self) -> Nibbles:
    return Nibbles(self.codebook, self.block)

  @classmethod
  def quantize(
    cls,
    w: Num[Array | np.ndarray, "... D F"],
    *,
    block: Size = 64,
    double: bool = False,
    table: bool = False,
  ):
    """The nearest one of `w`; of two numbers that are as near, the lower.

    Args:
      w: matrices [..., D, F], inputs by outputs.
      block: consecutive inputs that share a scale, an even number of them.
      double: whether the scales are quantised too.
      table: whether w is a table of rows [..., V, D], whose blocks run along D.

    Raises:
      ValueError: for a block that is odd or does not divide the inputs; when `w` is not a
        floating-point matrix, or holds NaN or infinity, where values are known.

    Example:
      >>> w = NF4.quantize(jnp.array([[2.0], [0.5], [-1.0], [0.0]]), block=2)
      >>> [hex(code) for code in w.codes.ravel()], w.scale.tolist()
      (['0xfa', '0x7'], [[2.0, 1.0]])
      >>> w.materialize().round(3).ravel().tolist()
      [2.0, 0.492..., -1.0, 0.0]
    """
    if block % 2:
      raise ValueError(f"block {block}; allowed: even numbers, as two codes share a byte")
    codes, scale = _encode(lying(w, table, "block", block), block=block, codebook=cls.codebook)
    check_scales(scale)
    constants = Dynamic8.quantize(scale) if double else scale
    return cls(codes, constants, block=block, dtype=jax.typeof(w).dtype, table=table)


@register(static=("block",), kind="quantised")
class NF4(FourBit):
  """4-bit NormalFloat: the numbers are quantiles of a normal distribution; see `FourBit`."""

  codebook = NORMAL


@register(static=("block",), kind="quantised")
class FP4(FourBit):
  """4-bit floating point, in the order of its bits: 0 has two codes, of either sign."""

  codebook = FLOATS


@functools.partial(jax.jit, static_argnames=("block", "codebook"))
def _encode(
  m: Float[Array, "... O I"], *, block: Size, codebook: tuple[float, ...]
) -> tuple[Integer[Array, "... O N"], Float[Array, "... O n"]]:
  """Codes, two to a byte, and the largest magnitude of each block."""
  blocks = m.astype(jnp.float32).reshape(*m.shape[:-1], m.shape[-1] // block, block)
  scale = jnp.abs(blocks).max(-1, initial=0)
  tiny = jnp.finfo(jnp.float32).tiny
  shares = jnp.clip(blocks * (1 / jnp.maximum(scale, tiny))[..., None], -1, 1)
  order = np.argsort(codebook, kind="stable")
  index = nearest(shares, np.asarray(codebook, np.float32)[order])
  codes = index if (order == np.arange(16)).all() else jnp.asarray(order)[index]
  return Nibbles(codebook, block).pack(codes.reshape(m.shape)), scale
