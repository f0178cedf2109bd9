"""How well vectors find documents: exact ranks among all, and what is made of them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.core.known import check_ids, number
from effjax.core.typing import Array, Bool, Int, Integer


def hidden(
  document_keys: Integer[Array | np.ndarray, "C"],
  relevant: Integer[Array | np.ndarray, "B"],
  keys: Integer[Array | np.ndarray, "B"] | None = None,
) -> Bool[Array, "B C"]:
  """Which candidates do not count: other copies of the relevant document, and the query's own text.

  Equal keys are equal texts. Without this a copy of the right answer would be a wrong one.

  Example:
    >>> hidden(jnp.array([7, 8, 7]), jnp.array([0, 1]), keys=jnp.array([9, 7])).tolist()
    [[False, False, True], [True, False, True]]
  """
  document_keys, relevant = jnp.asarray(document_keys), jnp.asarray(relevant)
  copies = document_keys[None] == document_keys[relevant][:, None]
  own = False if keys is None else document_keys[None] == jnp.asarray(keys)[:, None]
  return (copies | own) & (jnp.arange(document_keys.size)[None] != relevant[:, None])


def ranks(
  queries: Any,
  documents: Any,
  relevant: Any,
  *,
  hidden: Any = None,
) -> np.ndarray:
  """The place of each query's relevant document among all, 1 … C, by exact dot products.

  Of documents that score alike the relevant one comes last, so that an encoder that maps all to one
  point finds nothing.

  Args:
    queries, documents: vectors [B, D] and [C, D].
    relevant: the row of the document that answers each query, [B].
    hidden: [B, C], candidates that do not count.

  Raises:
    ValueError: for a row that there is not.

  Example:
    >>> ranks(np.array([[1.0, 0.0]]), np.array([[0.5, 0.0], [1.0, 0.0], [0.5, 2.0]]), np.array([0]))
    array([3])
  """
  rows = np.asarray(relevant)
  check_ids("relevant", rows, len(documents))
  products = np.asarray(queries) @ np.asarray(documents).T
  before = ~(products < np.take_along_axis(products, rows[:, None], 1))
  if hidden is not None:
    before &= ~np.asarray(hidden)
  before[np.arange(len(rows)), rows] = True
  return before.sum(1)


def recall(ranks: Int[np.ndarray, "B"], k: int) -> float:
  """The share of queries whose document is among the first k.

  Example:
    >>> recall(np.array([1, 3, 11]), 10)
    0.6666666666666666
  """
  number("k", k, integer=True, least=1)
  return float((ranks <= k).mean())


def mean_reciprocal_rank(ranks: Int[np.ndarray, "B"]) -> float:
  """The mean of 1 / rank.

  Example:
    >>> mean_reciprocal_rank(np.array([1, 2, 4]))
    0.5833333333333334
  """
  return float((1 / ranks).mean())
