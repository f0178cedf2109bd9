"""Dispatch: each token computed by the experts that it was given to.

With a capacity the experts' rows are slots, as many for each; without, they lie sorted, as many as
there are (`plan`). Where experts are split over devices, tokens travel to them (`exchange`). In all
three the mathematics is that of `mix_experts`, or where experts choose tokens of `mix_rows`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effjax.core import spmd
from effjax.core.known import is_id, number
from effjax.core.numerics import wide, zero_unless
from effjax.core.typing import Array, Bool, Dim, Float, Int, Size
from effjax.kernels.grouped_matmul import Groups
from effjax.layers import ExpertRouting, Routing
from effjax.moe import exchange

Apply = Callable[[Float[Array, "R D"], Groups], Float[Array, "R F"]]


def mix(
  apply: Apply,
  x: Float[Array, "M D"],
  routing: Routing | ExpertRouting,
  *,
  count: Size,
  mask: Bool[Array, "M"] | None = None,
) -> Float[Array, "M F"]:
  """What `mix_experts` or `mix_rows` makes of a router's decision.

  Example:
    >>> routing = Routing(jnp.array([[0], [1]]), jnp.array([[1.0], [0.5]]), capacity=1)
    >>> mix(lambda rows, groups: 10 * rows, jnp.ones((2, 1)), routing, count=2).tolist()
    [[10.0], [5.0]]
  """
  if isinstance(routing, ExpertRouting):
    return mix_rows(apply, x, routing.rows, routing.gates, mask=mask)
  capacity = routing.capacity
  return mix_experts(
    apply, x, routing.experts, routing.gates, count=count, mask=mask, capacity=capacity
  )


def mix_experts(
  apply: Apply,
  x: Float[Array, "M D"],
  experts: Int[Array, "M k"],
  gates: Float[Array, "M k"],
  *,
  count: Size,
  mask: Bool[Array, "M"] | None = None,
  capacity: Dim | None = None,
) -> Float[Array, "M F"]:
  """y[m] = Σ_i gates[m, i] · expert[experts[m, i]](x[m]); zero where `mask` is False.

  In `spmd.rows_split` each device lays out its own rows, and `apply` sees those of all devices laid
  end to end. Where that says that experts are dealt, each token goes to the devices of its experts
  and its outputs come back, by all-to-all; E must be a multiple of their number.

  Args:
    apply: (rows [R, D], which expert has which) → outputs [R, F]. What is given for rows that no
      expert has is not read, and their cotangents are zero.
    x: tokens.
    experts: the experts of each token, distinct along k; what is none of 0 … E − 1 is no expert.
    gates: weight of each choice.
    count: number of experts E.
    mask: False for padding, which no expert computes, whatever is in it.
    capacity: a promise C that no expert has more tokens, so that they can have slots; a token
      beyond it gives NaN. None sorts rows instead, and so does a C with too many slots.

  Raises:
    ValueError: for a capacity below 1, and for experts that the devices do not divide.

  Example:
    >>> double_or_negate = lambda rows, groups: jnp.where(
    ...   groups.of_row(2)[:, None] == 0, 2 * rows, -rows)
    >>> x, gates = jnp.ones((2, 1)), jnp.ones((2, 1))
    >>> mix_experts(double_or_negate, x, jnp.array([[1], [0]]), gates, count=2).tolist()
    [[-1.0], [2.0]]
  """
  if capacity is not None and not jax.export.is_symbolic_dim(capacity):
    capacity = number("capacity", capacity, of="mix_experts", integer=True, least=1)
  x, experts = zero_unless(mask, x), _chosen(experts, count, mask)
  way = exchange.way((x, experts, gates), experts, count, capacity)
  rows, sizes, kept = spmd.map_rows(lambda given, _: way.send(*given), (x, experts, gates), ())
  outputs = apply(rows, way.groups(sizes))
  y = spmd.map_rows(lambda given, _: way.combine(*given), (outputs, kept), ())
  return y.astype(x.dtype)


def dropped_share(
  routing: Routing | ExpertRouting,
  *,
  count: Size,
  mask: Bool[Array, "M"] | None = None,
) -> Float[Array, ""] | None:
  """The share of choices that find no room between devices; None where there is room for all.

  There is, unless experts are dealt over devices with less (`parallel.Experts`).
  """
  if isinstance(routing, ExpertRouting):
    return None
  experts = _chosen(routing.experts, count, mask)
  way = exchange.way(experts, experts, count, routing.capacity)
  if not isinstance(way, exchange.Exchange) or not way.drops:
    return None
  lost = spmd.map_rows(lambda experts, _: way.dropped(experts), experts, ())
  return lost.sum() / jnp.maximum((experts < count).sum(), 1)


def mix_rows(
  apply: Apply,
  x: Float[Array, "M D"],
  rows: Int[Array, "E C"],
  gates: Float[Array, "E C"],
  *,
  mask: Bool[Array, "M"] | None = None,
) -> Float[Array, "M F"]:
  """y[m] = Σ_{e, c: rows[e, c] = m} gates[e, c] · expert[e](x[m]): each expert has chosen its rows.

  In `spmd.rows_split` each device computes its part of the slots, those of its own experts where
  they are dealt; it is given all tokens, and gives a part of each one's sum.

  Args:
    apply: as in `mix_experts`.
    x: tokens.
    rows: the tokens of each expert, distinct; what is none of 0 … M − 1 is an empty slot.
    gates: the weight of each.
    mask: False for padding, which no expert computes, whatever is in it.

  Example:
    >>> apply = lambda rows, groups: 10 * rows
    >>> x, rows, gates = jnp.array([[1.0], [2.0]]), jnp.array([[1], [1]]), jnp.array([[1.0], [0.5]])
    >>> mix_rows(apply, x, rows, gates).tolist()
    [[0.0], [30.0]]
  """
  tokens, count = x.shape[0], rows.shape[0]
  there = is_id(rows, tokens)
  if mask is not None:
    there &= mask.at[rows].get(mode="fill", fill_value=False)
  rows = jnp.where(there, rows, tokens)
  dealt = spmd.experts_dealt(x)
  devices = exchange.check_dealt(count, dealt)
  chunks = spmd.devices(x) // devices
  rows, gates = _deal(rows, gates, devices, chunks, tokens)
  sizes = (rows < tokens).sum(axis=2).astype(jnp.int32)
  groups = Groups.dealt(sizes, devices, rows.shape[2], None if dealt is None else dealt[0].axis)
  rows, gates = rows.reshape(-1), gates.reshape(-1)
  take = lambda rows, x: x.at[rows].get(mode="fill", fill_value=0)

  def add(given, _):
    outputs, rows, gates = given
    gates = zero_unless(rows < tokens, gates)[:, None].astype(wide(outputs.dtype))
    outputs = zero_unless(rows < tokens, outputs).astype(gates.dtype)
    return jnp.zeros((1, tokens, outputs.shape[1]), gates.dtype).at[0, rows].add(gates * outputs)

  outputs = apply(spmd.map_rows(take, rows, x), groups)
  return spmd.map_rows(add, (outputs, rows, gates), ()).sum(axis=0).astype(x.dtype)


def _deal(
  rows: Array, gates: Array, devices: Size, chunks: Size, tokens: Dim
) -> tuple[Int[Array, "P G C"], Float[Array, "P G C"]]:
  """What each of `chunks` · `devices` devices computes of [E, C] slots, full ones first."""
  full = jnp.argsort(rows >= tokens, axis=1, stable=True)
  count, slots = rows.shape
  spare = ((0, 0), (0, -slots % chunks))

  def deal(a: Array, empty: Dim) -> Array:
    a = jnp.pad(jnp.take_along_axis(a, full, axis=1), spare, constant_values=empty)
    a = a.reshape(devices, count // devices, chunks, -1).transpose(2, 0, 1, 3)
    return a.reshape(chunks * devices, count // devices, -1)

  return deal(rows, tokens), deal(gates, 0)


def _chosen(experts: Array, count: Size, mask: Array | None) -> Int[Array, "M k"]:
  """`experts`, with E for what is no expert and for what padding chose."""
  there = is_id(experts, count)
  return jnp.where(there if mask is None else there & mask[:, None], experts, count)
