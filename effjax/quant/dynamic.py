"""Products of 8-bit integers: activations are rounded as they come, row by row."""

import functools
from collections.abc import Callable

import jax

from effjax.core import numerics
from effjax.core.numerics import rounded
from effjax.core.register import register
from effjax.core.typing import Array, Float
from effjax.kernels.quantized_matmul import integer_matmul
from effjax.quant.int8 import Int8


@register(kind="quantised")
class Int8Dynamic(Int8):
  """`Int8` whose products are of integers: activations are rounded too, one scale a row of x.

  x W ≈ (Q(x) q) · s_x · scale, where Q(x) q is summed in int32 and Q is `rounded`. Its
  derivative is that of x W. Weights alone are rounded, as by `Int8`, in products with one scale a
  row of W, as the table of an embedding has (the tied head is its transpose, and multiplies
  integers), and in those of the experts of a mixture, which are not with a single matrix.
  """

  def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    if self.scale.shape[-2] > 1:
      return super().matmul(x)
    return straight(rounded_product, x, self)


def rounded_product(
  x: Float[Array, "... D"], w: Int8, top: Float[Array, "... 1"] | None = None
) -> Float[Array, "... F"]:
  """x W as a product of integers, for one scale an output channel of W."""
  q, scale = rounded(x, top)
  y = integer_matmul(q, w.q, turned=w.turned).astype(scale.dtype) * scale
  return (y * numerics.expand(w.scale[0].astype(scale.dtype), y.ndim)).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def straight(product: Callable[[Array, Int8], Array], x: Array, w: Int8) -> Array:
  """product(x, w), whose derivative is that of the product of x with the matrix of w."""
  return product(x, w)


@straight.defjvp
def _straight_jvp(product, primals, tangents):
  exact = lambda x, w: Int8.matmul(w, x)
  return straight(product, *primals), jax.jvp(exact, primals, tangents)[1]
