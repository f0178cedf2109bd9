"""Who attends to whom, as values: `Causal() & SlidingWindow(256, 0)`, `Full()`, `~Causal()`.

A mask answers two questions: `predicate(q, k)`, may query q see key k, and `spans`, which tiles of
the score matrix hold something to compute. With T < S the queries are the last T positions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Bool, Int


class Mask:
  """A set of (query, key) pairs of indices. Combine with `&`, `|` and `~`."""

  def predicate(self, q_index: Any, k_index: Any) -> Any:
    raise NotImplementedError

  def dense(self, T: int, S: int | None = None) -> Array:
    """The mask as booleans: [T, S], or [B, 1, T, S] when it depends on data."""
    S = T if S is None else S
    q, k = jnp.arange(S - T, S)[:, None], jnp.arange(S)[None, :]
    seen = self.predicate(q, k)
    return jnp.broadcast_to(seen, (*seen.shape[:-2], T, S))

  def __and__(self, other: "Mask") -> "Mask":
    return And(self, other)

  def __or__(self, other: "Mask") -> "Mask":
    return Or(self, other)

  def __invert__(self) -> "Mask":
    return Not(self)


@dataclasses.dataclass(frozen=True)
class Full(Mask):
  """Every query sees every key."""

  def predicate(self, q_index, k_index):
    return (q_index >= 0) | (k_index >= 0)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
  """Query q sees keys 0 … q."""

  def predicate(self, q_index, k_index):
    return k_index <= q_index


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
  """Query q sees keys q − left … q + right."""

  left: int
  right: int

  def predicate(self, q_index, k_index):
    return (k_index >= q_index - self.left) & (k_index <= q_index + self.right)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Mask):
  """Tokens of equal segment id see one another; a negative id is padding and sees nothing."""

  segment_ids: Int[Array, "B S"] | tuple[Int[Array, "B T"], Int[Array, "B S"]]

  def predicate(self, q_index, k_index):
    pair = isinstance(self.segment_ids, tuple)
    q_ids, k_ids = self.segment_ids if pair else (self.segment_ids, self.segment_ids)
    offset = k_ids.shape[1] - q_ids.shape[1]
    q, k = _lookup(q_ids, q_index - offset), _lookup(k_ids, k_index)
    return (q == k) & (q >= 0)


def _lookup(ids: Int[Array, "B S"], index: Any) -> Array:
  index = jnp.asarray(index)
  if index.ndim < 4:
    index = index.reshape((1,) * (4 - index.ndim) + index.shape)
  batch = jnp.arange(ids.shape[0]).reshape(-1, 1, 1, 1)
  return ids[batch, index]


def _binary(a: Array, b: Array, op) -> Array:
  rank = max(a.ndim, b.ndim)
  a, b = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (a, b))
  return op(a, b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(Mask):
  a: Mask
  b: Mask

  def predicate(self, q_index, k_index):
    args = q_index, k_index
    return _binary(self.a.predicate(*args), self.b.predicate(*args), lambda x, y: x & y)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(Mask):
  a: Mask
  b: Mask

  def predicate(self, q_index, k_index):
    args = q_index, k_index
    return _binary(self.a.predicate(*args), self.b.predicate(*args), lambda x, y: x | y)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Not(Mask):
  a: Mask

  def predicate(self, q_index, k_index):
    return ~self.a.predicate(q_index, k_index)


for _leaf in (Full, Causal, SlidingWindow):
  jax.tree_util.register_static(_leaf)
