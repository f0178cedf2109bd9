"""The weight of named adapters over one matrix: a sum over those of them that are chosen."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import numerics, trees, weights
from effjax.core.register import register
from effjax.core.typing import Array, Float, Int, Key, PyTree
from effjax.core.weights import Transposed
from effjax.peft.beside import Adapter
from effjax.peft.low_rank import LoRA


@register(static=("training",), trains=(), kind="adapter")
class Named(Adapter):
  """x W = x W0 + Σₙ mixₙ (x Wₙ − x W0), where Wₙ is what adapter n alone makes of W0.

  One that is not chosen has no influence, and no gradient, whatever numbers it holds. Each costs
  its product for all rows, chosen or not.

  Invariants:
    base: W0, an array or `Weight` [..., D, F].
    members: name → LoRA or DoRA, of any rank, without the base (None is in its place).
    mix: the weights of the members in the order of their names, [..., n], or [..., B, n] for the
      rows of a batch: the first axis of x is then B.
    chosen: which members the weights multiply, booleans of the shape of `mix`.
    training: names of the members that train; None is all of them.
  """

  members: PyTree
  mix: PyTree
  chosen: PyTree
  training: tuple[str, ...] | None = None

  @classmethod
  def over(cls, base: Any) -> "Named":
    """One without members, which is as its base."""
    none = (*base.shape[:-2], 0)
    return cls(base, {}, jnp.zeros(none), jnp.zeros(none, bool))

  def __post_init__(self):
    arrays = jax.tree.leaves(self)
    if self.base is not None and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in arrays):
      self.check()

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(sorted(self.members))

  @property
  def by_row(self) -> bool:
    """Whether the rows of a batch have mixtures of their own."""
    return self.mix.ndim == self.ndim

  @property
  def parameters(self) -> int:
    there = [member for member in self.members.values() if jax.tree.leaves(member)]
    return super().parameters + sum(member.parameters for member in there)

  @property
  def flops(self) -> float:
    alone = super().flops
    return alone + sum(self.member(name).flops - alone for name in self.names)

  def check(self) -> None:
    super().check()
    for name, member in self.members.items():
      if not isinstance(member, LoRA):
        raise ValueError(f"Named: {name!r} is {type(member).__name__}; allowed: LoRA, DoRA")
      self.member(name).check()
    batch, n, given = tuple(self.shape[:-2]), len(self.members), tuple(self.mix.shape)
    if given[: len(batch)] != batch or given[-1:] != (n,) or len(given) - len(batch) not in (1, 2):
      raise ValueError(f"Named: mix has shape {given}; allowed: {(*batch, n)}, {(*batch, 'B', n)}")
    if tuple(self.chosen.shape) != given:
      raise ValueError(
        f"Named: chosen has shape {self.chosen.shape}; allowed: {given}, that of mix"
      )

  def moves(self, name: str, value: Any) -> bool:
    member = name.removeprefix("members/")
    frozen = member != name and self.training is not None and member not in self.training
    return not frozen and super().moves(name, value)

  def specs(self, axes: Sequence[Any]) -> "Named":
    batch, n = tuple(axes[:-2]), self.mix.ndim - len(axes[:-2])
    mix = weights.specs(self.mix, (*batch, *[None] * n))
    split = self._each(lambda name, member: member.specs(axes))
    return dataclasses.replace(split, base=weights.specs(self.base, axes), mix=mix, chosen=mix)

  def drawn(self, key: Key) -> "Named":
    below: Any = super().drawn(trees.path_key(key, "base"))
    draw = lambda name, member: member.drawn(trees.path_key(key, f"members/{name}"))
    return dataclasses.replace(self._each(draw), base=below.base)

  def from_row(self, first: Int[Array, ""]) -> "Named":
    self._refuse_rows("rows in another order than the batch's, such as an expert's")
    below: Any = super().from_row(first)
    return dataclasses.replace(self._each(lambda name, w: w.from_row(first)), base=below.base)

  def within(self, function: Callable, *arguments: Any) -> Any:
    return function(self._each(lambda name, w: w.within(lambda w: w)), *arguments)

  @property
  def T(self) -> Any:
    return Transposed(self._each(lambda name, member: dataclasses.replace(member, key=None)))

  def member(self, name: str) -> LoRA:
    """The adapter called `name`, over the base."""
    return dataclasses.replace(self.members[name], base=self.base)

  def with_member(self, name: str, member: LoRA) -> "Named":
    """Itself with one more, which is not chosen."""
    members = self.members | {name: dataclasses.replace(member, base=None)}
    place = sorted(members).index(name)
    insert = lambda x: jnp.insert(x, place, 0, axis=-1)
    mix, chosen = insert(self.mix), insert(self.chosen)
    return dataclasses.replace(self, members=members, mix=mix, chosen=chosen)

  def without(self, name: str) -> Any:
    """Itself without a member, and the base without the last."""
    members = {other: member for other, member in self.members.items() if other != name}
    if not members:
      return self.base
    kept = [i for i, other in enumerate(self.names) if other != name]
    training = tuple(other for other in self.training or () if other != name) or None
    mix, chosen = (jnp.take(x, jnp.array(kept), axis=-1) for x in (self.mix, self.chosen))
    return Named(self.base, members, mix, chosen, training)

  def materialize(self) -> Array:
    base = weights.materialize(self.base)
    return (base.astype(numerics.wide(base.dtype)) + self._change(base)).astype(base.dtype)

  def beneath(self, w: Float[Array, "... D F"]) -> Array:
    change = self._change(weights.materialize(self.base))
    return (w.astype(numerics.wide(w.dtype)) - change).astype(w.dtype)

  def added(self, x: Float[Array, "... D"], y: Float[Array, "... F"], bias: Any) -> Array:
    self._check_rows("x", x, 2)
    return self._sum(lambda w, x, y: w.added(x, y, bias), x, y).astype(y.dtype)

  def product(self, x: Array, multiply: Callable[[Array, Any], Array]) -> Array:
    self._refuse_rows("rows in another order than the batch's, such as an expert's")
    y = weights.product(x, self.base, multiply)
    one, change = jnp.ones((x.shape[0], 1), x.dtype), jnp.zeros((), y.dtype)
    for member, weight, _ in self._used():
      change = change + multiply(one, weight[..., None, None]) * (member.product(x, multiply) - y)
    return y + change

  def lookup(self, indices: Int[Array, "..."]) -> Float[Array, "... F"]:
    self._check_rows("indices", indices, 1)
    rows = lambda indices: weights.lookup(self.base, indices)
    y = rows(indices)
    return y + self._sum(lambda w, own: w.lookup(own) - rows(own), indices).astype(y.dtype)

  def _change(self, base: Array) -> Float[Array, "..."]:
    """W − W0 in the wide type of W0, for W0 as an array."""
    self._refuse_rows("one matrix, as merging it wants")
    base = base.astype(numerics.wide(base.dtype))
    return self._sum(lambda w: dataclasses.replace(w, base=base).materialize() - base)

  def _sum(self, part: Callable[..., Array], *rows: Array) -> Array:
    """Σₙ mixₙ part(memberₙ, *rows); of rows with mixtures of their own those that choose it."""
    total: Any = jnp.zeros(())
    for member, weight, chosen in self._used():
      own = [_or_zeros(chosen, x) for x in rows] if self.by_row else rows
      y = part(member, *own)
      total = total + _or_zeros(chosen, _beside(weight, y).astype(y.dtype) * y)
    return total

  def _used(self) -> list[tuple[Adapter, Array, Array]]:
    """(member, weight, whether chosen) of each, with zeros for numbers that are not chosen."""
    used = self.chosen.any(-2) if self.by_row else self.chosen
    weight, found = jnp.where(self.chosen, self.mix, 0), []
    for i, name in enumerate(self.names):
      zeros = lambda x, i=i: _or_zeros(used[..., i], x)
      member = dataclasses.replace(jax.tree.map(zeros, self.members[name]), base=self.base)
      found.append((member, weight[..., i], self.chosen[..., i]))
    return found

  def _each(self, change: Callable[[str, LoRA], Any]) -> "Named":
    """Itself with change(name, member over the base), the base taken off again."""
    changed = {name: change(name, self.member(name)) for name in self.members}
    members = {name: dataclasses.replace(w, base=None) for name, w in changed.items()}
    return dataclasses.replace(self, members=members)

  def _check_rows(self, name: str, x: Array, least: int) -> None:
    if self.by_row and (x.ndim < least or x.shape[0] != self.mix.shape[-2]):
      raise ValueError(
        f"{name} {x.shape} with an adapter for each of {self.mix.shape[-2]} rows; allowed: arrays "
        "whose first axis is that of the batch"
      )

  def _refuse_rows(self, what: str) -> None:
    if self.by_row:
      raise ValueError(
        f"{self!r} with an adapter for each of {self.mix.shape[-2]} rows is asked for {what}; "
        "allowed: where one choice is for all (named.use)"
      )


def _beside(x: Array, y: Array) -> Array:
  """x with axes behind its own, to the number of those of y."""
  return x.reshape(*x.shape, *[1] * (y.ndim - x.ndim))


def _or_zeros(chosen: Array, x: Array) -> Array:
  """x, and 0 in place of the numbers that are not chosen; keys stay as they are."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return x
  return jnp.where(_beside(chosen, x), x, jnp.zeros((), x.dtype))
