"""Products of groups of rows by kernels of GPUs and TPUs, with their gradients.

Each platform's module has `products`, x[m] w[e], `sums`, Σ x[m] y[m]ᵀ over the rows of each group,
and `fits`, which says whether it can. The gradient of rows is a product with the matrices turned,
which lie as they do; that of the matrices is one of sums. What is packed is never expanded, unless
its constants are differentiated.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.known import is_size
from effjax.core.typing import Array, Float, Int
from effjax.kernels.grouped_matmul import gpu, tpu
from effjax.kernels.quantized_matmul import Format, Lying

KERNELS: dict[str, Any] = {"gpu": gpu, "tpu": tpu}


def fits(name: str, x: Array, w: Lying) -> bool:
  """Whether the kernels of a platform can multiply, and give the gradients."""
  turned = dataclasses.replace(w, table=not w.table)
  return is_size(len(x)) and 0 not in w.shape and all(KERNELS[name].fits(x, m) for m in (w, turned))


def product(
  name: str, x: Float[Array, "M D"], w: Lying, group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
  """x[m] w[e] for the rows of each group e; 0 for rows past the last group, whatever they hold."""
  return _product(name, w.format, w.table, x, (w.codes, w.constants), group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(name: str, format: Format, table: bool, x, matrices, group_sizes):
  codes, constants = matrices
  return KERNELS[name].products(x, Lying(format, codes, constants, table), group_sizes)


def _forward(name, format, table, *operands):
  return _product(name, format, table, *operands), operands


def _backward(name, format, table, operands, dy):
  x, (codes, constants), group_sizes = operands
  turned = Lying(format, codes, constants, not table)
  dx = KERNELS[name].products(dy, turned, group_sizes)
  trains = jnp.issubdtype(codes.dtype, jnp.floating)
  pair = (x, dy) if table else (dy, x)
  sums = lambda dtype: KERNELS[name].sums(*pair, group_sizes, dtype)
  d_codes = sums(codes.dtype) if trains else _float0(codes)
  d_constants = constants
  if constants:
    unpack = lambda constants: format.unpack(codes, *constants)
    (d_constants,) = jax.vjp(unpack, constants)[1](sums(jnp.float32))
  return dx, (d_codes, d_constants), _float0(group_sizes)


_product.defvjp(_forward, _backward)


def _float0(leaf: Array) -> np.ndarray:
  return np.zeros(leaf.shape, jax.dtypes.float0)
