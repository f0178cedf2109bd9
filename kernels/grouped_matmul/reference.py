"""The grouped matrix product written out: every row times every matrix, all but one dropped."""

import jax.numpy as jnp

from effjax.core.typing import Array, Float, Int, Size
from effjax.kernels.grouped_matmul.groups import group_of_row


def grouped_matmul(
  x: Float[Array, "M D"],
  w: Float[Array, "E D F"],
  group_sizes: Int[Array, "E"],
  capacity: Size | None = None,
) -> Float[Array, "M F"]:
  """out[m] = Σ_e 1[m in group e] x[m] w[e]: E times the necessary work.

  What is in a row or a matrix does not reach the other groups, NaN included, nor their gradients.
  """
  group = group_of_row(group_sizes, x.shape[0], capacity)
  own = (group[:, None] == jnp.arange(w.shape[0])[None])[..., None]
  rows = jnp.where(own, x[:, None], jnp.zeros((), x.dtype))
  y = jnp.einsum("med,edf->mef", rows, w.astype(x.dtype))
  return jnp.where(own, y, jnp.zeros((), y.dtype)).sum(axis=1)
