"""Capacity: how many rows an expert takes at most, and which ones where more want to."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp

from effjax.core import spmd
from effjax.core.known import is_id, number
from effjax.core.numerics import zero_unless
from effjax.core.typing import Array, Bool, Dim, Float, Int, Number, Size
from effjax.layers import Routing

ROUNDINGS = ("up", "down", "nearest")


@dataclasses.dataclass(frozen=True)
class Capacity:
  """C = f · k · M / E rows for each expert of M, rounded, and at least `least`, at most M.

  M counts padding, so that C is known when tracing, though padding takes none of it. Published
  rules, of which some leave k out:

  | rule | |
  |---|---|
  | Switch Transformers, DeepSpeed without its minimum of 4 | `Capacity(f)` |
  | Mesh TensorFlow | `Capacity(f, rounding="down", least=4, per_choice=False)` |
  | Flaxformer | `Capacity(f, rounding="nearest", least=4, per_choice=False)` |
  | V-MoE | `Capacity(f, multiple=4)` |

  Attributes:
    factor: f, above 0: at 1 an even load fits exactly.
    evaluation: f outside of training; None is no limit there, so that what a token gets does not
      depend on the others that it is computed with.
    per_choice: whether k counts.
    rounding: "up", "down", or "nearest", of two the even one.
    multiple: what C is rounded up to a multiple of, last.
    least: the smallest C.

  Raises:
    ValueError: for values out of range.

  Example:
    >>> capacity = Capacity(1.25, evaluation=2.0)
    >>> capacity.of(100, experts=8), capacity.of(100, experts=8, training=False)
    (16, 25)
    >>> Capacity(1.25, per_choice=False, rounding="down").of(100, experts=8, choices=2)
    15
  """

  factor: Number = 1.25
  evaluation: Number | None = None
  per_choice: bool = True
  rounding: str = "up"
  multiple: Size = 1
  least: Size = 1

  def __post_init__(self):
    keep = lambda name, **bounds: object.__setattr__(
      self, name, number(name, getattr(self, name), of="Capacity", **bounds)
    )
    keep("factor", above=0)
    if self.evaluation is not None:
      keep("evaluation", above=0)
    for name in ("multiple", "least"):
      keep(name, integer=True, least=1)
    if self.rounding not in ROUNDINGS:
      raise ValueError(f"Capacity: rounding={self.rounding!r}; allowed: {', '.join(ROUNDINGS)}")

  def of(self, rows: Dim, *, experts: int, choices: int = 1, training: bool = True) -> Dim | None:
    """C for M `rows`, E `experts` and k `choices` of each row; None for no limit."""
    factor = self.factor if training else self.evaluation
    if factor is None:
      return None
    share, parts = Fraction(str(factor)).as_integer_ratio()  # as it is written: 1.1 is 11 / 10
    share, parts = share * rows * (choices if self.per_choice else 1), parts * experts
    size = share // parts
    rest = 2 * (share - size * parts)
    if self.rounding == "up":
      size = -(-share // parts)
    elif self.rounding == "nearest" and (rest > parts or (rest == parts and size % 2)):
      size += 1
    size = -(-size // self.multiple) * self.multiple
    most, least = jax.core.max_dim, jax.core.min_dim  # of sizes, symbols too
    return least(most(size, self.least), most(rows, 1))


def drop_overflow(
  routing: Routing,
  capacity: Dim,
  *,
  count: Size,
  mask: Bool[Array, "..."] | None = None,
  priority: Float[Array, "..."] | None = None,
  renormalize: bool = False,
) -> Routing:
  """The same decision, in which no expert has more than `capacity` of a group's M rows.

  All first choices come before any second ones, and among equal choices the rows of higher
  `priority`, then the earlier ones. What finds its expert full is no expert, with gate 0. A choice
  of none and padding take no place. Leading axes are groups, each with a capacity of its own.

  Args:
    routing: experts and gates [..., M, k].
    capacity: C, from 1.
    count: number of experts E; E stands for none.
    mask: False for padding.
    priority: of each row; None is none.
    renormalize: whether the gates that a row keeps are divided by their sum.

  Raises:
    ValueError: for a capacity below 1, and a mask or priority that is not one of each row.

  Example:
    >>> routing = Routing(jnp.array([[0, 1], [0, 1], [1, 0]]), jnp.full((3, 2), 0.5))
    >>> limited = drop_overflow(routing, 2, count=2)
    >>> limited.experts.tolist(), limited.gates.tolist()
    ([[0, 1], [0, 2], [1, 2]], [[0.5, 0.5], [0.5, 0.0], [0.5, 0.0]])
  """
  capacity = checked("drop_overflow", capacity)
  experts, gates = routing.experts, routing.gates
  for name, x in {"mask": mask, "priority": priority}.items():
    if x is not None and x.shape != experts.shape[:-1]:
      allowed = f"{experts.shape[:-1]}, one of each row"
      raise ValueError(f"drop_overflow: {name} {x.shape}; allowed: {allowed}")
  wanted = is_id(experts, count) if mask is None else is_id(experts, count) & mask[..., None]
  ids = jnp.where(wanted, experts, count)
  kept = wanted & (places(ids, priority) < capacity)
  gates = zero_unless(kept, gates)
  if renormalize:
    total = gates.sum(axis=-1, keepdims=True)
    gates = gates / jnp.where(total == 0, 1, total)
  experts = jnp.where(kept, experts, count)
  return dataclasses.replace(routing, experts=experts, gates=gates, capacity=capacity)


def checked(of: str, capacity: Dim) -> Dim:
  """A capacity as a size; ValueError for one below 1, and for one that is not known."""
  if jax.export.is_symbolic_dim(capacity):
    return capacity
  size = number("capacity", capacity, of=of, integer=True, least=1)
  if isinstance(size, jax.Array):
    raise ValueError(f"{of}: capacity is traced; allowed: a size that is known when tracing")
  return size


@spmd.on_any_mesh
def places(
  experts: Int[Array, "... M k"], priority: Float[Array, "... M"] | None = None
) -> Int[Array, "... M k"]:
  """How many choices of the same expert come before each one, within its group.

  Example:
    >>> places(jnp.array([[0, 1], [0, 1], [1, 0]])).tolist()
    [[0, 1], [1, 2], [0, 2]]
    >>> places(jnp.array([[0], [0], [0]]), jnp.array([1.0, 3.0, 3.0])).tolist()
    [[2], [0], [1]]
  """
  if experts.ndim > 2:
    return jax.vmap(places, in_axes=(0, None if priority is None else 0))(experts, priority)
  rows, k = experts.shape
  order = jnp.arange(rows) if priority is None else jnp.argsort(-priority, stable=True)
  ids = experts[order].T.reshape(-1)
  by_expert = jnp.argsort(ids, stable=True)
  at = jnp.arange(ids.shape[0], dtype=jnp.int32)
  found = ids[by_expert]
  new = jnp.concatenate([jnp.ones_like(found[:1], bool), found[1:] != found[:-1]])
  start = jax.lax.cummax(jnp.where(new, at, 0))
  place = jnp.zeros_like(at).at[by_expert].set(at - start, unique_indices=True)
  place = place.reshape(k, rows).T
  return place if priority is None else place.at[order].set(place, unique_indices=True)
