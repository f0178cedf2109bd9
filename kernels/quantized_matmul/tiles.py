"""What kernels for GPUs and for TPUs have in common.

Each has `outputs`, x Mᵀ, and `inputs`, x M, of rows x [M, …] and operands of `Format.unpack`,
both float32, and `fits`, which says whether it can.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core.typing import Array, DTypeLike, Float
from effjax.core.weights import Weight
from effjax.kernels.quantized_matmul.formats import Format, Integers, Nibbles, Numbers


def known(format: Format, constants: Sequence[Any]) -> bool:
  """Whether a tile of codes becomes planes of their shape, with numbers for constants."""
  arrays = not any(isinstance(c, Weight) for c in constants)
  return arrays and isinstance(format, Nibbles | Integers | Numbers)


def dot(x: Float[Array, "A B"], y: Float[Array, "C D"], axes: tuple[int, int]) -> Array:
  """The product over an axis of each, in float32."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  dims = (((axes[0],), (axes[1],)), ((), ()))
  return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def like(
  x: Array, shape: tuple[int, ...], interpret: bool, dtype: DTypeLike = jnp.float32
) -> jax.ShapeDtypeStruct:
  """What a kernel gives, which varies over the mesh axes that x varies over."""
  varies = jax.typeof(1.0 if interpret else x).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varies)
