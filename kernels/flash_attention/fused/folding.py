"""A few queries against a cache: the query heads that share keys count as queries.

A tile of queries then holds all G heads of a group, and their keys, on which decoding spends its
time, are read once instead of G times.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from effjax.core.typing import Array

_ROWS = 64  # queries times heads of a group, up to which they make one tile


def fits(
  query: Array, key: Array, *, mask: Any, bias=None, scores=None, query_positions=None, **_
) -> bool:
  """Whether the queries have positions, are few, and nothing tells the heads of a group apart."""
  group = query.shape[2] // key.shape[2]
  alike = mask.heads == 1 and bias is None and scores is None and query_positions is not None
  return alike and query.shape[1] * group <= _ROWS


def attention(
  run: Callable,
  query: Array,
  key: Array,
  value: Array,
  *,
  query_positions: Array,
  segment_ids: tuple[Array, Array] | None = None,
  **arguments: Any,
) -> tuple[Array, Array]:
  """`run`, an attention, with [B, T, K · G, H] queries as [B, T · G, K, H]."""
  B, T, N, _ = query.shape
  K = key.shape[2]
  again = lambda x: x if T == 1 else jnp.repeat(x, N // K, axis=1)  # one position is that of all
  results = run(
    query.reshape(B, T, K, N // K, -1).swapaxes(2, 3).reshape(B, T * N // K, K, -1),
    key,
    value,
    query_positions=again(query_positions),
    segment_ids=None if segment_ids is None else (again(segment_ids[0]), segment_ids[1]),
    **arguments,
  )
  unfold = lambda x: x.reshape(B, T, N // K, K, *x.shape[3:]).swapaxes(2, 3)
  out, lse = (unfold(x).reshape(B, T, N, *x.shape[3:]) for x in results)
  return out, lse
