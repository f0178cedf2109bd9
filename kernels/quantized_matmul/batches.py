"""Products that loop over a matrix, under `vmap` and `shard_map`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.typing import Array


def row_by_row(product: Callable[..., Array]) -> Callable[..., Array]:
  """`product(x, *matrix)` of rows x [M, D]; a batch of x counts as rows, one of matrices in turn.

  Mapped by itself, a loop would hold what it makes of the matrix for every entry of the batch.
  """
  mapped = jax.custom_batching.custom_vmap(product)

  @mapped.def_vmap
  def rule(size: int, batched: Any, x: Array, *matrix: Any) -> tuple[Array, bool]:
    in_x, *in_matrix = batched
    if not any(jax.tree.leaves(in_matrix)):
      y = mapped(x.reshape(-1, x.shape[-1]), *matrix)
      return y.reshape(*x.shape[:-1], y.shape[-1]), True
    flat, tree = jax.tree.flatten((x, *matrix))
    moves = jax.tree.leaves((in_x, *in_matrix))

    def one(i: Array) -> Array:
      at = lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
      each = [at(x) if moved else x for x, moved in zip(flat, moves, strict=True)]
      return mapped(*jax.tree.unflatten(tree, each))

    return jax.lax.map(one, jnp.arange(size)), True

  return mapped
