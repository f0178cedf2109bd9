"""Dropless dispatch: tokens sorted by expert, each computed once per chosen expert.

No expert has a capacity and no token is dropped (MegaBlocks, Gale et al., arXiv 2211.15841).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effjax.core import spmd
from effjax.core.known import is_id
from effjax.core.numerics import zero_unless
from effjax.core.typing import Array, Bool, Float, Int


def mix_experts(
  apply: Callable[[Array, Array], Array],
  x: Float[Array, "M D"],
  experts: Int[Array, "M k"],
  gates: Float[Array, "M k"],
  *,
  count: int,
  mask: Bool[Array, "M"] | None = None,
) -> Float[Array, "M F"]:
  """y[m] = Σ_i gates[m, i] · expert[experts[m, i]](x[m]); zero where `mask` is False.

  In `spmd.rows_split` each device sorts its own rows, and `apply` sees those of all devices laid
  end to end.

  Args:
    apply: (rows sorted by expert [M·k, D], rows of each expert) → outputs [M·k, F]. The sizes are
      [E], or [P, E] where P devices have M·k / P rows each, sorted by themselves. What is given for
      rows past the last expert's is not read, and their cotangents are zero.
    x: tokens.
    experts: the experts of each token, distinct along k; what is none of 0 … E − 1 is no expert.
    gates: weight of each choice.
    count: number of experts E.
    mask: False for padding, which no expert computes, whatever is in it.

  Example:
    >>> double_or_negate = lambda rows, sizes: jnp.where(jnp.arange(2)[:, None] < sizes[0],
    ...                                                  2 * rows, -rows)
    >>> x, gates = jnp.ones((2, 1)), jnp.ones((2, 1))
    >>> mix_experts(double_or_negate, x, jnp.array([[1], [0]]), gates, count=2).tolist()
    [[-1.0], [2.0]]
  """
  x = zero_unless(mask, x)
  there = is_id(experts, count)
  experts = jnp.where(there if mask is None else there & mask[:, None], experts, count)
  send = lambda rows, _: _send(rows[0], rows[1], count)
  rows, sizes, order, place = spmd.map_rows(send, (x, experts), ())
  outputs = apply(rows, sizes if sizes.shape[0] > 1 else sizes[0])
  combine = lambda rows, _: _combine(*rows)
  return spmd.map_rows(combine, (outputs, gates, experts < count, order, place), ()).astype(x.dtype)


def _send(x: Array, experts: Array, count: int) -> tuple[Array, Array, Array, Array]:
  """Rows sorted by expert, the sizes [1, E], and the permutation there and back."""
  tokens, k = experts.shape
  order, sizes = sort_by_expert(experts.reshape(-1), count)
  place = jnp.argsort(order)
  copies = jnp.broadcast_to(x[:, None], (tokens, k, x.shape[1])).reshape(tokens * k, x.shape[1])
  return _permute(copies, order, place), sizes[None], order, place


def _combine(outputs: Array, gates: Array, chosen: Array, order: Array, place: Array) -> Array:
  """Σ over the chosen experts of gate · output, for tokens in their own order, in float32."""
  outputs = _permute(outputs, place, order).astype(jnp.float32)
  outputs = zero_unless(chosen, outputs.reshape(*gates.shape, outputs.shape[-1]))
  return (outputs * zero_unless(chosen, gates)[..., None]).sum(axis=1)


def sort_by_expert(
  experts: Int[Array, "M"], count: int
) -> tuple[Int[Array, "M"], Int[Array, "{count}"]]:
  """The permutation that sorts rows by expert, stable, and how many rows each expert has.

  Rows of an "expert" from `count` on come last and are not counted.

  Example:
    >>> [a.tolist() for a in sort_by_expert(jnp.array([1, 3, 0, 1]), 3)]
    [[2, 0, 3, 1], [1, 2, 0]]
  """
  return jnp.argsort(experts, stable=True), jnp.bincount(experts, length=count)


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
