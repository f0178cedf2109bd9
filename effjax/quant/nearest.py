"""The nearest number of a table: what every codebook is quantised with."""

import jax.numpy as jnp
import numpy as np

from effjax.core.typing import Array, Float, Int

FEW = 16  # bounds, for which comparing with each takes no longer than a search


def nearest(
  values: Float[Array, "..."], table: Float[Array | np.ndarray, "K"]
) -> Int[Array, "..."]:
  """argmin_k |v − table[k]| for a table that increases; the lower of two that are as near.

  Args:
    values: [...]; NaN is nearest to the first.
    table: K numbers.

  Example:
    >>> nearest(jnp.array([0.4, 0.5, 0.6, 9.0]), jnp.arange(3.0)).tolist()
    [0, 0, 1, 2]
  """
  bounds = jnp.asarray((table[:-1] + table[1:]) / 2)
  if len(bounds) <= FEW:
    below = (bound < values for bound in bounds)
    return sum((b.astype(jnp.int32) for b in below), jnp.zeros(values.shape, jnp.int32))
  found = jnp.searchsorted(bounds, jnp.where(jnp.isnan(values), -jnp.inf, values), side="left")
  return found.astype(jnp.int32)
