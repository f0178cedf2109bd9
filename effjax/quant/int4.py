"""Four-bit integers with a scale, and perhaps a zero point, for each group of inputs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.register import register
from effjax.core.typing import Array, DTypeLike, Num, PyTree, Size
from effjax.kernels.quantized_matmul import Nibbles
from effjax.quant import basics
from effjax.quant.packed import Packed, lying

SIGNED, UNSIGNED = tuple(range(-8, 8)), tuple(range(16))


@register(static=("group",), kind="quantised")
class Int4(Packed):
  """M[o, i] = (code[o, i] − 8) · scale[o, i // group], |code − 8| ≤ 7; error at most scale / 2.

  Two codes to a byte, the first in the high half: 4 bits a weight, and 32 / group for the scales.

  Invariants:
    codes: uint8 [..., O, I / 2].
    scale: [..., O, I / group].
    group: an even number of consecutive inputs.
  """

  scale: PyTree
  group: int = dataclasses.field(default=64, kw_only=True)

  @property
  def format(self) -> Nibbles:
    return Nibbles(SIGNED, self.group)

  @classmethod
  def quantize(
    cls,
    w: Num[Array | np.ndarray, "... D F"],
    *,
    group: Size = 64,
    symmetric: bool = True,
    scale_dtype: DTypeLike = jnp.float32,
    table: bool = False,
  ) -> "Int4":
    """The nearest one of `w`, an `Int4Affine` where it is not `symmetric`.

    Args:
      w: matrices [..., D, F], inputs by outputs.
      group: consecutive inputs that share a scale, an even number of them.
      symmetric: whether zero is in the middle of the range; else it is where the group's values
        want it, at the cost of a byte a group.
      scale_dtype: type of the scales, 16-bit ones at the cost that `basics.symmetric` says.
      table: whether w is a table of rows [..., V, D], whose groups run along D.

    Raises:
      ValueError: for a group that is odd or does not divide the inputs; when `w` is not a
        floating-point matrix, or holds NaN, infinity or magnitudes that `scale_dtype` has no
        scale for, where values are known.

    Example:
      >>> w = jnp.array([[1.0], [-7.0], [2.0], [3.5]])
      >>> Int4.quantize(w, group=2).materialize().round(1).ravel().tolist()
      [1.0, -7.0, 2.0, 3.5]
    """
    if group % 2:
      raise ValueError(f"group {group}; allowed: even numbers, as two codes share a byte")
    m = jnp.matrix_transpose(lying(w, table, "group", group))
    quantise = basics.symmetric if symmetric else basics.affine
    options: Any = {"bits": 4, "granularity": "group", "group": group, "scale_dtype": scale_dtype}
    q, *constants = quantise(m, **options)
    basics.check_scales(constants[0])
    format = Nibbles(SIGNED if symmetric else UNSIGNED, group)
    codes = format.pack(jnp.matrix_transpose(q + 8 if symmetric else q))
    scale, *zero = map(jnp.matrix_transpose, constants)
    fields: Any = {"group": group, "dtype": jax.typeof(w).dtype, "table": table}
    if symmetric:
      return Int4(codes, scale, **fields)
    return Int4Affine(codes, scale, zero[0].astype(jnp.uint8), **fields)


@register(kind="quantised")
class Int4Affine(Int4):
  """M[o, i] = (code[o, i] − zero[o, i // group]) · scale[o, i // group]; 0 is exact.

  Invariants: as `Int4`, and
    zero: uint8 [..., O, I / group], 0 … 15.
  """

  zero: PyTree

  @property
  def format(self) -> Nibbles:
    return Nibbles(UNSIGNED, self.group)

  @classmethod
  def quantize(cls, w: Num[Array | np.ndarray, "... D F"], **options: Any) -> Int4:
    """`Int4.quantize` with zero points."""
    return Int4.quantize(w, **{"symmetric": False, **options})
