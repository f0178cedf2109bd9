"""The grouped matrix product written out: every row times every matrix, all but one dropped."""

import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Float, Int


def group_of_row(group_sizes: Int[Array, "E"], rows: int) -> Int[Array, "M"]:
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
  """out[m] = Σ_e 1[m in group e] x[m] w[e]: E times the necessary work."""
  chosen = jax.nn.one_hot(group_of_row(group_sizes, x.shape[0]), w.shape[0], dtype=x.dtype)
  return jnp.einsum("md,edf,me->mf", x, w.astype(x.dtype), chosen)
