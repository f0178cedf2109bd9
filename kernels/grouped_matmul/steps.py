"""The arithmetic that kernels of all platforms have in common."""

import jax.numpy as jnp
from jax import lax

from effjax.core.typing import Array, Float


def dot(x: Float[Array, "A B"], y: Float[Array, "C D"], axes: tuple[int, int]) -> Array:
  """The product over an axis of each, summed in float32, of jax's default precision."""
  dims = (((axes[0],), (axes[1],)), ((), ()))
  return lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
