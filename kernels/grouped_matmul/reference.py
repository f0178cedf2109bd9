"""The grouped matrix product written out: every row times every matrix, all but one dropped."""

import jax.numpy as jnp

from effjax.core.typing import Array, Dim, Float, Int


def group_of_row(group_sizes: Int[Array, "E"], rows: Dim) -> Int[Array, "M"]:
  """The group of each row; E for rows past the last group.

  Example:
    >>> group_of_row(jnp.array([2, 0, 1]), 4).tolist()
    [0, 0, 2, 3]
  """
  ends = jnp.cumsum(group_sizes)
  return jnp.sum(jnp.arange(rows)[:, None] >= ends[None], axis=1)


def grouped_matmul(
  x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
  """out[m] = Σ_e 1[m in group e] x[m] w[e]: E times the necessary work.

  What is in a row or a matrix does not reach the other groups, NaN included, nor their gradients.
  """
  group = group_of_row(group_sizes, x.shape[0])
  own = (group[:, None] == jnp.arange(w.shape[0])[None])[..., None]
  rows = jnp.where(own, x[:, None], jnp.zeros((), x.dtype))
  y = jnp.einsum("med,edf->mef", rows, w.astype(x.dtype))
  return jnp.where(own, y, jnp.zeros((), y.dtype)).sum(axis=1)
