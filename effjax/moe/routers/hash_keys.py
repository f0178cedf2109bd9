"""What a token is hashed by: an id for each token, out of the facts of a batch.

−1 stands for no token: there is none before the first of a sequence, and none after its last.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from effjax.core.known import check_ids, number
from effjax.core.typing import Array, Int, Size
from effjax.layers import Context

Ids = Callable[[Context, int], Array]


@dataclasses.dataclass(frozen=True)
class HashKey:
  """One way of giving ids to tokens.

  Attributes:
    ids: (context, entries) → ids [B, T], each −1 … entries − 1.
    reads: the fields of `Context` that it needs.
    role: of the axis of a table of these ids, see `effjax.layers.axes`.
    peeks: whether a token's id depends on later tokens.
  """

  ids: Ids
  reads: tuple[str, ...]
  role: str = "vocab"
  peeks: bool = False


def bigram_ids(
  tokens: Int[Array, "B T"], previous: Int[Array, "B T"], *, entries: Size
) -> Int[Array, "B T"]:
  """A bucket 0 … entries − 1 for each pair of a token and the one before it.

  Pairs are spread by the finalizer of MurmurHash3 on 32 bits: different ones meet in a bucket about
  as often as if buckets were drawn.

  Args:
    tokens: ids.
    previous: the id before each token, −1 for none.
    entries: number of buckets.

  Example:
    >>> tokens, previous = jnp.array([[5, 6, 5, 6]]), jnp.array([[-1, 5, 6, 5]])
    >>> bigram_ids(tokens, previous, entries=100).tolist()
    [[27, 89, 62, 89]]
  """
  entries = number("entries", entries, of="bigram_ids", integer=True, least=1)
  x = _mixed(previous.astype(jnp.uint32)) ^ tokens.astype(jnp.uint32)
  return (_mixed(x) % jnp.uint32(entries)).astype(jnp.int32)


def next_ids(context: Context) -> Int[Array, "B T"]:
  """The token after each one within its segment, −1 after the last.

  Example:
    >>> context = Context(jnp.array([[9, 5, 6, 7]]), segment_ids=jnp.array([[-1, 0, 0, 1]]))
    >>> next_ids(context).tolist()
    [[-1, 6, -1, -1]]
  """
  shift = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
  after, ids = shift(_given(context, "tokens").astype(jnp.int32)), context.segment_ids
  return after if ids is None else jnp.where((ids >= 0) & (shift(ids) == ids), after, -1)


def _given(context: Context, name: str) -> Int[Array, "B T"]:
  """A fact that is needed; ValueError where it is missing."""
  value = getattr(context, name)
  if value is None:
    raise ValueError(f"Hash: {name}=None; allowed: ids [B, T]")
  check_ids(name, value, 2**31 - 1, value >= 0)
  return value


def _positions(context: Context, entries: int) -> Int[Array, "B T"]:
  if context.positions is not None:
    return context.positions % entries
  return context.positions_for(_given(context, "tokens")) % entries


def _bigrams(context: Context, entries: int) -> Int[Array, "B T"]:
  return bigram_ids(_given(context, "tokens"), context.previous_ids(), entries=entries)


def _mixed(x: Array) -> Array:
  """32 bits, every one of which depends on all of x: a permutation."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)


KEYS = {
  "token": HashKey(lambda context, _: _given(context, "tokens"), ("tokens",)),
  "previous": HashKey(lambda context, _: context.previous_ids(), ("previous",)),
  "bigram": HashKey(_bigrams, ("previous",), role="buckets"),
  "position": HashKey(_positions, ("positions",), role="periods"),
  "predicted": HashKey(lambda context, _: _given(context, "predicted"), ("predicted",)),
  "next": HashKey(lambda context, _: next_ids(context), ("tokens",), peeks=True),
}
