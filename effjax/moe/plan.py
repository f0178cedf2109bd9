"""Where the choices of tokens lie among the rows that experts compute, and the ways there and back.

Rows lie sorted by expert, one expert's after another's, so that none is dropped whatever the loads
(MegaBlocks, Gale et al., arXiv 2211.15841, section 5), or in C slots for each expert (GShard,
Lepikhin et al., arXiv 2006.16668, section 3.2, here without arrays [T, E, C]). Both ways are
gathers either way, and so are their derivatives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effjax.core.numerics import wide, zero_unless
from effjax.core.typing import Array, Bool, Float, Int, Size


class Plan(NamedTuple):
  """Where the choices of M tokens, k each, lie among R rows.

  Attributes:
    choice: [R], the choice m·k + i that lies in a row; M·k in a row that is empty.
    row: [M, k], the row of each choice; R for one that has none.
    sizes: [1, E], how many rows each expert has.
  """

  choice: Int[Array, "R"]
  row: Int[Array, "M k"]
  sizes: Int[Array, "1 E"]

  @property
  def lies(self) -> Bool[Array, "M k"]:
    """Which choices have a row."""
    return self.row < self.choice.shape[0]


def sort_by_expert(
  experts: Int[Array, "M"], count: Size
) -> tuple[Int[Array, "M"], Int[Array, "{count}"]]:
  """The permutation that sorts rows by expert, stable, and how many rows each expert has.

  Rows of an "expert" from `count` on come last and are not counted.

  Example:
    >>> [a.tolist() for a in sort_by_expert(jnp.array([1, 3, 0, 1]), 3)]
    [[2, 0, 3, 1], [1, 2, 0]]
  """
  return jnp.argsort(experts, stable=True), jnp.bincount(experts, length=count)


def end_to_end(experts: Int[Array, "M k"], count: Size) -> Plan:
  """M·k rows sorted by expert; what is no expert, `count` or more, comes last and is empty.

  Example:
    >>> plan = end_to_end(jnp.array([[1], [3], [0]]), 3)
    >>> plan.choice.tolist(), plan.row.tolist(), plan.sizes.tolist()
    ([2, 0, 3], [[1], [3], [0]], [[1, 1, 0]])
  """
  order, sizes = sort_by_expert(experts.reshape(-1), count)
  rows = order.shape[0]
  choice = jnp.where(jnp.arange(rows) < sizes.sum(), order, rows)
  row = jnp.where(experts < count, jnp.argsort(order).reshape(experts.shape), rows)
  return Plan(choice, row, sizes[None])


def in_slots(experts: Int[Array, "M k"], count: Size, capacity: Size) -> Plan:
  """E·C rows, C for each expert, the earlier tokens first; a choice beyond C has none.

  Example:
    >>> plan = in_slots(jnp.array([[1], [3], [0], [1], [1]]), 2, 2)
    >>> plan.choice.tolist(), plan.row.tolist(), plan.sizes.tolist()
    ([2, 5, 0, 3], [[2], [4], [0], [3], [4]], [[1, 2]])
  """
  order, sizes = sort_by_expert(experts.reshape(-1), count)
  starts, place = jnp.cumsum(sizes) - sizes, jnp.argsort(order).reshape(experts.shape)
  sizes = jnp.minimum(sizes, capacity)
  slot = jnp.arange(capacity)[None]
  there = order.at[starts[:, None] + slot].get(mode="clip")
  choice = jnp.where(slot < sizes[:, None], there, order.shape[0]).reshape(-1)
  of_choice = jnp.minimum(experts, count - 1)
  slot = place - starts[of_choice]
  fits = (experts < count) & (slot < capacity)
  row = jnp.where(fits, of_choice * capacity + slot, choice.shape[0])
  return Plan(choice, row, sizes[None])


@jax.custom_vjp
def send(plan: Plan, x: Float[Array, "M D"]) -> Float[Array, "R D"]:
  """Each row's token, zeros in empty rows; the cotangents of a token's rows are summed.

  Example:
    >>> send(in_slots(jnp.array([[1], [1]]), 2, 2), jnp.array([[3.0], [4.0]])).tolist()
    [[0.0], [0.0], [3.0], [4.0]]
  """
  return _rows(x, plan.choice // plan.row.shape[1])


def _send_backward(plan: Plan, d_rows: Array):
  return None, _rows(d_rows, plan.row).astype(wide(d_rows.dtype)).sum(1).astype(d_rows.dtype)


send.defvjp(lambda plan, x: (send(plan, x), plan), _send_backward)


@jax.custom_vjp
def combine(
  plan: Plan, outputs: Float[Array, "R D"], gates: Float[Array, "M k"]
) -> Float[Array, "M D"]:
  """y[m] = Σ_i gates[m, i] · outputs[row[m, i]], over the choices that have a row, in float32.

  Example:
    >>> plan = in_slots(jnp.array([[1, 0], [1, 2]]), 2, 1)
    >>> combine(plan, jnp.array([[3.0], [4.0]]), jnp.full((2, 2), 0.5)).tolist()
    [[3.5], [0.0]]
  """
  each = _rows(outputs, plan.row).astype(wide(outputs.dtype))
  return (each * zero_unless(plan.lies, gates.astype(each.dtype))[..., None]).sum(1)


def _combine_backward(residuals, dy: Array):
  plan, outputs, gates = residuals
  gate = _rows(gates.reshape(-1), plan.choice).astype(dy.dtype)
  d_outputs = _rows(dy, plan.choice // plan.row.shape[1]) * gate[:, None]
  each = zero_unless(plan.lies, _rows(outputs, plan.row).astype(dy.dtype) * dy[:, None])
  return None, d_outputs.astype(outputs.dtype), each.sum(2).astype(gates.dtype)


combine.defvjp(lambda *operands: (combine(*operands), operands), _combine_backward)


def _rows(x: Array, index: Array) -> Array:
  """x[index], zeros for an index past its end."""
  return x.at[index].get(mode="fill", fill_value=0)
