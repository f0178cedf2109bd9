"""Dropless dispatch: tokens sorted by expert, each computed once per chosen expert.

No expert has a capacity and no token is dropped (MegaBlocks, Gale et al., arXiv 2211.15841).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Bool, Float, Int


def mix_experts(
  apply: Callable[[Array, Array], Array],
  x: Float[Array, "M D"],
  experts: Int[Array, "M k"],
  gates: Float[Array, "M k"],
  *,
  count: int,
  mask: Bool[Array, "M"] | None = None,
) -> Float[Array, "M D"]:
  """y[m] = Σ_i gates[m, i] · expert[experts[m, i]](x[m]); zero where `mask` is False.

  Args:
    apply: (rows sorted by expert [M·k, D], rows of each expert [E]) → outputs [M·k, D]; rows past
      the last expert's are not read.
    x: tokens.
    experts: the experts of each token, distinct along k.
    gates: weight of each choice.
    count: number of experts E.
    mask: False for padding, which no expert computes.

  Example:
    >>> double_or_negate = lambda rows, sizes: jnp.where(jnp.arange(2)[:, None] < sizes[0],
    ...                                                  2 * rows, -rows)
    >>> x, gates = jnp.ones((2, 1)), jnp.ones((2, 1))
    >>> mix_experts(double_or_negate, x, jnp.array([[1], [0]]), gates, count=2).tolist()
    [[-1.0], [2.0]]
  """
  tokens, k = experts.shape
  if mask is not None:
    experts = jnp.where(mask[:, None], experts, count)
  order, sizes = sort_by_expert(experts.reshape(-1), count)
  place = jnp.argsort(order)
  copies = jnp.broadcast_to(x[:, None], (tokens, k, x.shape[1])).reshape(tokens * k, -1)
  rows = _permute(copies, order, place)
  outputs = _permute(apply(rows, sizes), place, order).reshape(tokens, k, -1)
  weighted = outputs.astype(jnp.float32) * gates[..., None]
  if mask is not None:
    weighted = jnp.where(mask[:, None, None], weighted, 0.0)
  return weighted.sum(axis=1).astype(x.dtype)


def sort_by_expert(
  experts: Int[Array, "M"], count: int
) -> tuple[Int[Array, "M"], Int[Array, "{count}"]]:
  """The permutation that sorts rows by expert, stable, and how many rows each expert has.

  Rows of an "expert" from `count` on come last and are not counted.

  Example:
    >>> [a.tolist() for a in sort_by_expert(jnp.array([1, 3, 0, 1]), 3)]
    [[2, 0, 3, 1], [1, 2, 0]]
  """
  order = jnp.argsort(experts, stable=True)
  bounds = jnp.searchsorted(experts[order], jnp.arange(count + 1))
  return order, jnp.diff(bounds)


@jax.custom_vjp
def _permute(x: Array, order: Array, inverse: Array) -> Array:
  """x[order]; its backward gathers by the inverse, where autodiff would scatter."""
  return x.at[order].get(mode="promise_in_bounds", unique_indices=True)


def _permute_forward(x, order, inverse):
  return _permute(x, order, inverse), (order, inverse)


def _permute_backward(residuals, dy):
  order, inverse = residuals
  return _permute(dy, inverse, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)
